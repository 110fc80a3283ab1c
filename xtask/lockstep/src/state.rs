//! A processor's registers as far as both sides show them, and QEMU's as a whole.

use anyhow::{Context as _, ensure};
use x86::{Attr, CpuState, Segment, TableRegister};

/// Names of the general registers in the order of [`Registers::gpr`] (as encoded, SDM 2A table 3-1).
pub const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Where QEMU's `g` packet has each of them.
const GDB_ORDER: [usize; 16] = [0, 2, 3, 1, 7, 6, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

/// What is compared after each instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// CS, SS, DS, ES, FS, GS.
    pub selectors: [u16; 6],
    pub fs_base: u64,
    pub gs_base: u64,
    pub cr: [u64; 4],
    pub efer: u64,
    pub xmm: [u128; 16],
    pub mxcsr: u32,
}

/// Reads little-endian fields one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take(&mut self, len_bytes: usize) -> anyhow::Result<u128> {
        ensure!(self.0.len() >= len_bytes, "QEMU's register packet is too short");
        let (field, rest) = self.0.split_at(len_bytes);
        self.0 = rest;
        Ok(field.iter().rev().fold(0, |value, &byte| value << 8 | u128::from(byte)))
    }

    fn u64(&mut self) -> anyhow::Result<u64> {
        u64::try_from(self.take(8)?).context("64 bits")
    }

    fn u32(&mut self) -> anyhow::Result<u32> {
        u32::try_from(self.take(4)?).context("32 bits")
    }
}

impl Registers {
    /// From a `g` packet (QEMU `gdb-xml/i386-64bit.xml`).
    pub fn from_packet(packet: &[u8]) -> anyhow::Result<Self> {
        let mut fields = Fields(packet);
        let mut r = Self::default();
        let mut gpr = [0; 16];
        for slot in &mut gpr {
            *slot = fields.u64()?;
        }
        r.gpr = GDB_ORDER.map(|i| gpr[i]);
        // Encoded order from GDB's (rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, …).
        r.rip = fields.u64()?;
        r.rflags = u64::from(fields.u32()?);
        for slot in &mut r.selectors {
            *slot = u16::try_from(fields.u32()? & 0xffff).context("16 bits")?;
        }
        (r.fs_base, r.gs_base) = (fields.u64()?, fields.u64()?);
        fields.u64()?; // k_gs_base
        for slot in &mut r.cr {
            *slot = fields.u64()?;
        }
        fields.u64()?; // cr8
        r.efer = fields.u64()?;
        for _ in 0..8 {
            fields.take(10)?; // st0 to st7
        }
        for _ in 0..8 {
            fields.u32()?; // fctrl to fop
        }
        for slot in &mut r.xmm {
            *slot = fields.take(16)?;
        }
        r.mxcsr = fields.u32()?;
        Ok(r)
    }
}

/// A line of `info registers` split at blanks, from the one that starts with `name` and `=`.
fn line<'a>(text: &'a str, name: &str) -> anyhow::Result<Vec<&'a str>> {
    let found = text.lines().find_map(|l| l.strip_prefix(name)?.trim_start().strip_prefix('='));
    Ok(found.with_context(|| format!("QEMU's registers lack {name}"))?.split_whitespace().collect())
}

fn hex(text: &str) -> anyhow::Result<u64> {
    u64::from_str_radix(text, 16).with_context(|| format!("'{text}' is no hex number"))
}

fn segment(text: &str, name: &str) -> anyhow::Result<Segment> {
    let words = line(text, name)?;
    ensure!(words.len() >= 4, "QEMU's {name} is incomplete");
    // The last number is the descriptor's upper half: attributes in bits 8 to 15 and 20 to 23.
    let flags = hex(words[3])?;
    Ok(Segment {
        selector: u16::try_from(hex(words[0])?)?,
        base: hex(words[1])?,
        limit: u32::try_from(hex(words[2])?)?,
        attr: Attr(u16::try_from(flags >> 8 & 0xf0ff)?),
    })
}

fn table(text: &str, name: &str) -> anyhow::Result<TableRegister> {
    let words = line(text, name)?;
    ensure!(words.len() >= 2, "QEMU's {name} is incomplete");
    Ok(TableRegister { base: hex(words[0])?, limit: u16::try_from(hex(words[1])? & 0xffff)? })
}

/// The value of `name=` anywhere in the text.
fn value(text: &str, name: &str) -> anyhow::Result<u64> {
    let word = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    hex(word.with_context(|| format!("QEMU's registers lack {name}"))?)
}

/// QEMU's processor as ours, from `info registers` (hidden parts of segments, tables) and the `g` packet (the rest).
/// FP and SIMD start as after reset on both sides.
pub fn from_monitor(text: &str, registers: &Registers) -> anyhow::Result<CpuState> {
    let mut s = CpuState::reset();
    s.gpr = registers.gpr;
    s.rip = registers.rip;
    s.rflags = registers.rflags;
    for (slot, name) in s.seg.iter_mut().zip(["ES", "CS", "SS", "DS", "FS", "GS"]) {
        *slot = segment(text, name)?;
    }
    s.ldtr = segment(text, "LDT")?;
    s.tr = segment(text, "TR")?;
    s.gdtr = table(text, "GDT")?;
    s.idtr = table(text, "IDT")?;
    [s.cr0, s.cr2, s.cr3, s.cr4] = registers.cr;
    s.msr.efer = registers.efer;
    s.dr6 = value(text, "DR6")?;
    s.dr7 = value(text, "DR7")?;
    s.cpl = u8::try_from(value(text, "CPL")?)?;
    Ok(s)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
EAX=00000000 EBX=00009500 ECX=00000000 EDX=00000000
EIP=0010000c EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0010 00000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
CS =0008 00000000 ffffffff 00cf9b00 DPL=0 CS32 [-RA]
SS =0010 00000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
DS =0010 00000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
FS =0000 00000000 0000ffff 00009300 DPL=0 DS16 [-WA]
GS =0000 00000000 0000ffff 00009300 DPL=0 DS16 [-WA]
LDT=0000 00000000 0000ffff 00008200 DPL=0 LDT
TR =0000 00000000 0000ffff 00008b00 DPL=0 TSS32-busy
GDT=     000ca0b8 00000027
IDT=     00000000 000003ff
CR0=00000011 CR2=00000000 CR3=00000000 CR4=00000000
DR6=ffff0ff0 DR7=00000400
";

    #[test]
    fn monitor_text_becomes_a_state() {
        let s = from_monitor(TEXT, &Registers::default()).expect("complete");
        assert_eq!((s.seg[1].selector, s.seg[1].attr.0, s.seg[1].limit), (8, 0xc09b, u32::MAX));
        assert_eq!((s.gdtr.base, s.gdtr.limit, s.dr7), (0xca0b8, 0x27, 0x400));
        assert!(from_monitor("", &Registers::default()).is_err());
    }

    #[test]
    fn packet_order_is_gdbs() {
        let mut packet = vec![0; 640];
        packet[8] = 7; // rbx
        packet[7 * 8] = 9; // rsp
        let r = Registers::from_packet(&packet).expect("long enough");
        assert_eq!((r.gpr[3], r.gpr[4]), (7, 9));
    }
}
