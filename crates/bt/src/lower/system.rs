//! In-TC emulation: the system instructions that kernels execute often, as a few host instructions on the frame.
//!
//! RFLAGS without the arithmetic flags is [`frame::SYSFLAGS`]. INV-BT-4: where IF becomes set, the alarm is set if a signal waits; where IF
//! becomes clear, the code polls first. So an interrupt that waited for IF is seen at the next poll, and a window between STI and CLI
//! is not missed. The segments of SYSCALL, SYSRET and IRET are left to be loaded when somebody looks ([`frame::MODE`]).

use iced_x86::{Code, Instruction, Mnemonic};

use super::registers::{frame_slot, host_number, in_frame};
use super::stack::{self, Value};
use super::{FpLevel, Lowering, TimeStamp, Variant};
use crate::emit::{Op, R11, RAX, RCX, RDX, S0, S1, cc};
use crate::frame;
use crate::unit::{self, STATUS};

/// INT3. The engine's signal handler goes on behind it.
pub const TRAP: u8 = 0xcc;

const IF: u32 = 1 << 9;
const AC: u32 = 1 << 18;
const ID: u32 = 1 << 21;
const FIXED: u32 = 2;
/// TF, DF, IOPL, NT, RF, VM, AC, VIF, VIP, ID: POPF leaves a change of these to the interpreter.
const SELDOM: u32 = 0x003f_7500;
/// TF, DF, RF, AC: code that runs with these set is not what SYSCALL's target was translated for.
const ODD: u32 = 0x0005_0500;
/// CF, PF, AF, ZF, SF, OF in RFLAGS.
const ARITHMETIC: u32 = 0x8d5;
/// LAHF's flags.
const LOW_STATUS: u32 = 0xd5;

impl Lowering<'_, '_> {
    /// An instruction that falls through. False: not done here.
    pub(super) fn system(&mut self, i: &Instruction, live_before: u32) -> bool {
        let supervisor = self.variant != Variant::User;
        match i.mnemonic() {
            Mnemonic::Cld => {}
            Mnemonic::Cli if supervisor => {
                self.spill(live_before);
                if self.poll_in != 1 {
                    self.poll_here();
                }
                self.asm.change_bits32(true, frame::SYSFLAGS, !IF);
            }
            Mnemonic::Sti if supervisor && !self.last => {
                self.poll_in = 2;
                self.spill(live_before);
                self.asm.change_bits32(false, frame::SYSFLAGS, IF);
                self.alarm_if_pending();
            }
            Mnemonic::Stac | Mnemonic::Clac if supervisor => self.access_control(i, live_before),
            // In virtual-8086 mode they depend on IOPL.
            Mnemonic::Pushfd | Mnemonic::Pushf | Mnemonic::Popfd | Mnemonic::Popf
                if !supervisor && self.facts.legacy.is_none_or(|l| l.bits16) =>
            {
                return false;
            }
            Mnemonic::Pushfq | Mnemonic::Pushfd | Mnemonic::Pushf => {
                self.spill(STATUS);
                self.compose_flags();
                self.asm.store(frame::TEMP, S1);
                self.push_one(i, Value::Frame(frame::TEMP), 0);
            }
            Mnemonic::Popfq | Mnemonic::Popfd | Mnemonic::Popf => self.pop_flags(i, supervisor),
            Mnemonic::Swapgs if supervisor => {
                self.asm.load(S0, frame::GS_BASE);
                self.asm.load(S1, frame::KERNEL_GS_BASE);
                self.asm.store(frame::GS_BASE, S1);
                self.asm.store(frame::KERNEL_GS_BASE, S0);
            }
            Mnemonic::Mov if i.op1_register().is_cr() && supervisor => return self.read_control(i),
            Mnemonic::Mov if unit::switches_space(i) && supervisor => return self.switch_space(i),
            Mnemonic::Invlpg if supervisor => return self.invalidate_page(i),
            Mnemonic::Cpuid => self.call_out_by(frame::DO_CPUID),
            Mnemonic::Rdmsr if supervisor && self.facts.legacy.is_none() => self.call_out_by(frame::DO_RDMSR),
            Mnemonic::Wrmsr if supervisor && self.facts.legacy.is_none() => self.call_out_by(frame::DO_WRMSR),
            Mnemonic::Xsavec | Mnemonic::Xsavec64 => return self.extended_state(i, frame::DO_XSAVE, true),
            Mnemonic::Xrstor | Mnemonic::Xrstor64 => return self.extended_state(i, frame::DO_XRSTOR, false),
            Mnemonic::Xsaves | Mnemonic::Xsaves64 if supervisor => {
                return self.extended_state(i, frame::DO_XSAVE, true);
            }
            Mnemonic::Xrstors | Mnemonic::Xrstors64 if supervisor => {
                return self.extended_state(i, frame::DO_XRSTOR, false);
            }
            Mnemonic::Mov if i.op0_register().is_segment_register() => {
                return self.load_null(i, live_before);
            }
            Mnemonic::Mov => return self.read_selector(i, live_before),
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase if self.facts.fsgsbase => self.read_base(i),
            Mnemonic::Wrfsbase | Mnemonic::Wrgsbase if self.facts.fsgsbase => self.write_base(i, live_before),
            Mnemonic::Rdtsc | Mnemonic::Rdtscp => match self.facts.rdtsc {
                TimeStamp::Callout => return false,
                TimeStamp::Inline => self.time_stamp(i.mnemonic() == Mnemonic::Rdtscp, live_before),
                TimeStamp::Trap => {
                    self.spill(STATUS);
                    self.asm.bytes(&[TRAP]);
                    self.callouts += 1;
                    self.call_engine(frame::CALLOUT, super::SiteKind::Callout);
                }
            },
            _ => return false,
        }
        true
    }

    /// A transfer to another level. False: not done here.
    pub(super) fn system_transfer(&mut self, i: &Instruction) -> bool {
        let supervisor = self.variant != Variant::User;
        match i.code() {
            _ if self.facts.legacy.is_some() => return false,
            Code::Syscall if self.facts.syscall && !supervisor => self.syscall(i),
            Code::Sysretq if self.facts.syscall && supervisor => self.sysret(),
            Code::Iretq if supervisor => self.iret(),
            _ => return false,
        }
        true
    }

    fn access_control(&mut self, i: &Instruction, live_before: u32) {
        self.spill(live_before);
        let set = i.mnemonic() == Mnemonic::Stac;
        self.asm.change_bits32(!set, frame::SYSFLAGS, if set { AC } else { !AC });
        if self.facts.smap {
            self.variant = if set { Variant::SupervisorAc } else { Variant::Supervisor };
        }
    }

    /// Behind an instruction that may have set IF, when its shadow is over: leaves at `offset` if the alarm is set.
    pub(super) fn poll_after_shadow(&mut self, offset: u64, live: u32) {
        if self.poll_in != 0 {
            self.count_shadow(offset, live);
        }
    }

    fn count_shadow(&mut self, offset: u64, live: u32) {
        if self.poll_in == 1 {
            self.spill(live);
            self.poll_at(offset);
        }
        self.poll_in -= 1;
    }

    /// Sets the alarm if a signal waits. Clobbers flags and [`S0`].
    fn alarm_if_pending(&mut self) {
        self.asm.load(S0, frame::SIGNALS);
        self.asm.cmp_deref32_zero(S0);
        let none = self.asm.jcc(cc::E);
        self.asm.store_imm32(frame::ALARM, 1);
        self.asm.bind(none);
    }

    /// RFLAGS into [`S1`], from the frame. Uses [`S0`].
    fn compose_flags(&mut self) {
        self.asm.load16(S0, frame::FLAGS);
        self.asm.op32(Op::Mov, S1, S0);
        self.asm.shr(S1, 8);
        self.asm.and32(S1, LOW_STATUS);
        self.asm.and32(S0, 1);
        self.asm.shl(S0, 11);
        self.asm.op(Op::Or, S1, S0);
        self.asm.gs(Op::Or, S1, frame::SYSFLAGS);
    }

    /// The arithmetic flags of an RFLAGS image in `from` into the frame. Uses [`S0`] and [`S1`]; `from` may be [`S0`].
    fn decompose_flags(&mut self, from: u8) {
        self.asm.op32(Op::Mov, S1, from);
        self.asm.shr(S1, 11);
        self.asm.and32(S1, 1);
        if from != S0 {
            self.asm.op32(Op::Mov, S0, from);
        }
        self.asm.and32(S0, LOW_STATUS);
        self.asm.shl(S0, 8);
        self.asm.op32(Op::Or, S0, S1);
        self.asm.store16(frame::FLAGS, S0);
    }

    fn pop_flags(&mut self, i: &Instruction, supervisor: bool) {
        let size = stack::item(i);
        let first = self.room.misses.len();
        self.in_host = false;
        if supervisor {
            self.poll_here();
        }
        let retry = self.asm.here();
        self.stack_address(0, size, false);
        self.check(size, false, retry);
        self.asm.load_sized(size, S0, S0, S1);
        self.asm.mov(S1, S0);
        self.asm.gs(Op::Xor, S1, frame::SYSFLAGS);
        let left_alone = if supervisor { SELDOM } else { SELDOM | IF };
        let left_alone = if size == 2 { left_alone & 0xffff } else { left_alone };
        self.asm.test_imm(S1, left_alone as i32);
        let seldom = self.asm.jcc(cc::NE);
        self.interpret_if(seldom);
        if supervisor {
            // Only IF may differ: the difference is exchanged.
            self.asm.and32(S1, IF);
            self.asm.gs(Op::Xor, S1, frame::SYSFLAGS);
            self.asm.store(frame::SYSFLAGS, S1);
        }
        self.decompose_flags(S0);
        self.move_stack(size as i32);
        if supervisor {
            self.asm.test_bits32(frame::SYSFLAGS, IF);
            let masked = self.asm.jcc(cc::E);
            self.alarm_if_pending();
            self.asm.bind(masked);
            self.poll_in = 1;
        }
        self.complete(first, false);
    }

    /// MOV from a control register that the frame holds.
    fn read_control(&mut self, i: &Instruction) -> bool {
        use iced_x86::Register as R;
        let field = match i.op1_register() {
            R::CR0 => frame::CR0,
            R::CR2 => frame::CR2,
            R::CR3 => frame::CR3,
            R::CR4 => frame::CR4,
            _ => return false,
        };
        let r = i.op0_register();
        let host = if in_frame(r) { S0 } else { host_number(r) };
        if r.size() == 8 {
            self.asm.load(host, field);
        } else {
            self.asm.load32(host, field);
        }
        if in_frame(r) {
            self.asm.store(frame_slot(r), S0);
        }
        true
    }

    /// MOV to CR3 in code that the address spaces share: the unit ends behind it, so nothing goes on that knows of translations.
    fn switch_space(&mut self, i: &Instruction) -> bool {
        if self.facts.page_rip.is_none_or(|rip| rip >> 63 == 0) || !self.last {
            return false;
        }
        self.spill(STATUS);
        self.register_to(S0, i.op1_register());
        self.call_out_by(frame::DO_SWITCH);
        true
    }

    /// INVLPG, in code as that of [`Lowering::switch_space`].
    fn invalidate_page(&mut self, i: &Instruction) -> bool {
        if self.facts.page_rip.is_none_or(|rip| rip >> 63 == 0) || !self.last {
            return false;
        }
        self.spill(STATUS);
        let done = self.address(i, 1, false);
        if done {
            self.call_out_by(frame::DO_INVLPG);
        }
        done
    }

    /// XSAVEC, XRSTOR and their kin: the engine's code does them where all the state is in the host's registers.
    fn extended_state(&mut self, i: &Instruction, how: i32, write: bool) -> bool {
        if self.facts.legacy.is_some() || self.facts.fp < FpLevel::Avx {
            return false;
        }
        self.spill(STATUS);
        if !self.address(i, 64, write) {
            return false;
        }
        self.asm.mov_imm(S1, (frame::TLB + self.variant as i32 * frame::TLB_STRIDE) as u64);
        self.call_out_by(how);
        true
    }

    /// MOV of a null selector to DS, ES, FS or GS, as kernels do when they switch tasks (SDM 2B MOV). Others are interpreted.
    fn load_null(&mut self, i: &Instruction, live_before: u32) -> bool {
        use iced_x86::{OpKind, Register as R};
        let (number, base) = match i.op0_register() {
            R::ES => (0, None),
            R::DS => (3, None),
            R::FS => (4, Some(frame::FS_BASE)),
            R::GS => (5, Some(frame::GS_BASE)),
            _ => return false,
        };
        if self.facts.legacy.is_some() || i.op1_kind() != OpKind::Register {
            return false;
        }
        let first = self.room.misses.len();
        self.spill(live_before);
        self.register_to(S0, i.op1_register());
        self.asm.and32(S0, 0xffff);
        let other = self.asm.jcc(cc::NE);
        self.interpret_if(other);
        self.asm.store32(frame::SELECTORS + 4 * number, S0);
        if let Some(base) = base {
            self.asm.store(base, S0);
        }
        self.asm.change_bits32(false, frame::NULLED, 1 << number);
        self.complete(first, false);
        true
    }

    /// MOV from a segment register to a register or to memory.
    fn read_selector(&mut self, i: &Instruction, live_before: u32) -> bool {
        use iced_x86::{OpKind, Register as R};
        let number = match i.op1_register() {
            R::ES => 0,
            R::CS => 1,
            R::SS => 2,
            R::DS => 3,
            R::FS => 4,
            R::GS => 5,
            _ => return false,
        };
        let selector = frame::SELECTORS + 4 * number;
        if i.op0_kind() == OpKind::Memory {
            let Some(operand) = self.own_operand(i, live_before, 2, true, false) else { return false };
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
            self.asm.load32(S1, selector);
            self.store_element(2);
            self.complete(operand.first, false);
            return true;
        }
        let r = i.op0_register();
        self.asm.load32(S0, selector);
        match (in_frame(r), r.size()) {
            (true, 2) => self.asm.store16(frame_slot(r), S0),
            (true, _) => self.asm.store(frame_slot(r), S0),
            (false, 2) => {
                self.asm.bytes(&[0x66]);
                self.asm.op32(Op::Mov, host_number(r), S0);
            }
            (false, _) => self.asm.op32(Op::Mov, host_number(r), S0),
        }
        true
    }

    /// The selectors of CS and SS become those of SYSCALL, or of SYSRET. Uses [`S0`].
    fn take_selectors(&mut self, sysret: bool) {
        let from = frame::SYSCALL_SELECTORS + if sysret { 8 } else { 0 };
        self.asm.load(S0, from);
        self.asm.store(frame::SELECTORS + 4, S0);
    }

    fn base_slot(i: &Instruction) -> i32 {
        match i.mnemonic() {
            Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => frame::FS_BASE,
            _ => frame::GS_BASE,
        }
    }

    fn read_base(&mut self, i: &Instruction) {
        let r = i.op0_register();
        let host = if in_frame(r) { S0 } else { host_number(r) };
        if r.size() == 8 {
            self.asm.load(host, Self::base_slot(i));
        } else {
            self.asm.load32(host, Self::base_slot(i));
        }
        if in_frame(r) {
            self.asm.store(frame_slot(r), S0);
        }
    }

    fn write_base(&mut self, i: &Instruction, live_before: u32) {
        let first = self.room.misses.len();
        self.spill(live_before);
        self.register_to(S0, i.op0_register());
        if i.op0_register().size() == 8 {
            // Canonical?
            self.asm.mov(S1, S0);
            self.asm.shl(S1, 16);
            self.asm.sar(S1, 16);
            self.asm.op(Op::Cmp, S1, S0);
            let other = self.asm.jcc(cc::NE);
            self.interpret_if(other);
        } else {
            self.asm.zero_extend(S0);
        }
        self.asm.store(Self::base_slot(i), S0);
        self.complete(first, false);
    }

    fn time_stamp(&mut self, with_aux: bool, live_before: u32) {
        self.spill(live_before);
        self.asm.bytes(if with_aux { &[0x0f, 0x01, 0xf9] } else { &[0x0f, 0x31] });
        self.asm.shl(RDX, 32);
        self.asm.op(Op::Or, RAX, RDX);
        self.asm.gs(Op::Add, RAX, frame::TSC_OFFSET);
        self.asm.mov(RDX, RAX);
        self.asm.shr(RDX, 32);
        self.asm.zero_extend(RAX);
        if with_aux {
            self.asm.load32(RCX, frame::TSC_AUX);
        }
    }

    /// SYSCALL from 64-bit code at level 3 (SDM 2B).
    fn syscall(&mut self, i: &Instruction) {
        self.spill(STATUS);
        self.rip_to(RCX, i.next_ip());
        self.compose_flags();
        self.asm.mov(R11, S1);
        self.asm.load(S0, frame::SYSCALL_KEEP);
        self.asm.and_to(frame::SYSFLAGS, S0);
        self.asm.load32(S0, frame::SYSCALL_KEEP_STATUS);
        self.asm.and_to16(frame::FLAGS, S0);
        self.take_selectors(false);
        self.asm.store_imm32(frame::MODE, frame::MODE_SYSCALL);
        self.asm.load(S0, frame::LSTAR);
        self.asm.test_bits32(frame::SYSFLAGS, ODD);
        let odd = self.asm.jcc(cc::NE);
        self.variant = Variant::Supervisor;
        self.drop_pairs();
        self.leave_indirect(None, true);
        self.asm.bind(odd);
        self.asm.store(frame::RIP, S0);
        self.asm.jmp_gs(frame::LEAVE);
    }

    /// SYSRET to 64-bit code (SDM 2B). Whatever is unusual is interpreted.
    fn sysret(&mut self) {
        self.in_host = false;
        self.asm.mov(S0, RCX);
        self.asm.shr(S0, 47);
        let high = self.asm.jcc(cc::NE);
        self.interpret_if(high);
        self.asm.test_imm(R11, !((ARITHMETIC | FIXED | IF | ID) as i32));
        let odd = self.asm.jcc(cc::NE);
        self.interpret_if(odd);
        self.asm.op32(Op::Mov, S0, R11);
        self.asm.and32(S0, IF | ID);
        self.asm.group1_32(1, S0, FIXED);
        self.asm.store(frame::SYSFLAGS, S0);
        self.decompose_flags(R11);
        self.take_selectors(true);
        self.asm.store_imm32(frame::MODE, frame::MODE_SYSRET);
        self.alarm_if_pending();
        self.asm.mov(S0, RCX);
        self.variant = Variant::User;
        self.drop_pairs();
        self.leave_indirect(None, true);
    }

    /// IRETQ: the engine's code does it, or calls out.
    fn iret(&mut self) {
        self.call_out_by(frame::IRET);
        self.asm.jmp_gs(frame::LEAVE);
    }
}
