//! CLI, STI, PUSHF, POPF, CLAC, STAC (SDM 2).

use x86::Exception;
use x86::bits::{cr4, rflags};
use x86::state::InterruptShadow;

use super::interrupt::{vme, writable_flags};
use super::v86;
use crate::cpu::{Cpu, Step, Stop};
use crate::ops::{W16, W32, W64};

/// Whether IF itself may be changed; Ok(false): VIF instead.
fn may_change_if(cpu: &Cpu) -> Result<bool, Exception> {
    if !cpu.s.protected() || cpu.cpl() <= cpu.iopl() {
        return Ok(true);
    }
    let virtual_if = if cpu.s.v86() { vme(cpu) } else { cpu.cpl() == 3 && cpu.s.cr4 & cr4::PVI != 0 };
    if virtual_if { Ok(false) } else { Err(Exception::GP0) }
}

/// CLI.
pub fn cli(cpu: &mut Cpu) -> Step {
    let flag = if may_change_if(cpu)? { rflags::IF } else { rflags::VIF };
    cpu.system_flags &= !flag;
    cpu.derive_poll_mask();
    Ok(())
}

/// STI: interrupts are taken after the next instruction.
pub fn sti(cpu: &mut Cpu) -> Step {
    if !may_change_if(cpu)? {
        if cpu.system_flag(rflags::VIP) {
            return Err(Exception::GP0.into());
        }
        cpu.system_flags |= rflags::VIF;
        return Ok(());
    }
    if cpu.system_flag(rflags::IF) {
        return Ok(());
    }
    cpu.system_flags |= rflags::IF;
    cpu.s.shadow = InterruptShadow::Sti;
    cpu.derive_poll_mask();
    Err(Stop::Resync)
}

/// PUSHF, PUSHFD, PUSHFQ.
pub fn pushf(cpu: &mut Cpu, size: u64) -> Step {
    let mut image = cpu.rflags() & !(rflags::VM | rflags::RF);
    if cpu.s.v86() && cpu.iopl() < 3 {
        if !(vme(cpu) && size == 2) {
            return Err(Exception::GP0.into());
        }
        let vif = if image & rflags::VIF != 0 { rflags::IF } else { 0 };
        image = image & !rflags::IF | vif | rflags::IOPL;
    }
    match size {
        2 => cpu.push::<W16>(image)?,
        4 => cpu.push::<W32>(image)?,
        _ => cpu.push::<W64>(image)?,
    }
    cpu.wrote()
}

/// POPF, POPFD, POPFQ.
pub fn popf(cpu: &mut Cpu, size: u64) -> Step {
    let virtual_if = cpu.s.v86() && cpu.iopl() < 3;
    if virtual_if && !(vme(cpu) && size == 2) {
        return Err(Exception::GP0.into());
    }
    let image = match size {
        2 => cpu.peek::<W16>(0)?,
        4 => cpu.peek::<W32>(0)?,
        _ => cpu.peek::<W64>(0)?,
    };
    let value = if cpu.s.v86() {
        v86::popped_flags(cpu, image, size, virtual_if)? & !rflags::RF
    } else {
        let mask = writable_flags(cpu, size);
        let mut value = cpu.rflags() & !mask | image & mask;
        if size > 2 {
            value &= !rflags::RF;
        }
        value
    };
    cpu.drop_stack(size);
    cpu.set_rflags(value);
    // Interrupts, single step and alignment checks may begin here.
    Err(Stop::Resync)
}

/// CLAC and STAC.
pub fn set_ac(cpu: &mut Cpu, set: bool) -> Step {
    if cpu.cpl() != 0 || cpu.s.v86() {
        return Err(Exception::UD.into());
    }
    if set {
        cpu.system_flags |= rflags::AC;
    } else {
        cpu.system_flags &= !rflags::AC;
    }
    cpu.derive_variant();
    Ok(())
}
