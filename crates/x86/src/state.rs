//! The architectural state of one vCPU: plain versioned data. What an engine keeps beside it (lazy flags, TLBs,
//! decoded code) is derived from it and rebuilt after a restore.

use serde::{Deserialize, Serialize};

use crate::bits::{cr0, dr, efer, rflags};
use crate::{Attr, Segment, TableRegister};

/// Indices of the general registers, as encoded (SDM 2A table 3-1).
#[expect(missing_docs, reason = "the manual's names")]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Indices of the segment registers, as encoded.
#[expect(missing_docs, reason = "the manual's names")]
pub mod sreg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// What the vCPU is doing (SDM 3C 24.4.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running,
    /// In HLT (or MWAIT), waiting for an interrupt.
    Halted,
    /// An application processor after INIT.
    WaitForSipi,
    /// Triple fault.
    Shutdown,
}

/// Interrupts held off for one instruction (SDM 3A 6.8.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum InterruptShadow {
    /// None.
    #[default]
    None,
    /// After STI: maskable interrupts.
    Sti,
    /// After MOV SS or POP SS: also NMIs, debug traps.
    MovSs,
}

/// Bytes of the FP/SIMD area: enough for x87 to AVX-512 and PKRU in the standard format of any host.
pub const FPU_BYTES: usize = 4096;

/// FP/SIMD state in the standard (non-compacted) XSAVE format with the *host's* component offsets (CPUID 0DH),
/// which the guest is shown too.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FpuArea(pub [u8; FPU_BYTES]);

impl Default for FpuArea {
    /// The state after reset (SDM 3A table 9-1: FCW 0x40; we give FINIT's 0x37f as after INIT of the FPU by firmware).
    fn default() -> Self {
        let mut area = Self([0; FPU_BYTES]);
        area.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area
    }
}

impl std::fmt::Debug for FpuArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FpuArea(…)")
    }
}

impl Serialize for FpuArea {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let used = self.0.iter().rposition(|&b| b != 0).map_or(0, |i| i + 1);
        let hex: String = self.0[..used].iter().map(|b| format!("{b:02x}")).collect();
        s.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for FpuArea {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let hex = String::deserialize(d)?;
        if !hex.is_ascii() || !hex.len().is_multiple_of(2) || hex.len() > 2 * FPU_BYTES {
            return Err(D::Error::custom("FP state is no hex string of at most 4096 bytes"));
        }
        let mut area = Self([0; FPU_BYTES]);
        for (byte, digits) in area.0.iter_mut().zip(hex.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(D::Error::custom)?;
            *byte = u8::from_str_radix(digits, 16).map_err(D::Error::custom)?;
        }
        Ok(area)
    }
}

/// Model-specific registers that are plain storage of the vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the manual's names")]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    /// Guest TSC = clock's TSC + this, wrapping.
    pub tsc_offset: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    pub mcg_status: u64,
    pub kvm_system_time: u64,
    pub kvm_wall_clock: u64,
    /// Registers that guests write and read back without effect on this machine (HWCR, SYSCFG, DE_CFG, …).
    pub inert: std::collections::BTreeMap<u32, u64>,
}

/// One vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the manual's names")]
pub struct CpuState {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (see [`sreg`]).
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// PDPTEs as loaded by the last write of CR3 with PAE paging (SDM 3A 4.4.1).
    pub pdpte: [u64; 4],
    /// Privilege level of the code running: SS.DPL, kept by itself because real mode has it too.
    pub cpl: u8,
    pub msr: Msrs,
    pub fpu: Box<FpuArea>,
    pub activity: Activity,
    pub shadow: InterruptShadow,
    /// Between the delivery of an NMI and the next IRET.
    pub nmi_blocked: bool,
}

impl Default for CpuState {
    fn default() -> Self {
        Self::reset()
    }
}

impl CpuState {
    /// State after power-up (SDM 3A table 9-1).
    #[must_use]
    pub fn reset() -> Self {
        let data = Segment::real_mode(0);
        let code = Segment { selector: 0xf000, attr: Attr(0x9b), limit: 0xffff, base: 0xffff_0000 };
        let table = TableRegister { base: 0, limit: 0xffff };
        Self {
            gpr: [0, 0, 0x600, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            seg: [data, code, data, data, data, data],
            ldtr: Segment { attr: Attr(0x82), limit: 0xffff, ..Segment::default() },
            tr: Segment { attr: Attr(0x8b), limit: 0xffff, ..Segment::default() },
            gdtr: table,
            idtr: table,
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: dr::DR6_FIXED,
            dr7: dr::DR7_FIXED,
            pdpte: [0; 4],
            cpl: 0,
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            fpu: Box::default(),
            activity: Activity::Running,
            shadow: InterruptShadow::None,
            nmi_blocked: false,
        }
    }

    /// INIT (SDM 3A table 9-1, 9.1.1): like reset, but FP state, MSRs other than EFER-independent ones, TSC and
    /// CR0.CD/NW live on.
    pub fn init(&mut self) {
        let old = std::mem::take(self);
        self.cr0 = cr0::ET | old.cr0 & (cr0::CD | cr0::NW);
        self.msr = Msrs { efer: 0, ..old.msr };
        self.fpu = old.fpu;
        self.xcr0 = old.xcr0;
        self.activity = Activity::WaitForSipi;
    }

    /// Start-up IPI: runs from `vector << 12` in real mode (SDM 3A 8.4.3).
    pub fn sipi(&mut self, vector: u8) {
        self.seg[sreg::CS] = Segment {
            selector: u16::from(vector) << 8,
            attr: Attr(0x9b),
            limit: 0xffff,
            base: u64::from(vector) << 12,
        };
        self.rip = 0;
        self.activity = Activity::Running;
    }

    /// In IA-32e mode (long or compatibility).
    #[inline(always)]
    #[must_use]
    pub const fn long_mode(&self) -> bool {
        self.msr.efer & efer::LMA != 0
    }

    /// Executing 64-bit code.
    #[inline(always)]
    #[must_use]
    pub const fn code64(&self) -> bool {
        self.long_mode() && self.seg[sreg::CS].attr.long()
    }

    /// Protected mode (including V86).
    #[inline(always)]
    #[must_use]
    pub const fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Virtual-8086 mode.
    #[inline(always)]
    #[must_use]
    pub const fn v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }
}
