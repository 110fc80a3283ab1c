//! I/O ports: permission (SDM 1 19.5) and access.

use engine::Cause;
use x86::Exception;

use crate::cpu::Cpu;
use crate::intercept::{Action, Event};

/// Whether the running code may access `size` ports from `port`; breakpoints on I/O are noted.
pub fn check(cpu: &mut Cpu, port: u16, size: u8) -> Result<(), Exception> {
    if cpu.s.protected() && (cpu.s.v86() || cpu.cpl() > cpu.iopl()) {
        check_bitmap(cpu, port, size)?;
    }
    debug_io(cpu, port, size);
    if cpu.intercepts.intercept(Event::Port(port)) == Action::Exit {
        return Err(Exception::GP0);
    }
    Ok(())
}

fn check_bitmap(cpu: &mut Cpu, port: u16, size: u8) -> Result<(), Exception> {
    let tr = cpu.s.tr;
    let is_386 = tr.attr.present() && tr.attr.typ() & 8 != 0;
    let limit = u64::from(tr.limit);
    if !is_386 || limit < 0x67 {
        return Err(Exception::GP0);
    }
    let map: u16 = cpu.system_read(tr.base.wrapping_add(0x66))?;
    let at = u64::from(map) + u64::from(port / 8);
    // Two bytes are always read, so both must lie within the limit.
    if at + 1 > limit {
        return Err(Exception::GP0);
    }
    let bits: u16 = cpu.system_read(tr.base.wrapping_add(at))?;
    let mask = ((1u16 << size) - 1) << (port & 7);
    if bits & mask != 0 { Err(Exception::GP0) } else { Ok(()) }
}

/// I/O breakpoints (SDM 3B 17.2.4, CR4.DE).
fn debug_io(cpu: &mut Cpu, port: u16, size: u8) {
    if cpu.s.dr7 & x86::bits::dr::DR7_ENABLES == 0 || cpu.s.cr4 & x86::bits::cr4::DE == 0 {
        return;
    }
    for i in 0..4u32 {
        let dr7 = cpu.s.dr7;
        if dr7 >> (2 * i) & 3 == 0 || dr7 >> (16 + 4 * i) & 3 != 2 {
            continue;
        }
        let len = [1u64, 2, 8, 4][(dr7 >> (18 + 4 * i) & 3) as usize];
        let start = cpu.s.dr[i as usize] & !(len - 1);
        let port = u64::from(port);
        if port < start.wrapping_add(len) && start < port + u64::from(size) {
            cpu.pending_debug |= 1 << i;
        }
    }
}

/// IN, after [`check`].
pub fn port_in(cpu: &mut Cpu, port: u16, size: u8) -> u32 {
    let span = cpu.stats.begin(Cause::PortRead);
    let value = cpu.io.port_in(cpu.index, port, size);
    cpu.stats.end(Cause::PortRead, span);
    value
}

/// OUT, after [`check`].
pub fn port_out(cpu: &mut Cpu, port: u16, size: u8, value: u32) {
    let span = cpu.stats.begin(Cause::PortWrite);
    cpu.io.port_out(cpu.index, port, size, value);
    cpu.stats.end(Cause::PortWrite, span);
}
