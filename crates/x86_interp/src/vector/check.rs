//! What must hold before an instruction of this module executes: the exceptions of SDM 1 11.8.1 / 14.x classes that
//! come from control registers and the mode, in the order of SDM 3A table 6-2 (#UD, then #NM, then #MF).

use x86::Exception;
use x86::bits::{cr0, cr4};

use super::{Control, VectorCpu, layout};

/// By what an instruction is gated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// Nothing: POPCNT, CRC32, MOVNTI, ….
    Free,
    /// VEX without vector state (BMI1, BMI2): protected mode only.
    VexGpr,
    /// x87 that waits for pending exceptions.
    X87,
    /// x87 that does not (FNSTSW, FNINIT, …).
    X87NoWait,
    /// WAIT: CR0.TS counts only with CR0.MP.
    Wait,
    /// MMX registers, no XMM.
    Mmx,
    /// Legacy SSE.
    Sse,
    /// Legacy SSE with an MMX operand: an x87 exception pending counts too.
    SseMmx,
    /// VEX: XCR0\[2:1\].
    Vex,
    /// EVEX, and VEX on opmask registers: XCR0\[7:5\] and \[2:1\].
    Evex,
    /// FXSAVE, FXRSTOR.
    Fxsave,
    /// The XSAVE family.
    Xsave,
}

const fn require(holds: bool, otherwise: Exception) -> Result<(), Exception> {
    if holds { Ok(()) } else { Err(otherwise) }
}

fn no_task_switched(c: &Control) -> Result<(), Exception> {
    require(c.cr0 & cr0::TS == 0, Exception::NM)
}

/// DEVIATION: with CR0.NE = 0 a PC reports x87 errors by FERR# and IRQ 13 (SDM 3A 2.5). We raise #MF either way; only
/// systems of the 1980s that handle IRQ 13 would notice.
fn no_x87_pending<C: VectorCpu>(cpu: &mut C) -> Result<(), Exception> {
    require(!layout::x87_pending(cpu.fpu()), Exception::MF)
}

/// Raises what control registers and mode demand.
#[inline]
pub(super) fn check<C: VectorCpu>(class: Class, cpu: &mut C) -> Result<(), Exception> {
    if class == Class::Free {
        return Ok(());
    }
    let c = cpu.control();
    match class {
        Class::Sse | Class::SseMmx => {
            if c.cr0 & (cr0::EM | cr0::TS) == 0 && c.cr4 & cr4::OSFXSR != 0 && class == Class::Sse {
                return Ok(());
            }
            require(c.cr0 & cr0::EM == 0 && c.cr4 & cr4::OSFXSR != 0, Exception::UD)?;
            no_task_switched(&c)?;
            if class == Class::SseMmx { no_x87_pending(cpu) } else { Ok(()) }
        }
        Class::Vex => vex(&c, 6),
        Class::Evex => vex(&c, 0xe6),
        _ => rare(class, &c, cpu),
    }
}

#[inline]
fn vex(c: &Control, components: u64) -> Result<(), Exception> {
    let enabled = c.cr4 & cr4::OSXSAVE != 0 && c.xcr0 & components == components;
    require(enabled && !c.real_or_v86, Exception::UD)?;
    no_task_switched(c)
}

fn rare<C: VectorCpu>(class: Class, c: &Control, cpu: &mut C) -> Result<(), Exception> {
    match class {
        Class::VexGpr => require(!c.real_or_v86, Exception::UD),
        Class::X87 => {
            require(c.cr0 & (cr0::EM | cr0::TS) == 0, Exception::NM)?;
            no_x87_pending(cpu)
        }
        Class::X87NoWait | Class::Fxsave => require(c.cr0 & (cr0::EM | cr0::TS) == 0, Exception::NM),
        Class::Wait => {
            require(c.cr0 & (cr0::MP | cr0::TS) != cr0::MP | cr0::TS, Exception::NM)?;
            no_x87_pending(cpu)
        }
        Class::Mmx => {
            require(c.cr0 & cr0::EM == 0, Exception::UD)?;
            no_task_switched(c)?;
            no_x87_pending(cpu)
        }
        Class::Xsave => {
            require(c.cr4 & cr4::OSXSAVE != 0, Exception::UD)?;
            no_task_switched(c)
        }
        Class::Free | Class::Sse | Class::SseMmx | Class::Vex | Class::Evex => Ok(()),
    }
}
