//! The registers as gdb numbers them. One table a layout says name, size and place; the target description (`target.xml`),
//! the `g` packet and single accesses all come from it.
//!
//! The features `org.gnu.gdb.i386.*` are gdb's own (gdb manual, "i386 Features"); the system registers are a feature of ours,
//! which gdb shows without knowing it.

use std::fmt::Write as _;

use x86::CpuState;
use x86::bits::rflags;
use x86::state::{Activity, FpuArea, sreg};

/// Where a register is in the state of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Gpr(usize),
    Rip,
    Flags,
    Selector(usize),
    St(usize),
    /// x87 control and pointers: fctrl, fstat, ftag, fiseg, fioff, foseg, fooff, fop.
    X87(usize),
    Xmm(usize),
    Mxcsr,
    Base(usize),
    KernelGsBase,
    Cr(usize),
    Efer,
}

#[derive(Clone, Debug)]
struct Register {
    name: String,
    bytes: usize,
    place: Place,
}

/// The registers of one architecture in gdb's order.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    registers: Vec<Register>,
    /// `target.xml`.
    pub xml: String,
}

/// Which of gdb's architectures the guest is shown as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `i386:x86-64`.
    X86_64,
    /// `i386`.
    I386,
}

/// A register cannot be written, or not so.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refused;

const EFLAGS: &str = r#"<flags id="i386_eflags" size="4"><field name="" start="22" end="31"/><field name="ID" start="21" end="21"/><field name="VIP" start="20" end="20"/><field name="VIF" start="19" end="19"/><field name="AC" start="18" end="18"/><field name="VM" start="17" end="17"/><field name="RF" start="16" end="16"/><field name="" start="15" end="15"/><field name="NT" start="14" end="14"/><field name="IOPL" start="12" end="13"/><field name="OF" start="11" end="11"/><field name="DF" start="10" end="10"/><field name="IF" start="9" end="9"/><field name="TF" start="8" end="8"/><field name="SF" start="7" end="7"/><field name="ZF" start="6" end="6"/><field name="" start="5" end="5"/><field name="AF" start="4" end="4"/><field name="" start="3" end="3"/><field name="PF" start="2" end="2"/><field name="" start="1" end="1"/><field name="CF" start="0" end="0"/></flags>"#;
const SSE_TYPES: &str = r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union><flags id="i386_mxcsr" size="4"><field name="IE" start="0" end="0"/><field name="DE" start="1" end="1"/><field name="ZE" start="2" end="2"/><field name="OE" start="3" end="3"/><field name="UE" start="4" end="4"/><field name="PE" start="5" end="5"/><field name="DAZ" start="6" end="6"/><field name="IM" start="7" end="7"/><field name="DM" start="8" end="8"/><field name="ZM" start="9" end="9"/><field name="OM" start="10" end="10"/><field name="UM" start="11" end="11"/><field name="PM" start="12" end="12"/><field name="RC" start="13" end="14"/><field name="FZ" start="15" end="15"/></flags>"#;

/// Flags that the debugger may write: all but those that change the mode or mirror virtual interrupts.
const FLAGS_WRITABLE: u64 = rflags::ALL & !(rflags::VM | 1 << 19 | 1 << 20) & 0xffff_ffff;

/// Offsets in the FXSAVE image (SDM 1 table 10-2). It is always whole: XSTATE_BV behind it means nothing (INV-VEC-2).
mod fx {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

impl Layout {
    /// The registers of an architecture.
    pub fn new(arch: Arch) -> Self {
        let long = arch == Arch::X86_64;
        let mut layout = Self { registers: Vec::new(), xml: String::new() };
        let name = if long { "i386:x86-64" } else { "i386" };
        layout.xml = format!(
            "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\"><architecture>{name}</architecture>"
        );
        layout.core(long);
        layout.sse(if long { 16 } else { 8 });
        if long {
            layout.open("org.gnu.gdb.i386.segments", "");
            layout.bases();
            layout.xml.push_str("</feature>");
        }
        layout.system(long);
        layout.xml.push_str("</target>");
        layout
    }

    fn open(&mut self, feature: &str, types: &str) {
        // Writing to a string cannot fail.
        let _ = write!(self.xml, "<feature name=\"{feature}\">{types}");
    }

    fn add(&mut self, name: &str, bytes: usize, kind: &str, place: Place) {
        let (number, bits) = (self.registers.len(), 8 * bytes);
        let _ =
            write!(self.xml, "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\" regnum=\"{number}\"/>");
        self.registers.push(Register { name: name.to_owned(), bytes, place });
    }

    fn core(&mut self, long: bool) {
        self.open("org.gnu.gdb.i386.core", EFLAGS);
        if long {
            let order =
                ["ax", "bx", "cx", "dx", "si", "di", "bp", "sp"].into_iter().zip([0, 3, 1, 2, 6, 7, 5, 4]);
            for (name, i) in order {
                let kind = if i == 4 || i == 5 { "data_ptr" } else { "int64" };
                self.add(&format!("r{name}"), 8, kind, Place::Gpr(i));
            }
            (8..16).for_each(|i| self.add(&format!("r{i}"), 8, "int64", Place::Gpr(i)));
            self.add("rip", 8, "code_ptr", Place::Rip);
        } else {
            for (i, name) in ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"].into_iter().enumerate() {
                let kind = if i == 4 || i == 5 { "data_ptr" } else { "int32" };
                self.add(&format!("e{name}"), 4, kind, Place::Gpr(i));
            }
            self.add("eip", 4, "code_ptr", Place::Rip);
        }
        self.add("eflags", 4, "i386_eflags", Place::Flags);
        let selectors = [sreg::CS, sreg::SS, sreg::DS, sreg::ES, sreg::FS, sreg::GS];
        for (name, i) in ["cs", "ss", "ds", "es", "fs", "gs"].into_iter().zip(selectors) {
            self.add(name, 4, "int32", Place::Selector(i));
        }
        (0..8).for_each(|i| self.add(&format!("st{i}"), 10, "i387_ext", Place::St(i)));
        for (i, name) in
            ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"].into_iter().enumerate()
        {
            self.add(name, 4, "int", Place::X87(i));
        }
        self.xml.push_str("</feature>");
    }

    fn sse(&mut self, count: usize) {
        self.open("org.gnu.gdb.i386.sse", SSE_TYPES);
        (0..count).for_each(|i| self.add(&format!("xmm{i}"), 16, "vec128", Place::Xmm(i)));
        self.add("mxcsr", 4, "i386_mxcsr", Place::Mxcsr);
        self.xml.push_str("</feature>");
    }

    fn bases(&mut self) {
        self.add("fs_base", 8, "int", Place::Base(sreg::FS));
        self.add("gs_base", 8, "int", Place::Base(sreg::GS));
    }

    fn system(&mut self, long: bool) {
        self.open("org.trellis.x86.system", "");
        if long {
            self.add("k_gs_base", 8, "int64", Place::KernelGsBase);
        } else {
            self.bases();
        }
        for i in [0, 2, 3, 4] {
            self.add(&format!("cr{i}"), 8, "int64", Place::Cr(i));
        }
        self.add("efer", 8, "int64", Place::Efer);
        self.xml.push_str("</feature>");
    }

    /// All registers of `state`, one after another.
    pub fn read_all(&self, state: &CpuState) -> Vec<u8> {
        self.registers.iter().flat_map(|r| read(r, state)).collect()
    }

    /// One register of `state`.
    pub fn read(&self, number: usize, state: &CpuState) -> Option<Vec<u8>> {
        self.registers.get(number).map(|r| read(r, state))
    }

    /// Writes one register into `state`.
    pub fn write(&self, number: usize, value: &[u8], state: &mut CpuState) -> Result<(), Refused> {
        let register = self.registers.get(number).ok_or(Refused)?;
        // gdb pads values to whole registers; less is a mistake.
        let value = value.get(..register.bytes).ok_or(Refused)?;
        if read(register, state) == value { Ok(()) } else { write(register.place, value, state) }
    }

    /// Writes all registers that differ; of those that cannot be written nothing is said.
    pub fn write_all(&self, bytes: &[u8], state: &mut CpuState) -> Result<(), Refused> {
        let mut rest = bytes;
        for number in 0..self.registers.len() {
            let (value, tail) = rest.split_at_checked(self.registers[number].bytes).ok_or(Refused)?;
            rest = tail;
            match self.write(number, value, state) {
                Ok(()) => {}
                Err(Refused) => tracing::debug!(register = self.registers[number].name, "not written"),
            }
        }
        Ok(())
    }
}

// ---- reading --------------------------------------------------------------------------------------------------

fn read(register: &Register, state: &CpuState) -> Vec<u8> {
    let fpu = &state.fpu.0;
    let number = match register.place {
        Place::Gpr(i) => state.gpr[i],
        Place::Rip => state.rip,
        Place::Flags => state.rflags,
        Place::Selector(i) => u64::from(state.seg[i].selector),
        Place::Base(i) => state.seg[i].base,
        Place::KernelGsBase => state.msr.kernel_gs_base,
        Place::Cr(0) => state.cr0,
        Place::Cr(2) => state.cr2,
        Place::Cr(3) => state.cr3,
        Place::Cr(_) => state.cr4,
        Place::Efer => state.msr.efer,
        Place::Mxcsr => number(&fpu[fx::MXCSR..], 4),
        Place::X87(i) => x87(&state.fpu, i),
        Place::St(i) => return fpu[fx::ST + 16 * i..][..register.bytes].to_vec(),
        Place::Xmm(i) => return fpu[fx::XMM + 16 * i..][..register.bytes].to_vec(),
    };
    number.to_le_bytes()[..register.bytes].to_vec()
}

/// The little-endian number at the start of `bytes`.
fn number(bytes: &[u8], len: usize) -> u64 {
    bytes.iter().take(len).rev().fold(0, |n, &b| n << 8 | u64::from(b))
}

fn x87(fpu: &FpuArea, i: usize) -> u64 {
    let bytes = &fpu.0;
    match i {
        0 => number(&bytes[fx::FCW..], 2),
        1 => number(&bytes[fx::FSW..], 2),
        // Two bits a register: 3 is empty; valid, zero and special all count as valid here.
        2 => (0..8).filter(|i| bytes[fx::FTW] >> i & 1 == 0).fold(0, |tags, i| tags | 3 << (2 * i)),
        3 => number(&bytes[fx::FIP + 4..], 2),
        4 => number(&bytes[fx::FIP..], 4),
        5 => number(&bytes[fx::FDP + 4..], 2),
        6 => number(&bytes[fx::FDP..], 4),
        _ => number(&bytes[fx::FOP..], 2),
    }
}

// ---- writing --------------------------------------------------------------------------------------------------

fn write(place: Place, bytes: &[u8], state: &mut CpuState) -> Result<(), Refused> {
    let value = number(bytes, 8);
    match place {
        Place::Gpr(i) => state.gpr[i] = value,
        Place::Rip => {
            if !x86::bits::is_canonical(value) {
                return Err(Refused);
            }
            state.rip = value;
            // Sent elsewhere, it does not go on waiting.
            if state.activity == Activity::Halted {
                state.activity = Activity::Running;
            }
        }
        Place::Flags => {
            if (value ^ state.rflags) & 0xffff_ffff & !FLAGS_WRITABLE != 0 {
                return Err(Refused);
            }
            state.rflags = value & FLAGS_WRITABLE | state.rflags & !FLAGS_WRITABLE;
        }
        Place::Base(_) | Place::KernelGsBase if !x86::bits::is_canonical(value) => return Err(Refused),
        Place::Base(i) => state.seg[i].base = value,
        Place::KernelGsBase => state.msr.kernel_gs_base = value,
        // Its upper half is reserved.
        Place::Mxcsr => put(&mut state.fpu, fx::MXCSR, &bytes[..2]),
        Place::X87(i) => return write_x87(&mut state.fpu, i, value),
        Place::St(i) => put(&mut state.fpu, fx::ST + 16 * i, bytes),
        Place::Xmm(i) => put(&mut state.fpu, fx::XMM + 16 * i, bytes),
        // A selector without its descriptor, or a control register without its side effects, makes no state that a CPU has.
        Place::Selector(_) | Place::Cr(_) | Place::Efer => return Err(Refused),
    }
    Ok(())
}

fn put(fpu: &mut FpuArea, at: usize, bytes: &[u8]) {
    fpu.0[at..at + bytes.len()].copy_from_slice(bytes);
}

fn write_x87(fpu: &mut FpuArea, i: usize, value: u64) -> Result<(), Refused> {
    let bytes = value.to_le_bytes();
    match i {
        0 => put(fpu, fx::FCW, &bytes[..2]),
        1 => put(fpu, fx::FSW, &bytes[..2]),
        2 => {
            let full = (0..8).filter(|i| value >> (2 * i) & 3 != 3).fold(0u8, |tags, i| tags | 1 << i);
            put(fpu, fx::FTW, &[full]);
        }
        // The last instruction's addresses: for looking at.
        _ => return Err(Refused),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number_of(layout: &Layout, name: &str) -> usize {
        layout.registers.iter().position(|r| r.name == name).unwrap()
    }

    fn write_name(layout: &Layout, name: &str, value: u128, state: &mut CpuState) -> Result<(), Refused> {
        let n = number_of(layout, name);
        layout.write(n, &value.to_le_bytes()[..layout.registers[n].bytes], state)
    }

    #[test]
    fn layouts_have_gdbs_order_and_sizes() {
        let long = Layout::new(Arch::X86_64);
        assert_eq!(
            ["rip", "eflags", "st0", "xmm0", "mxcsr"].map(|n| number_of(&long, n)),
            [16, 17, 24, 40, 56]
        );
        let short = Layout::new(Arch::I386);
        assert_eq!(
            ["eip", "eflags", "st0", "xmm0", "mxcsr"].map(|n| number_of(&short, n)),
            [8, 9, 16, 32, 40]
        );
        let state = CpuState::reset();
        assert_eq!(long.read_all(&state).len(), 17 * 8 + 7 * 4 + 80 + 32 + 256 + 4 + 16 + 8 + 40);
        assert_eq!(short.read_all(&state).len(), 9 * 4 + 7 * 4 + 80 + 32 + 128 + 4 + 16 + 40);
        assert!(long.xml.ends_with("</feature></target>") && !long.xml.contains("type=\"\""));
    }

    #[test]
    fn all_registers_written_back_change_nothing() {
        let layout = Layout::new(Arch::X86_64);
        let mut state = CpuState::reset();
        let before = state.clone();
        let bytes = layout.read_all(&state);
        layout.write_all(&bytes, &mut state).unwrap();
        assert!(state == before);
        assert_eq!(layout.write_all(&bytes[1..], &mut state), Err(Refused));
    }

    #[test]
    fn writes_arrive_and_impossible_ones_are_refused() {
        let layout = Layout::new(Arch::X86_64);
        let mut state = CpuState { activity: Activity::Halted, ..CpuState::reset() };
        write_name(&layout, "rdi", 0x1234, &mut state).unwrap();
        write_name(&layout, "rip", 0xffff_8000_0000_0000, &mut state).unwrap();
        write_name(&layout, "gs_base", 0x5000, &mut state).unwrap();
        write_name(&layout, "xmm3", u128::MAX - 1, &mut state).unwrap();
        write_name(&layout, "eflags", u128::from(state.rflags | rflags::ZF), &mut state).unwrap();
        assert_eq!(
            (state.gpr[7], state.rip, state.activity),
            (0x1234, 0xffff_8000_0000_0000, Activity::Running)
        );
        assert_eq!((state.seg[sreg::GS].base, state.rflags & rflags::ZF), (0x5000, rflags::ZF));
        assert_eq!(layout.read(number_of(&layout, "xmm3"), &state).unwrap(), (u128::MAX - 1).to_le_bytes());
        assert_eq!(layout.read(number_of(&layout, "xmm4"), &state).unwrap(), [0; 16]);
        for (name, value) in [
            ("rip", 1u128 << 60),
            ("cr3", 0x1000),
            ("cs", 0x33),
            ("efer", 1),
            ("eflags", 0x20002),
            ("fs_base", 1 << 50),
        ] {
            assert_eq!(write_name(&layout, name, value, &mut state), Err(Refused), "{name}");
        }
        assert_eq!(layout.write(0, &[1, 2], &mut state), Err(Refused));
        assert_eq!(layout.write(1000, &[0; 8], &mut state), Err(Refused));
    }

    #[test]
    fn x87_tags_are_two_bits_a_register_for_gdb() {
        let layout = Layout::new(Arch::X86_64);
        let mut state = CpuState::reset();
        let get = |name, state: &_| layout.read(number_of(&layout, name), state).unwrap();
        assert_eq!(get("fctrl", &state), [0x7f, 3, 0, 0]);
        assert_eq!(get("ftag", &state), [0xff, 0xff, 0, 0]);
        write_name(&layout, "ftag", 0xfffc, &mut state).unwrap();
        assert_eq!((get("ftag", &state), state.fpu.0[fx::FTW]), (vec![0xfc, 0xff, 0, 0], 1));
    }
}
