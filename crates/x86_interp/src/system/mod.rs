//! System instructions: the only place where their meaning is written. Every engine's callouts come here for one
//! instruction.

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

pub mod control;
pub mod far;
pub mod flags;
pub mod frame;
pub mod interrupt;
pub mod io;
pub mod kvmclock;
pub mod msr;
pub mod segment;
pub mod syscall;
pub mod tables;
pub mod task;
pub mod v86;

use engine::Cause;
use guestmem::Scalar;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use x86::Exception;
use x86::bits::{cr0, cr4};
use x86::cpuid::CpuidContext;
use x86::cpuid::Feature;
use x86::state::{Activity, InterruptShadow, sreg};

use crate::cpu::{CodeSize, Cpu, FLAT, FLAT_STACK, PAGE_RIP, Step, Stop, ZERO};
use crate::intercept::{Action, Event, Sensitive};
use crate::ops::{Op, W8, W16, W32, W64, Width};
use interrupt::Source;

/// Executes one system instruction. `cpu.rip` is the next instruction's, `cpu.start_rip` its own. `Ok` falls through with
/// nothing changed that the decoded run depends on.
pub fn execute(cpu: &mut Cpu, i: &Instruction, op: &Op) -> Step {
    let result = dispatch(cpu, i, op);
    if let Err(Stop::Fault(_)) = result {
        cpu.rip = cpu.start_rip;
    }
    result
}

/// The instruction is complete and a new run starts at `cpu.rip`.
fn resync(result: Result<(), Exception>) -> Step {
    result?;
    Err(Stop::Resync)
}

fn dispatch(cpu: &mut Cpu, i: &Instruction, op: &Op) -> Step {
    if let Some(census) = &mut cpu.census {
        census.executes(i);
    }
    use Mnemonic as M;
    match i.mnemonic() {
        M::Cli => flags::cli(cpu),
        M::Sti => flags::sti(cpu),
        M::Pushf => flags::pushf(cpu, 2),
        M::Pushfd => flags::pushf(cpu, 4),
        M::Pushfq => flags::pushf(cpu, 8),
        M::Popf => flags::popf(cpu, 2),
        M::Popfd => flags::popf(cpu, 4),
        M::Popfq => flags::popf(cpu, 8),
        M::Clac => flags::set_ac(cpu, false),
        M::Stac => flags::set_ac(cpu, true),

        M::In => port_in(cpu, i),
        M::Out => port_out(cpu, i),

        M::Mov => move_special(cpu, i),
        M::Push => push_segment(cpu, i),
        M::Pop => pop_segment(cpu, i),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => load_far_pointer(cpu, i),

        M::Jmp => resync(far_pointer(cpu, i).and_then(|(s, o)| far::jmp(cpu, s, o))),
        M::Call => resync(far_pointer(cpu, i).and_then(|(s, o)| far::call(cpu, s, o, far_size(i)))),
        M::Retf => {
            let extra = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
            resync(far::ret(cpu, far_size(i), extra))
        }
        M::Iret => iret(cpu, 2),
        M::Iretd => iret(cpu, 4),
        M::Iretq => iret(cpu, 8),

        M::Int => resync(interrupt::software_interrupt(cpu, i.immediate8(), Source::Software)),
        M::Int3 => resync(interrupt::software_interrupt(cpu, 3, Source::SoftwareException)),
        M::Int1 => {
            // INT1 sets no bit of DR6 (SDM 2A INT1).
            resync(interrupt::software_interrupt(cpu, 1, Source::External))
        }
        M::Into if cpu.flags.of() => resync(interrupt::software_interrupt(cpu, 4, Source::SoftwareException)),
        M::Into => Ok(()),

        M::Syscall => resync(syscall::syscall(cpu)),
        M::Sysret | M::Sysretq => resync(syscall::sysret(cpu, matches!(i.code(), Code::Sysretq))),
        M::Sysenter => resync(syscall::sysenter(cpu)),
        M::Sysexit | M::Sysexitq => resync(syscall::sysexit(cpu, matches!(i.code(), Code::Sysexitq))),

        M::Rdmsr => rdmsr(cpu),
        M::Wrmsr => wrmsr(cpu),
        M::Rdtsc => rdtsc(cpu, false),
        M::Rdtscp => rdtsc(cpu, true),
        M::Rdpid => {
            let value = cpu.s.msr.tsc_aux;
            set_register(cpu, i, value);
            Ok(())
        }
        M::Rdpmc => privileged(cpu, cpu.s.cr4 & cr4::PCE == 0).and(Err(Exception::GP0.into())),
        M::Swapgs => swapgs(cpu),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => segment_base(cpu, i),

        M::Lgdt | M::Lidt => load_table(cpu, i, op),
        M::Sgdt | M::Sidt => store_table(cpu, i),
        M::Lldt | M::Ltr => load_system_segment(cpu, i),
        M::Sldt | M::Str | M::Smsw => store_system_word(cpu, i),
        M::Lmsw => lmsw(cpu, i),
        M::Lar | M::Lsl => inspect(cpu, i),
        M::Verr | M::Verw => verify(cpu, i),
        M::Clts => {
            privileged(cpu, true)?;
            cpu.s.cr0 &= !cr0::TS;
            Ok(())
        }
        M::Invlpg => invlpg(cpu, i),
        M::Invpcid => invpcid(cpu, i),
        M::Invd | M::Wbinvd | M::Wbnoinvd => privileged(cpu, true),
        M::Xgetbv => xgetbv(cpu),
        M::Xsetbv => xsetbv(cpu),

        M::Cpuid => cpuid(cpu),
        M::Hlt => halt(cpu),
        M::Monitor => monitor(cpu),
        M::Mwait => mwait(cpu),
        M::Pause | M::Lfence | M::Mfence | M::Sfence | M::Wait | M::Serialize => fence(cpu, i),
        M::Clflush | M::Clflushopt | M::Clwb => cache_line(cpu, i),
        M::Clzero => clzero(cpu, i),
        M::Vmcall | M::Vmmcall => resync(kvmclock::hypercall(cpu)),
        M::Rdrand | M::Rdseed => random(cpu, i),
        _ => Err(Exception::UD.into()),
    }
}

/// #GP(0) outside of level 0, if `needed`.
fn privileged(cpu: &Cpu, needed: bool) -> Step {
    if needed && cpu.cpl() != 0 && cpu.s.protected() { Err(Exception::GP0.into()) } else { Ok(()) }
}

/// Asks the intercept hook for an instruction of its own.
fn intercepted(cpu: &Cpu, what: Sensitive) -> bool {
    cpu.intercepts.intercept(Event::Instruction(what)) == Action::Exit
}

// ---- operands ---------------------------------------------------------------------------------------------------

/// Segment index and offset of the memory operand, and the address mask.
pub fn memory_operand(cpu: &Cpu, i: &Instruction) -> (u8, u64, u64) {
    let number = |r: Register| match r {
        Register::None => ZERO,
        _ if r.is_ip() => PAGE_RIP,
        _ => r.full_register().number() as u8,
    };
    let (base, index) = (i.memory_base(), i.memory_index());
    let sized = if base == Register::None { index } else { base };
    let bits = match sized {
        Register::None => i.memory_displ_size() * 8,
        r => r.size() as u32 * 8,
    };
    let mask = match bits {
        16 => 0xffff,
        32 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let ea = cpu.gpr[usize::from(number(base))]
        .wrapping_add(cpu.gpr[usize::from(number(index))].wrapping_mul(u64::from(i.memory_index_scale())))
        .wrapping_add(i.memory_displacement64())
        & mask;
    (segment_index(cpu, i.memory_segment()), ea, mask)
}

fn segment_index(cpu: &Cpu, r: Register) -> u8 {
    let long = cpu.code_size == CodeSize::Bits64;
    match r {
        Register::FS => 4,
        Register::GS => 5,
        Register::SS if long => FLAT_STACK,
        _ if long => FLAT,
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        _ => 3,
    }
}

fn segment_register(r: Register) -> Option<usize> {
    Some(match r {
        Register::ES => sreg::ES,
        Register::CS => sreg::CS,
        Register::SS => sreg::SS,
        Register::DS => sreg::DS,
        Register::FS => sreg::FS,
        Register::GS => sreg::GS,
        _ => return None,
    })
}

/// Sets the general register that is operand 0, in its size.
fn set_register(cpu: &mut Cpu, i: &Instruction, value: u64) {
    let n = i.op0_register().full_register().number() as u8;
    match i.op0_register().size() {
        2 => W16::set(cpu, n, value),
        4 => W32::set(cpu, n, value),
        _ => W64::set(cpu, n, value),
    }
}

/// The value of a general register operand in its size.
fn register_value(cpu: &Cpu, r: Register) -> u64 {
    let n = r.full_register().number() as u8;
    match r.size() {
        2 => W16::get(cpu, n),
        4 => W32::get(cpu, n),
        _ => W64::get(cpu, n),
    }
}

/// A 16-bit source operand `n`.
fn word_operand(cpu: &mut Cpu, i: &Instruction, n: u32) -> Result<u16, Exception> {
    if i.op_kind(n) == OpKind::Memory {
        let (seg, ea, _) = memory_operand(cpu, i);
        return cpu.read(seg, ea);
    }
    Ok(register_value(cpu, i.op_register(n)) as u16)
}

/// Stores a system word: 16 bits to memory, the whole operand size to a register.
fn store_word(cpu: &mut Cpu, i: &Instruction, value: u64) -> Step {
    if i.op0_kind() == OpKind::Memory {
        let (seg, ea, _) = memory_operand(cpu, i);
        cpu.write(seg, ea, value as u16)?;
        return cpu.wrote();
    }
    set_register(cpu, i, value);
    Ok(())
}

// ---- I/O ----------------------------------------------------------------------------------------------------------

fn port_operand(cpu: &Cpu, i: &Instruction, n: u32) -> u16 {
    if i.op_kind(n) == OpKind::Immediate8 { u16::from(i.immediate8()) } else { cpu.gpr[2] as u16 }
}

fn port_in(cpu: &mut Cpu, i: &Instruction) -> Step {
    let port = port_operand(cpu, i, 1);
    let size = i.op0_register().size() as u8;
    io::check(cpu, port, size)?;
    let value = u64::from(io::port_in(cpu, port, size));
    match size {
        1 => W8::set(cpu, 0, value),
        2 => W16::set(cpu, 0, value),
        _ => W32::set(cpu, 0, value),
    }
    poll_after_io(cpu)
}

fn port_out(cpu: &mut Cpu, i: &Instruction) -> Step {
    let port = port_operand(cpu, i, 0);
    let size = i.op1_register().size() as u8;
    io::check(cpu, port, size)?;
    let value = cpu.gpr[0] as u32;
    io::port_out(cpu, port, size, value);
    poll_after_io(cpu)
}

/// A device may have raised an interrupt, stopped the machine or saved it: look before the next instruction.
fn poll_after_io(cpu: &Cpu) -> Step {
    if cpu.poll() { Err(Stop::Resync) } else { Ok(()) }
}

// ---- segments, control and debug registers ------------------------------------------------------------------------------

fn move_special(cpu: &mut Cpu, i: &Instruction) -> Step {
    let (to, from) = (i.op0_register(), i.op1_register());
    if i.op0_kind() == OpKind::Register && to.is_segment_register() {
        let Some(reg) = segment_register(to).filter(|&r| r != sreg::CS) else {
            return Err(Exception::UD.into());
        };
        let selector = word_operand(cpu, i, 1)?;
        return finish_segment_load(cpu, reg, selector);
    }
    if let Some(reg) = segment_register(from) {
        let selector = u64::from(cpu.s.seg[reg].selector);
        return store_word(cpu, i, selector);
    }
    privileged(cpu, true)?;
    if from.is_cr() || from.is_dr() {
        let n = from.number() as u8;
        let value = if from.is_cr() { control::read_cr(cpu, n)? } else { control::read_dr(cpu, n)? };
        set_register(cpu, i, value);
        return Ok(());
    }
    let value = register_value(cpu, from);
    let n = to.number() as u8;
    if to.is_cr() {
        return resync(control::write_cr(cpu, n, value));
    }
    if to.is_dr() {
        return resync(control::write_dr(cpu, n, value));
    }
    Err(Exception::UD.into())
}

/// Loads a segment register; after SS, interrupts and debug traps wait for one instruction.
fn finish_segment_load(cpu: &mut Cpu, reg: usize, selector: u16) -> Step {
    cpu.load_segment(reg, selector)?;
    if reg == sreg::SS {
        cpu.s.shadow = InterruptShadow::MovSs;
        cpu.derive_poll_mask();
        return Err(Stop::Resync);
    }
    Ok(())
}

fn push_segment(cpu: &mut Cpu, i: &Instruction) -> Step {
    let Some(reg) = segment_register(i.op0_register()) else { return Err(Exception::UD.into()) };
    let selector = u64::from(cpu.s.seg[reg].selector);
    // With a 32- or 64-bit operand size current processors write 16 bits and leave the rest of the slot (SDM 2B PUSH).
    match i.stack_pointer_increment() {
        -2 => cpu.push::<W16>(selector)?,
        -4 => {
            let to = cpu.stack_pointer().wrapping_sub(4) & cpu.stack_mask;
            cpu.write(cpu.stack_segment(), to, selector as u16)?;
            cpu.set_stack_pointer(to);
        }
        _ => cpu.push::<W64>(selector)?,
    }
    cpu.wrote()
}

fn pop_segment(cpu: &mut Cpu, i: &Instruction) -> Step {
    let Some(reg) = segment_register(i.op0_register()) else { return Err(Exception::UD.into()) };
    let size = i.stack_pointer_increment().unsigned_abs();
    let selector = match size {
        2 => cpu.peek::<W16>(0)?,
        4 => cpu.peek::<W32>(0)?,
        _ => cpu.peek::<W64>(0)?,
    };
    // The stack pointer moves in the size of the old stack.
    let sp = cpu.stack_pointer().wrapping_add(u64::from(size));
    let mask = cpu.stack_mask;
    cpu.load_segment(reg, selector as u16)?;
    cpu.gpr[4] = cpu.gpr[4] & !mask | sp & mask;
    if reg == sreg::SS {
        cpu.s.shadow = InterruptShadow::MovSs;
        cpu.derive_poll_mask();
        return Err(Stop::Resync);
    }
    Ok(())
}

fn load_far_pointer(cpu: &mut Cpu, i: &Instruction) -> Step {
    let reg = match i.mnemonic() {
        Mnemonic::Lds => sreg::DS,
        Mnemonic::Les => sreg::ES,
        Mnemonic::Lfs => sreg::FS,
        Mnemonic::Lgs => sreg::GS,
        _ => sreg::SS,
    };
    let size = i.op0_register().size() as u64;
    let (selector, offset) = read_far_pointer(cpu, i, size)?;
    cpu.load_segment(reg, selector)?;
    set_register(cpu, i, offset);
    if reg == sreg::SS { Err(Stop::Resync) } else { Ok(()) }
}

fn read_far_pointer(cpu: &mut Cpu, i: &Instruction, size: u64) -> Result<(u16, u64), Exception> {
    let (seg, ea, mask) = memory_operand(cpu, i);
    let offset = match size {
        2 => cpu.read::<u16>(seg, ea)?.to_u64(),
        4 => cpu.read::<u32>(seg, ea)?.to_u64(),
        _ => cpu.read::<u64>(seg, ea)?,
    };
    let selector = cpu.read(seg, ea.wrapping_add(size) & mask)?;
    Ok((selector, offset))
}

// ---- far transfers ---------------------------------------------------------------------------------------------------------

/// Operand size in bytes of a far transfer.
fn far_size(i: &Instruction) -> u64 {
    match i.code() {
        Code::Call_ptr1616
        | Code::Call_m1616
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Jmp_m1616
        | Code::Jmp_ptr1616 => 2,
        Code::Call_m1664 | Code::Retfq | Code::Retfq_imm16 | Code::Jmp_m1664 => 8,
        _ => 4,
    }
}

fn far_pointer(cpu: &mut Cpu, i: &Instruction) -> Result<(u16, u64), Exception> {
    match i.op0_kind() {
        OpKind::FarBranch16 => Ok((i.far_branch_selector(), u64::from(i.far_branch16()))),
        OpKind::FarBranch32 => Ok((i.far_branch_selector(), u64::from(i.far_branch32()))),
        OpKind::Memory => read_far_pointer(cpu, i, far_size(i)),
        _ => Err(Exception::UD),
    }
}

fn iret(cpu: &mut Cpu, size: u64) -> Step {
    if intercepted(cpu, Sensitive::Iret) {
        return Err(Stop::Resync);
    }
    resync(interrupt::iret(cpu, size))
}

// ---- MSRs, TSC, bases ---------------------------------------------------------------------------------------------------------

fn rdmsr(cpu: &mut Cpu) -> Step {
    privileged(cpu, true)?;
    let span = cpu.stats.begin(Cause::Msr);
    let value = msr::read(cpu, cpu.gpr[1] as u32);
    cpu.stats.end(Cause::Msr, span);
    let value = value?;
    W32::set(cpu, 0, value);
    W32::set(cpu, 2, value >> 32);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu) -> Step {
    privileged(cpu, true)?;
    let span = cpu.stats.begin(Cause::Msr);
    let value = W32::get(cpu, 2) << 32 | W32::get(cpu, 0);
    let result = msr::write(cpu, cpu.gpr[1] as u32, value);
    cpu.stats.end(Cause::Msr, span);
    resync(result)
}

fn rdtsc(cpu: &mut Cpu, with_aux: bool) -> Step {
    let _ = intercepted(cpu, if with_aux { Sensitive::Rdtscp } else { Sensitive::Rdtsc });
    privileged(cpu, cpu.s.cr4 & cr4::TSD != 0)?;
    let value = cpu.tsc();
    W32::set(cpu, 0, value);
    W32::set(cpu, 2, value >> 32);
    if with_aux {
        let aux = cpu.s.msr.tsc_aux;
        W32::set(cpu, 1, aux);
    }
    Ok(())
}

fn swapgs(cpu: &mut Cpu) -> Step {
    if cpu.code_size != CodeSize::Bits64 {
        return Err(Exception::UD.into());
    }
    privileged(cpu, true)?;
    let old = cpu.s.seg[sreg::GS].base;
    cpu.s.seg[sreg::GS].base = cpu.s.msr.kernel_gs_base;
    cpu.seg_base[sreg::GS] = cpu.s.msr.kernel_gs_base;
    cpu.s.msr.kernel_gs_base = old;
    Ok(())
}

fn segment_base(cpu: &mut Cpu, i: &Instruction) -> Step {
    if cpu.code_size != CodeSize::Bits64 || cpu.s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::UD.into());
    }
    let reg = match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => sreg::FS,
        _ => sreg::GS,
    };
    if matches!(i.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
        let base = cpu.s.seg[reg].base;
        set_register(cpu, i, base);
    } else {
        let value = register_value(cpu, i.op0_register());
        msr::set_base(cpu, reg, value)?;
    }
    Ok(())
}

// ---- descriptor tables ---------------------------------------------------------------------------------------------------------

fn load_table(cpu: &mut Cpu, i: &Instruction, _op: &Op) -> Step {
    privileged(cpu, true)?;
    let (seg, ea, mask) = memory_operand(cpu, i);
    let narrow = matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
    let table = tables::load_table(cpu, seg, ea, mask, narrow)?;
    if i.mnemonic() == Mnemonic::Lgdt {
        cpu.s.gdtr = table;
    } else {
        cpu.s.idtr = table;
    }
    Ok(())
}

fn store_table(cpu: &mut Cpu, i: &Instruction) -> Step {
    tables::check_umip(cpu)?;
    let (seg, ea, _) = memory_operand(cpu, i);
    let table = if i.mnemonic() == Mnemonic::Sgdt { cpu.s.gdtr } else { cpu.s.idtr };
    tables::store_table(cpu, seg, ea, table)?;
    cpu.wrote()
}

fn load_system_segment(cpu: &mut Cpu, i: &Instruction) -> Step {
    tables::check_protected(cpu)?;
    privileged(cpu, true)?;
    let selector = word_operand(cpu, i, 0)?;
    if i.mnemonic() == Mnemonic::Lldt {
        tables::lldt(cpu, selector)?
    } else {
        tables::ltr(cpu, selector)?
    }
    Ok(())
}

fn store_system_word(cpu: &mut Cpu, i: &Instruction) -> Step {
    let value = match i.mnemonic() {
        Mnemonic::Smsw => cpu.s.cr0,
        m => {
            tables::check_protected(cpu)?;
            u64::from(if m == Mnemonic::Sldt { cpu.s.ldtr.selector } else { cpu.s.tr.selector })
        }
    };
    tables::check_umip(cpu)?;
    store_word(cpu, i, value)
}

fn lmsw(cpu: &mut Cpu, i: &Instruction) -> Step {
    privileged(cpu, true)?;
    let value = u64::from(word_operand(cpu, i, 0)?);
    // PE, MP, EM, TS; PE cannot be cleared.
    let new = cpu.s.cr0 & !0xe | value & 0xf;
    resync(control::write_cr(cpu, 0, new))
}

fn inspect(cpu: &mut Cpu, i: &Instruction) -> Step {
    tables::check_protected(cpu)?;
    let selector = word_operand(cpu, i, 1)?;
    let found =
        if i.mnemonic() == Mnemonic::Lar { tables::lar(cpu, selector)? } else { tables::lsl(cpu, selector)? };
    if let Some(value) = found {
        set_register(cpu, i, value);
    }
    Ok(())
}

fn verify(cpu: &mut Cpu, i: &Instruction) -> Step {
    tables::check_protected(cpu)?;
    let selector = word_operand(cpu, i, 0)?;
    if i.mnemonic() == Mnemonic::Verr {
        tables::verr(cpu, selector)?
    } else {
        tables::verw(cpu, selector)?
    }
    Ok(())
}

// ---- TLB, XCR0 ------------------------------------------------------------------------------------------------------------------

fn invlpg(cpu: &mut Cpu, i: &Instruction) -> Step {
    privileged(cpu, true)?;
    let (seg, ea, _) = memory_operand(cpu, i);
    let la = cpu.seg_base[usize::from(seg & 7)].wrapping_add(ea) & cpu.linear_mask;
    control::invlpg(cpu, la);
    Err(Stop::Resync)
}

fn invpcid(cpu: &mut Cpu, i: &Instruction) -> Step {
    privileged(cpu, true)?;
    let kind = register_value(cpu, i.op0_register());
    let (seg, ea, mask) = memory_operand(cpu, i);
    let pcid: u64 = cpu.read(seg, ea)?;
    let la: u64 = cpu.read(seg, ea.wrapping_add(8) & mask)?;
    resync(control::invpcid(cpu, kind, pcid, la))
}

fn xgetbv(cpu: &mut Cpu) -> Step {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD.into());
    }
    let value = match W32::get(cpu, 1) {
        0 => cpu.s.xcr0,
        1 if cpu.model.has(Feature::Xgetbv1) => crate::vector::xgetbv1(&cpu.s.fpu, cpu.s.xcr0),
        _ => return Err(Exception::GP0.into()),
    };
    W32::set(cpu, 0, value);
    W32::set(cpu, 2, value >> 32);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu) -> Step {
    if cpu.s.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD.into());
    }
    privileged(cpu, true)?;
    if W32::get(cpu, 1) != 0 {
        return Err(Exception::GP0.into());
    }
    let value = W32::get(cpu, 2) << 32 | W32::get(cpu, 0);
    control::write_xcr0(cpu, value)?;
    Ok(())
}

// ---- the rest -------------------------------------------------------------------------------------------------------------------

fn cpuid(cpu: &mut Cpu) -> Step {
    let span = cpu.stats.begin(Cause::Cpuid);
    let context = CpuidContext {
        apic_id: cpu.index as u32,
        vcpus: cpu.vcpus as u32,
        cr4: cpu.s.cr4,
        xcr0: cpu.s.xcr0,
        xss: cpu.s.msr.xss,
        tsc_hz: cpu.io.tsc_hz(),
        apic_enabled: cpu
            .io
            .apic_msr_read(cpu.index, x86::bits::msr::APIC_BASE)
            .is_ok_and(|base| base & 1 << 11 != 0),
    };
    let r = cpu.model.cpuid(cpu.gpr[0] as u32, cpu.gpr[1] as u32, &context);
    W32::set(cpu, 0, u64::from(r.eax));
    W32::set(cpu, 3, u64::from(r.ebx));
    W32::set(cpu, 1, u64::from(r.ecx));
    W32::set(cpu, 2, u64::from(r.edx));
    cpu.stats.end(Cause::Cpuid, span);
    Ok(())
}

fn halt(cpu: &mut Cpu) -> Step {
    privileged(cpu, true)?;
    sleep(cpu)
}

fn sleep(cpu: &mut Cpu) -> Step {
    cpu.stats.count(Cause::Halt);
    cpu.s.activity = Activity::Halted;
    // The shadow of a preceding STI ends with this instruction.
    cpu.s.shadow = InterruptShadow::None;
    cpu.derive_poll_mask();
    Err(Stop::Resync)
}

/// MONITOR arms nothing: MWAIT returns at once, which the architecture allows (SDM 2B MWAIT: "the processor may exit for
/// implementation-dependent reasons").
fn monitor(cpu: &mut Cpu) -> Step {
    privileged(cpu, true)?;
    if W32::get(cpu, 1) != 0 {
        return Err(Exception::GP0.into());
    }
    let _: u8 = cpu.read(FLAT, cpu.gpr[0])?;
    Ok(())
}

fn mwait(cpu: &mut Cpu) -> Step {
    privileged(cpu, true)?;
    if W32::get(cpu, 1) & !1 != 0 {
        return Err(Exception::GP0.into());
    }
    std::thread::yield_now();
    Err(Stop::Resync)
}

fn fence(cpu: &mut Cpu, i: &Instruction) -> Step {
    match i.mnemonic() {
        Mnemonic::Pause => {
            std::hint::spin_loop();
            if cpu.poll() { Err(Stop::Resync) } else { Ok(()) }
        }
        Mnemonic::Mfence | Mnemonic::Serialize => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// CLFLUSH and kin: a read as far as faults go.
fn cache_line(cpu: &mut Cpu, i: &Instruction) -> Step {
    let (seg, ea, _) = memory_operand(cpu, i);
    let _: u8 = cpu.read(seg, ea)?;
    Ok(())
}

/// CLZERO: zeroes the 64-byte line at rAX (APM 3).
fn clzero(cpu: &mut Cpu, i: &Instruction) -> Step {
    let ea = register_value(cpu, i.op0_register()) & !63;
    let seg = if cpu.code_size == CodeSize::Bits64 { FLAT } else { 3 };
    cpu.write_bytes(seg, ea, &[0; 64])?;
    cpu.wrote()
}

/// RDRAND, RDSEED: from the host kernel's generator; CF says that it worked.
fn random(cpu: &mut Cpu, i: &Instruction) -> Step {
    let mut bytes = [0; 8];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    let ok = got.is_ok_and(|n| n == 8);
    set_register(cpu, i, if ok { u64::from_le_bytes(bytes) } else { 0 });
    cpu.flags = crate::flags::LazyFlags::from_rflags(u64::from(ok));
    Ok(())
}
