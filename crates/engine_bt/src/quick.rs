//! Instructions that do nothing but reach a device ([`bt::lower::Touch`]): done here, on the frame, without the interpreter's copy of the registers
//! and without its decoded code.
//!
//! INV-QUICK-1: only at level 0, where no permission map is asked, and only what cannot fault is done here; all else is the interpreter's. Behind it
//! translated code goes on only if the interpreter would have gone on, too: no signal waits that could be acted on, no code or translation changed, and
//! the vCPU still runs. Else the guest's state becomes the interpreter's, behind the instruction.

use bt::{Touch, frame};
use engine::Cause;
use x86::bits::msr;
use x86::paging::{Access, AccessKind};
use x86::state::Activity;
use x86_interp::cpu::Cpu;
use x86_interp::memory::Target;
use x86_interp::system::{self, io};

use crate::cache::PlacedSite;
use crate::callout::behind;
use crate::exec::Frame;
use crate::{BtVcpu, legacy, state};

/// Bytes of a move at most.
const WIDEST: usize = 8;

/// General register `number` of the frame.
fn register(frame: &Frame, number: u8) -> u64 {
    frame.get(frame::GPR + 8 * i32::from(number))
}

/// Writes the low `width` bytes of a register; 4 clear the rest (SDM 1 3.4.1.1).
fn set_register(frame: &Frame, number: u8, width: u8, value: u64) {
    let at = frame::GPR + 8 * i32::from(number);
    let new = match width {
        1 => frame.get(at) & !0xff | value & 0xff,
        2 => frame.get(at) & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    frame.set(at, new);
}

/// RAX, RCX, RDX.
const ACCUMULATOR: u8 = 0;
const COUNTER: u8 = 1;
const DATA: u8 = 2;

/// The port that an instruction names, or that in DX.
#[expect(clippy::cast_possible_truncation, reason = "DX")]
fn port_of(frame: &Frame, port: Option<u8>) -> u16 {
    port.map_or_else(|| register(frame, DATA) as u16, u16::from)
}

/// The register that RDMSR and WRMSR are about, if it is the local APIC's, or one of those of SYSCALL and SYSENTER: nothing but the register itself depends
/// on those, and what the frame has of it.
#[expect(clippy::cast_possible_truncation, reason = "ECX")]
fn msr_of(frame: &Frame) -> Option<u32> {
    let index = register(frame, COUNTER) as u32;
    let known = matches!(
        index,
        msr::TSC_DEADLINE | msr::X2APIC_FIRST
            ..=msr::X2APIC_LAST
                | msr::STAR
                | msr::LSTAR
                | msr::CSTAR
                | msr::SFMASK
                | msr::SYSENTER_CS
                | msr::SYSENTER_ESP
                | msr::SYSENTER_EIP
                | msr::TSC_AUX
    );
    known.then_some(index)
}

/// Does a touch; `direct`: the address and the bytes of its memory operand. None: it was not done.
#[expect(clippy::cast_possible_truncation, reason = "OUT writes EAX")]
fn touch(cpu: &mut Cpu, frame: &Frame, touch: Touch, direct: Option<(u64, usize)>) -> Option<()> {
    match touch {
        Touch::PortRead { port, size } => {
            let value = io::port_in(cpu, port_of(frame, port), size);
            set_register(frame, ACCUMULATOR, size, u64::from(value));
        }
        Touch::PortWrite { port, size } => {
            io::port_out(cpu, port_of(frame, port), size, register(frame, ACCUMULATOR) as u32);
        }
        Touch::MsrRead => {
            let index = msr_of(frame)?;
            let value = counted(cpu, Cause::Msr, |cpu| system::msr::read(cpu, index)).ok()?;
            set_register(frame, ACCUMULATOR, 4, value);
            set_register(frame, DATA, 4, value >> 32);
        }
        Touch::MsrWrite => {
            let index = msr_of(frame)?;
            let value = register(frame, DATA) << 32 | register(frame, ACCUMULATOR) & 0xffff_ffff;
            counted(cpu, Cause::Msr, |cpu| system::msr::write(cpu, index, value)).ok()?;
            state::fill_system_calls(cpu, frame);
        }
        Touch::PriorityRead(to) => {
            let value = counted(cpu, Cause::ControlRegister, |cpu| cpu.io.cr8(cpu.index));
            set_register(frame, to, 8, value);
        }
        Touch::PriorityWrite(from) => {
            let value = register(frame, from);
            if value > 15 {
                return None;
            }
            counted(cpu, Cause::ControlRegister, |cpu| cpu.io.set_cr8(cpu.index, value));
        }
        Touch::Load { to, width } => {
            let mut data = [0; WIDEST];
            let (gpa, data_of) = device(cpu, direct?, AccessKind::Read)?;
            counted(cpu, Cause::MmioRead, |cpu| cpu.io.mmio_read(cpu.index, gpa, &mut data[..data_of]));
            set_register(frame, to, width, u64::from_le_bytes(data));
        }
        Touch::Store(from) => {
            let data = register(frame, from).to_le_bytes();
            let (gpa, data_of) = device(cpu, direct?, AccessKind::Write)?;
            counted(cpu, Cause::MmioWrite, |cpu| cpu.io.mmio_write(cpu.index, gpa, &data[..data_of]));
        }
    }
    Some(())
}

/// Asks the devices, and counts it.
fn counted<T>(cpu: &mut Cpu, cause: Cause, ask: impl FnOnce(&mut Cpu) -> T) -> T {
    let span = cpu.stats.begin(cause);
    let answer = ask(cpu);
    cpu.stats.end(cause, span);
    answer
}

/// The device address of an operand within a page, and its size, if a device is what is there.
fn device(cpu: &mut Cpu, (la, size): (u64, usize), kind: AccessKind) -> Option<(x86::addr::Gpa, usize)> {
    if size > WIDEST || la & 0xfff > 4096 - size as u64 || !x86::bits::is_canonical(la) {
        return None;
    }
    let access = Access { kind, ..cpu.data_access(kind) };
    let cr2 = cpu.s.cr2;
    let target = cpu.resolve(la, access);
    // A fault, if it is one, is found again by the interpreter.
    cpu.s.cr2 = cr2;
    match target {
        Ok(Target::Device(gpa)) => Some((gpa, size)),
        _ => None,
    }
}

impl BtVcpu {
    /// Does the instruction of a site if it only reaches a device. The action (`crate::exec::action`), or None: nothing was done.
    /// The interpreter knows the mode.
    pub(crate) fn quick(&mut self, placed: &PlacedSite) -> Option<u64> {
        let wanted = placed.site.touch.filter(|_| self.knobs.helpers)?;
        let direct = match placed.site.kind {
            bt::SiteKind::Direct { size, .. } => Some((self.frame.get(frame::ADDRESS), usize::from(size))),
            _ => None,
        };
        if self.interp.cpu().s.cpl != 0 {
            return None;
        }
        touch(self.interp.cpu(), &self.frame, wanted, direct)?;
        self.bt.callouts += 1;
        self.bt.quick += 1;
        let changed = self.apply_events();
        let cpu = self.interp.cpu();
        if !changed && !cpu.code_changed && !cpu.poll() && cpu.s.activity == Activity::Running {
            return Some(behind(&placed.site));
        }
        let next = self.site_rip(placed).wrapping_add(u64::from(placed.site.len));
        let cpu = self.interp.cpu();
        state::read(cpu, &self.frame);
        cpu.rip = legacy::pointer(cpu, next);
        Some(self.go_on())
    }
}
