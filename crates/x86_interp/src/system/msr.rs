//! Model-specific registers (SDM 4, APM 2 appendix A): those that Linux, BSDs, Xen and firmware touch. Non-canonical and
//! reserved values fault, and so does every register that does not exist.

use x86::bits::{efer, is_canonical, msr};
use x86::cpuid::{Feature, Vendor};
use x86::state::sreg;
use x86::{Exception, bits::cr0};

use crate::cpu::Cpu;
use crate::intercept::{Action, Event};

/// Registers that exist, read as given and ignore or keep what is written: what firmware and kernels poke at without need
/// of an effect. AMD: SYSCFG, HWCR, NB_CFG, patch level, DE_CFG, LS_CFG, IC_CFG, BU_CFG, OSVW; Intel: PLATFORM_INFO, FEATURE_CONTROL, …
const INERT_AMD: &[u32] = &[
    msr::SYSCFG,
    msr::HWCR,
    0xc001_001f,
    0xc001_1029,
    0xc001_1020,
    0xc001_1021,
    0xc001_1022,
    0xc001_1023,
    0xc001_102a,
    0xc001_102b,
    0xc001_102c,
    0xc001_102d,
    0xc001_0140,
    0xc001_0141,
    msr::VM_CR,
    0xc001_0010,
    0xc001_0055,
    0xc001_0111,
    0xc001_0117,
    0xc001_1004,
    0xc001_1005,
];
const INERT_INTEL: &[u32] =
    &[0x3a, 0xce, 0x140, 0x17, 0x1ad, 0x2c, 0x33, 0xe7, 0xe8, 0x19a, 0x19b, 0x19c, 0x1a2, 0x1b0];
/// On every vendor: MCG_CAP, MCG_STATUS, machine-check bank controls, PLATFORM_ID, BIOS_SIGN.
const INERT_ALL: &[u32] = &[0x179, 0x17a, 0x17b, msr::BIOS_SIGN_ID, 0x79, 0x8a];

/// PerfEvtSel0–3 and PerfCtr0–3, which every AMD CPU has, announced or not (APM 2 13.2.1); Xen's watchdog counts on them.
/// DEVIATION: they read as zero and count nothing, so that kernels that probe them by writing see that they do not work.
const AMD_COUNTERS: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_0007;

/// MTRRCAP: 8 variable ranges, fixed ranges, write combining.
const MTRRCAP_VALUE: u64 = 0x508;

/// RDMSR.
pub fn read(cpu: &mut Cpu, index: u32) -> Result<u64, Exception> {
    if cpu.intercepts.intercept(Event::MsrRead(index)) == Action::Exit {
        return Ok(0);
    }
    let m = &cpu.s.msr;
    Ok(match index {
        msr::TSC => cpu.tsc(),
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            return cpu.io.apic_msr_read(cpu.index, index).map_err(|_| Exception::GP0);
        }
        msr::TSC_ADJUST if cpu.model.has(Feature::TscAdjust) => m.tsc_adjust,
        msr::SPEC_CTRL if cpu.model.spec_ctrl_mask() != 0 => m.spec_ctrl,
        msr::MTRRCAP => MTRRCAP_VALUE,
        msr::ARCH_CAPABILITIES => return cpu.model.arch_capabilities().ok_or(Exception::GP0),
        msr::SYSENTER_CS => m.sysenter_cs,
        msr::SYSENTER_ESP => m.sysenter_esp,
        msr::SYSENTER_EIP => m.sysenter_eip,
        msr::MISC_ENABLE if cpu.model.vendor() == Vendor::Intel => m.misc_enable,
        msr::DEBUGCTL => m.debugctl,
        // Last branch records: none are taken.
        0x1db..=0x1de => 0,
        _ if is_amd_counter(cpu, index) => 0,
        msr::PAT => m.pat,
        msr::MTRR_DEF_TYPE => m.mtrr_def_type,
        msr::XSS if cpu.model.xss_mask() != 0 || cpu.model.has(Feature::Xsaves) => m.xss,
        msr::EFER => m.efer,
        msr::STAR => m.star,
        msr::LSTAR => m.lstar,
        msr::CSTAR => m.cstar,
        msr::SFMASK => m.sfmask,
        msr::FS_BASE => cpu.s.seg[sreg::FS].base,
        msr::GS_BASE => cpu.s.seg[sreg::GS].base,
        msr::KERNEL_GS_BASE => m.kernel_gs_base,
        msr::TSC_AUX if cpu.model.has(Feature::Rdtscp) => m.tsc_aux,
        msr::KVM_SYSTEM_TIME_NEW | 0x12 if cpu.model.has(Feature::Hypervisor) => m.kvm_system_time,
        msr::KVM_WALL_CLOCK_NEW | 0x11 if cpu.model.has(Feature::Hypervisor) => m.kvm_wall_clock,
        _ => match mtrr_slot(index) {
            Some(MtrrSlot::Variable(n)) => m.mtrr_variable[n],
            Some(MtrrSlot::Fixed(n)) => m.mtrr_fixed[n],
            None if is_inert(cpu, index) => {
                cpu.s.msr.inert.get(&index).copied().unwrap_or_else(|| inert_default(index))
            }
            None => return Err(Exception::GP0),
        },
    })
}

/// WRMSR.
pub fn write(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Exception> {
    if cpu.intercepts.intercept(Event::MsrWrite(index)) == Action::Exit {
        return Ok(());
    }
    match index {
        msr::TSC => {
            let old = cpu.s.msr.tsc_offset;
            let offset = value.wrapping_sub(cpu.io.tsc());
            cpu.s.msr.tsc_adjust = cpu.s.msr.tsc_adjust.wrapping_add(offset.wrapping_sub(old));
            set_tsc_offset(cpu, offset);
        }
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            cpu.cpuid_changed |= index == msr::APIC_BASE;
            return cpu.io.apic_msr_write(cpu.index, index, value).map_err(|_| Exception::GP0);
        }
        msr::TSC_ADJUST if cpu.model.has(Feature::TscAdjust) => {
            let offset = cpu.s.msr.tsc_offset.wrapping_add(value.wrapping_sub(cpu.s.msr.tsc_adjust));
            cpu.s.msr.tsc_adjust = value;
            set_tsc_offset(cpu, offset);
        }
        msr::SPEC_CTRL if cpu.model.spec_ctrl_mask() != 0 => {
            masked(value, cpu.model.spec_ctrl_mask())?;
            cpu.s.msr.spec_ctrl = value;
        }
        msr::PRED_CMD if cpu.model.pred_cmd_mask() != 0 => masked(value, cpu.model.pred_cmd_mask())?,
        msr::SYSENTER_CS => cpu.s.msr.sysenter_cs = value & 0xffff_ffff,
        msr::SYSENTER_ESP => cpu.s.msr.sysenter_esp = canonical(value)?,
        msr::SYSENTER_EIP => cpu.s.msr.sysenter_eip = canonical(value)?,
        msr::MISC_ENABLE if cpu.model.vendor() == Vendor::Intel => cpu.s.msr.misc_enable = value,
        msr::DEBUGCTL => {
            // BTF, LBR and kin are accepted and have no effect. DEVIATION: no branch records, no branch single-step.
            masked(value, 0xffff)?;
            cpu.s.msr.debugctl = value;
        }
        msr::PAT => {
            if value.to_le_bytes().iter().any(|&t| !matches!(t, 0 | 1 | 4..=7)) {
                return Err(Exception::GP0);
            }
            cpu.s.msr.pat = value;
        }
        msr::MTRR_DEF_TYPE => {
            masked(value, 0xcff)?;
            memory_type(value)?;
            cpu.s.msr.mtrr_def_type = value;
        }
        msr::XSS if cpu.model.xss_mask() != 0 || cpu.model.has(Feature::Xsaves) => {
            masked(value, cpu.model.xss_mask())?;
            cpu.s.msr.xss = value;
            cpu.cpuid_changed = true;
        }
        msr::EFER => return write_efer(cpu, value),
        msr::STAR => cpu.s.msr.star = value,
        msr::LSTAR => cpu.s.msr.lstar = canonical(value)?,
        msr::CSTAR => cpu.s.msr.cstar = canonical(value)?,
        msr::SFMASK => cpu.s.msr.sfmask = value & 0xffff_ffff,
        msr::FS_BASE => set_base(cpu, sreg::FS, value)?,
        msr::GS_BASE => set_base(cpu, sreg::GS, value)?,
        msr::KERNEL_GS_BASE => cpu.s.msr.kernel_gs_base = canonical(value)?,
        msr::TSC_AUX if cpu.model.has(Feature::Rdtscp) => {
            masked(value, 0xffff_ffff)?;
            cpu.s.msr.tsc_aux = value;
        }
        msr::KVM_SYSTEM_TIME_NEW | 0x12 if cpu.model.has(Feature::Hypervisor) => {
            cpu.s.msr.kvm_system_time = value;
            super::kvmclock::update_system_time(cpu);
        }
        msr::KVM_WALL_CLOCK_NEW | 0x11 if cpu.model.has(Feature::Hypervisor) => {
            cpu.s.msr.kvm_wall_clock = value;
            super::kvmclock::write_wall_clock(cpu, value);
        }
        _ => return write_other(cpu, index, value),
    }
    Ok(())
}

fn write_other(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Exception> {
    match mtrr_slot(index) {
        Some(MtrrSlot::Variable(n)) => {
            let above = !((1u64 << cpu.model.phys_bits()) - 1);
            if n % 2 == 0 {
                masked(value, !above & !0xf00)?;
                memory_type(value)?;
            } else {
                masked(value, !above & !0x7ff)?;
            }
            cpu.s.msr.mtrr_variable[n] = value;
        }
        Some(MtrrSlot::Fixed(n)) => {
            for t in value.to_le_bytes() {
                memory_type(u64::from(t))?;
            }
            cpu.s.msr.mtrr_fixed[n] = value;
        }
        None if is_amd_counter(cpu, index) => {}
        None if is_inert(cpu, index) => {
            cpu.s.msr.inert.insert(index, value);
        }
        None => return Err(Exception::GP0),
    }
    Ok(())
}

enum MtrrSlot {
    Variable(usize),
    Fixed(usize),
}

fn mtrr_slot(index: u32) -> Option<MtrrSlot> {
    Some(match index {
        0x200..=0x20f => MtrrSlot::Variable((index - 0x200) as usize),
        0x250 => MtrrSlot::Fixed(0),
        0x258 | 0x259 => MtrrSlot::Fixed((index - 0x258) as usize + 1),
        0x268..=0x26f => MtrrSlot::Fixed((index - 0x268) as usize + 3),
        _ => return None,
    })
}

/// Memory types of MTRRs (SDM 3A table 11-8).
fn memory_type(value: u64) -> Result<(), Exception> {
    if matches!(value & 0xff, 0 | 1 | 4..=6) { Ok(()) } else { Err(Exception::GP0) }
}

fn is_inert(cpu: &Cpu, index: u32) -> bool {
    let of_vendor = if cpu.model.vendor() == Vendor::Intel { INERT_INTEL } else { INERT_AMD };
    // Machine-check banks 0 to 31: MCG_CAP announces none, but some kernels write them unasked.
    INERT_ALL.contains(&index) || of_vendor.contains(&index) || (0x400..0x480).contains(&index)
}

fn is_amd_counter(cpu: &Cpu, index: u32) -> bool {
    cpu.model.vendor() == Vendor::Amd && AMD_COUNTERS.contains(&index)
}

fn inert_default(index: u32) -> u64 {
    match index {
        // FEATURE_CONTROL is locked, with VMX off.
        0x3a => 1,
        // TscFreqSel: the TSC counts at P0's frequency (APM: HWCR bit 24).
        msr::HWCR => 1 << 24,
        // SVM is disabled and locked.
        msr::VM_CR => 0x18,
        _ => 0,
    }
}

fn masked(value: u64, mask: u64) -> Result<(), Exception> {
    if value & !mask == 0 { Ok(()) } else { Err(Exception::GP0) }
}

fn canonical(value: u64) -> Result<u64, Exception> {
    if is_canonical(value) { Ok(value) } else { Err(Exception::GP0) }
}

/// WRMSR of FS_BASE, GS_BASE, WRFSBASE, WRGSBASE.
pub fn set_base(cpu: &mut Cpu, reg: usize, value: u64) -> Result<(), Exception> {
    cpu.s.seg[reg].base = canonical(value)?;
    cpu.seg_base[reg] = value;
    Ok(())
}

/// The guest's time-stamp counter is the clock's plus `offset` from now on.
pub fn set_tsc_offset(cpu: &mut Cpu, offset: u64) {
    cpu.s.msr.tsc_offset = offset;
    cpu.io.tsc_offset_changed(cpu.index, offset);
    super::kvmclock::update_system_time(cpu);
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let old = cpu.s.msr.efer;
    let settable = cpu.model.efer_mask() | efer::LMA;
    if value & !settable != 0 || (old ^ value) & efer::LME != 0 && cpu.s.cr0 & cr0::PG != 0 {
        return Err(Exception::GP0);
    }
    cpu.s.msr.efer = value & !efer::LMA | old & efer::LMA;
    cpu.derive_paging();
    if (old ^ value) & efer::NXE != 0 {
        cpu.tlb.flush_all();
    }
    Ok(())
}
