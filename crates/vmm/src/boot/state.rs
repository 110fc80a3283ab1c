//! The bootstrap processor's registers at the kernel's first instruction, as plain data.

use super::Protocol;

/// Index of RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI in [`InitialState::gprs`] (SDM 2A table 2-2).
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RSI.
    pub const RSI: usize = 6;
}

/// CR0.PE and CR0.ET, which is always 1 (SDM 3A 2.5).
const CR0_PROTECTED: u64 = 0x11;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// IA32_EFER.LME and .LMA (SDM 3A 2.2.1).
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// RFLAGS bit 1 is always set; interrupts are off.
const RFLAGS_FIXED: u64 = 2;

/// Segment attributes in the layout of VMX access rights (SDM 3C 24.4.1): type in bits 3:0, S 4, DPL 6:5, P 7,
/// zero 11:8, AVL 12, L 13, D/B 14, G 15. That is descriptor bits 55:40 without the limit.
pub mod attributes {
    /// 32-bit code, execute/read, accessed, 4 KiB granularity.
    pub const CODE32: u16 = 0xc09b;
    /// 64-bit code, execute/read, accessed, 4 KiB granularity.
    pub const CODE64: u16 = 0xa09b;
    /// Read/write data, accessed, 32-bit, 4 KiB granularity.
    pub const DATA: u16 = 0xc093;
    /// Busy 32-bit (or, in long mode, 64-bit) task state segment.
    pub const TSS_BUSY: u16 = 0x008b;
    /// Local descriptor table.
    pub const LDT: u16 = 0x0082;
}

/// How the processor executes at entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryMode {
    /// Real mode. No protocol here enters a kernel like this.
    Real16,
    /// Protected mode, 32-bit flat segments, no paging.
    Protected32,
    /// 64-bit mode, identity page tables for the first 4 GiB.
    Long64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SegmentState {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (already scaled by the granularity).
    pub limit: u32,
    /// See [`attributes`].
    pub attributes: u16,
}

/// All segment registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "named as the manual names them")]
pub struct Segments {
    pub cs: SegmentState,
    pub ds: SegmentState,
    pub es: SegmentState,
    pub fs: SegmentState,
    pub gs: SegmentState,
    pub ss: SegmentState,
    pub tr: SegmentState,
    pub ldtr: SegmentState,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TableRegister {
    /// Linear address of the first descriptor.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

/// Registers of the bootstrap processor at entry. What is not named here is as after reset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InitialState {
    /// The boot protocol that was used.
    pub protocol: Protocol,
    /// The mode that the registers below amount to.
    pub mode: EntryMode,
    /// First instruction.
    pub rip: u64,
    /// Top of a small stack in low memory; the same as `gprs[4]`.
    pub rsp: u64,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gprs: [u64; 16],
    /// CR0.
    pub cr0: u64,
    /// CR3: 0 unless paging is on.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS: interrupts off.
    pub rflags: u64,
    /// The segment registers; they agree with the GDT in memory.
    pub segments: Segments,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR: the interrupt vector table, as it is on a PC whose boot loader came from a BIOS. Programs that go back to
    /// real mode without loading one count on it; in protected mode its entries are no valid gates.
    pub idtr: TableRegister,
}

/// Where the boot loader put its own structures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Environment {
    /// The GDT, [`GDT_BYTES`] long.
    pub gdt: u64,
    /// Top of the stack.
    pub stack: u64,
    /// PML4, or 0 if the entry is not in 64-bit mode.
    pub pml4: u64,
}

/// Which selectors are code and data: Linux wants 10H and 18H (`boot.rst`, 32-bit and 64-bit boot protocol);
/// others do not say, and images that forget to load their own GDT count on 08H and 10H.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Selectors {
    Linux,
    Plain,
}

impl Selectors {
    const fn code(self) -> u16 {
        match self {
            Self::Linux => 0x10,
            Self::Plain => 0x08,
        }
    }
    const fn data(self) -> u16 {
        self.code() + 8
    }
}

const TSS_SELECTOR: u16 = 0x20;
/// Five descriptors and the upper half of a 64-bit TSS descriptor.
pub(super) const GDT_BYTES: u16 = 0x30;

impl InitialState {
    /// The state at `rip` in `mode` with zero in the general registers other than RSP.
    pub(super) fn new(
        protocol: Protocol,
        mode: EntryMode,
        selectors: Selectors,
        rip: u64,
        env: Environment,
    ) -> Self {
        let long = mode == EntryMode::Long64;
        let flat = |selector, attributes| SegmentState { selector, base: 0, limit: u32::MAX, attributes };
        let data = flat(selectors.data(), attributes::DATA);
        let segments = Segments {
            cs: flat(selectors.code(), if long { attributes::CODE64 } else { attributes::CODE32 }),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: SegmentState {
                selector: TSS_SELECTOR,
                base: 0,
                limit: 0x67,
                attributes: attributes::TSS_BUSY,
            },
            ldtr: SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: attributes::LDT },
        };
        let mut gprs = [0; 16];
        gprs[gpr::RSP] = env.stack;
        Self {
            protocol,
            mode,
            rip,
            rsp: env.stack,
            gprs,
            cr0: if long { CR0_PROTECTED | CR0_PG } else { CR0_PROTECTED },
            cr3: if long { env.pml4 } else { 0 },
            cr4: if long { CR4_PAE } else { 0 },
            efer: if long { EFER_LONG } else { 0 },
            rflags: RFLAGS_FIXED,
            segments,
            gdtr: TableRegister { base: env.gdt, limit: GDT_BYTES - 1 },
            idtr: TableRegister { base: 0, limit: 0x3ff },
        }
    }

    /// Sets a general register (see [`gpr`]).
    pub(super) fn with(mut self, register: usize, value: u64) -> Self {
        self.gprs[register] = value;
        self
    }

    /// The GDT that agrees with the segment registers.
    pub(super) fn gdt(&self) -> [u8; GDT_BYTES as usize] {
        let mut gdt = [0; GDT_BYTES as usize];
        for segment in [self.segments.cs, self.segments.ds, self.segments.tr] {
            let at = usize::from(segment.selector);
            gdt[at..at + 8].copy_from_slice(&descriptor(segment).to_le_bytes());
        }
        gdt
    }
}

/// The descriptor in memory (SDM 3A figure 3-8) of a segment with a base below 4 GiB.
fn descriptor(s: SegmentState) -> u64 {
    let granular = s.attributes & 1 << 15 != 0;
    let limit = u64::from(if granular { s.limit >> 12 } else { s.limit });
    (limit & 0xffff)
        | (s.base & 0xff_ffff) << 16
        | u64::from(s.attributes) << 40
        | (limit >> 16 & 0xf) << 48
        | (s.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(mode: EntryMode, selectors: Selectors) -> InitialState {
        let env = Environment { gdt: 0x1000, stack: 0x9000, pml4: 0xa000 };
        InitialState::new(Protocol::Linux64, mode, selectors, 0x20_0000, env)
    }

    #[test]
    fn gdt_of_linux_entry_holds_flat_descriptors_at_10h_and_18h() {
        let gdt = state(EntryMode::Protected32, Selectors::Linux).gdt();
        let entry = |i: usize| u64::from_le_bytes(gdt[i..i + 8].try_into().unwrap());
        assert_eq!((entry(0), entry(8)), (0, 0));
        assert_eq!(entry(0x10), 0x00cf_9b00_0000_ffff);
        assert_eq!(entry(0x18), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(0x20), 0x0000_8b00_0000_0067);
        let gdt = state(EntryMode::Long64, Selectors::Linux).gdt();
        assert_eq!(u64::from_le_bytes(gdt[0x10..0x18].try_into().unwrap()), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn long_entry_has_paging_and_protected_entry_has_none() {
        let s = state(EntryMode::Long64, Selectors::Linux);
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x8000_0011, 0xa000, 0x20, 0x500));
        let s = state(EntryMode::Protected32, Selectors::Plain);
        assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0));
        assert_eq!((s.segments.cs.selector, s.segments.ss.selector), (8, 0x10));
        assert_eq!(s.gprs[gpr::RSP], s.rsp);
    }
}
