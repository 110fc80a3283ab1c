//! From one decoded instruction (iced) to the handler that executes it and the operands as it wants them.

#![expect(clippy::cast_possible_truncation, reason = "selectors, types and levels are fields of wider words")]

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind, Register};
use x86::cpuid::{Gate, OlderMeaning};
use x86::decode::condition;

use crate::cpu::{CodeSize, Cpu, FLAT, FLAT_STACK, PAGE_RIP, Step, Stop, ZERO};
use crate::ops::alu::{self, Adc, Add, And, Dec, Inc, Neg, Not, Or, Sbb, Sub, Xor};
use crate::ops::shift::{self, Rcl, Rcr, Rol, Ror, Sar, Shl, Shr};
use crate::ops::{Form, Handler, Op, bits, branch, legacy, mov, mul_div, stack, string};
use crate::vector;

/// A decoded instruction, and whether control never falls through it.
pub struct Built {
    /// What to execute.
    pub op: Op,
    /// The run ends here.
    pub ends_run: bool,
}

/// Number of a general register as handlers want it: AH, CH, DH, BH are 20 to 23.
fn register_number(r: Register) -> u8 {
    match r {
        Register::AH => 20,
        Register::CH => 21,
        Register::DH => 22,
        Register::BH => 23,
        _ if r.is_gpr() => r.full_register().number() as u8,
        _ => ZERO,
    }
}

/// Index of the memory operand's segment register, flat ones of 64-bit code apart: there, overrides but FS and GS are
/// ignored (APM 2 4.5.3), and the base register decides whether it is a stack access.
fn segment_number(i: &Instruction, size: CodeSize) -> u8 {
    let long = size == CodeSize::Bits64;
    let stack = matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    match i.memory_segment() {
        Register::FS => 4,
        Register::GS => 5,
        _ if long && stack => FLAT_STACK,
        _ if long => FLAT,
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        _ => 3,
    }
}

/// The mask of an address size in bits.
const fn address_mask(bits: u32) -> u64 {
    match bits {
        16 => 0xffff,
        32 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Address size in bits of an explicit memory operand.
fn address_bits(i: &Instruction) -> u32 {
    let register = if i.memory_base() == Register::None { i.memory_index() } else { i.memory_base() };
    if register != Register::None && register.is_gpr() || register.is_ip() {
        return register.size() as u32 * 8;
    }
    match i.memory_displ_size() {
        2 => 16,
        4 => 32,
        _ => 64,
    }
}

fn fill_memory(op: &mut Op, i: &Instruction, size: CodeSize) {
    let base = i.memory_base();
    op.base = match base {
        Register::None => ZERO,
        _ if base.is_ip() => PAGE_RIP,
        _ => register_number(base),
    };
    op.index = if i.memory_index() == Register::None { ZERO } else { register_number(i.memory_index()) };
    let scale = i.memory_index_scale().trailing_zeros() as u8;
    op.scale = scale;
    op.disp = i.memory_displacement64();
    op.amask = address_mask(address_bits(i));
    op.seg = segment_number(i, size);
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
            | OpKind::Immediate8_2nd
    )
}

/// The form of the first two operands; fills the op's registers, memory operand and immediate.
fn operands(op: &mut Op, i: &Instruction, size: CodeSize) -> Form {
    let mut kinds = [' '; 2];
    for n in 0..i.op_count().min(2) {
        let kind = i.op_kind(n);
        kinds[n as usize] = match kind {
            OpKind::Register if i.op_register(n).is_gpr() => {
                let r = register_number(i.op_register(n));
                if n == 0 {
                    op.a = r
                } else {
                    op.b = r
                }
                'r'
            }
            OpKind::Memory => {
                fill_memory(op, i, size);
                'm'
            }
            _ if is_immediate(kind) => {
                op.imm = i.immediate(n);
                'i'
            }
            _ => '?',
        };
    }
    match kinds {
        ['r', ' '] => Form::R,
        ['m', ' '] => Form::M,
        ['i', ' '] => Form::I,
        ['r', 'r'] => Form::RR,
        ['r', 'm'] => Form::RM,
        ['m', 'r'] => Form::MR,
        ['r', 'i'] => Form::RI,
        ['m', 'i'] => Form::MI,
        _ => Form::Other,
    }
}

/// Width in bits of operand `n`.
fn operand_bits(i: &Instruction, n: u32) -> u32 {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size() as u32 * 8,
        OpKind::Memory => match i.memory_size() {
            MemorySize::UInt8 | MemorySize::Int8 => 8,
            size => size.size() as u32 * 8,
        },
        OpKind::Immediate8 => 8,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 16,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 32,
        _ => 64,
    }
}

/// The decoded instruction as it will be executed.
pub fn build(cpu: &mut Cpu, i: &Instruction, offset: u16) -> Built {
    let size = cpu.code_size;
    let len = i.len() as u8;
    let mut op = blank(system, offset, len);
    if i.is_invalid() {
        op.run = undefined;
        return Built { op, ends_run: true };
    }
    let gate = cpu.model.gate(i);
    let replaced = match gate {
        Gate::Announced => None,
        Gate::Undefined => Some(undefined as Handler),
        Gate::Older(meaning) => older(&mut op, i, size, meaning),
    };
    let handler = replaced.or_else(|| select(&mut op, i, size));
    let handler = handler.or_else(|| {
        let v = vector::prepare(i)?;
        op.imm = cpu.vector_slab.len() as u64;
        cpu.vector_slab.push(v);
        Some(native as Handler)
    });
    match handler {
        Some(run) => op.run = run,
        None => {
            op.imm = cpu.instruction_slab.len() as u64;
            cpu.instruction_slab.push(*i);
        }
    }
    let ends_run = matches!(
        i.mnemonic(),
        Mnemonic::Jmp | Mnemonic::Ret | Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq
    ) || matches!(i.mnemonic(), Mnemonic::Sysret | Mnemonic::Sysexit | Mnemonic::Ud2);
    Built { op, ends_run }
}

/// An op without operands.
pub fn blank(run: Handler, ip: u16, len: u8) -> Op {
    Op {
        run,
        imm: 0,
        disp: 0,
        amask: u64::MAX,
        ip,
        len,
        a: 0,
        b: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        seg: FLAT,
        extra: 0,
    }
}

/// An instruction that does not exist (or not on this model).
fn undefined(_: &mut Cpu, _: &Op) -> Step {
    Err(x86::Exception::UD.into())
}

/// The pseudo-instruction at the end of a decoded run.
pub fn end_of_run(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = op.rip(cpu);
    Err(Stop::EndOfRun)
}

/// Hands an instruction to `system`.
fn system(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.start_rip = op.rip(cpu);
    cpu.rip = op.next_rip(cpu);
    let at = usize::try_from(op.imm).unwrap_or(usize::MAX);
    match cpu.instruction_slab.get(at).copied() {
        Some(i) => crate::system::execute(cpu, &i, op),
        None => Err(x86::Exception::UD.into()),
    }
}

/// Hands an instruction to `vector`.
fn native(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.start_rip = op.rip(cpu);
    cpu.rip = op.next_rip(cpu);
    let span = cpu.stats.begin(engine::Cause::Native);
    let at = usize::try_from(op.imm).unwrap_or(usize::MAX);
    let slab = std::mem::take(&mut cpu.vector_slab);
    let result = slab.get(at).map_or(Err(x86::Exception::UD), |v| vector::execute(v, cpu));
    cpu.vector_slab = slab;
    cpu.stats.end(engine::Cause::Native, span);
    result?;
    cpu.wrote()
}

/// What an instruction that the model does not announce does on an older processor.
fn older(op: &mut Op, i: &Instruction, size: CodeSize, meaning: OlderMeaning) -> Option<Handler> {
    match meaning {
        OlderMeaning::Nop => Some(mov::nop),
        OlderMeaning::Bsf | OlderMeaning::Bsr => {
            let form = operands(op, i, size);
            bits::select_scan(operand_bits(i, 0), meaning == OlderMeaning::Bsr, form)
        }
        // The announced instruction's handler does what the older one does.
        _ => None,
    }
}

/// The hand-written handler, if there is one.
fn select(op: &mut Op, i: &Instruction, size: CodeSize) -> Option<Handler> {
    use Mnemonic as M;
    let locked = i.has_lock_prefix();
    let m = i.mnemonic();
    if let Some(handler) = select_branch(op, i, size).or_else(|| select_string(op, i, size)) {
        return Some(handler);
    }
    let form = operands(op, i, size);
    let width = if i.op_count() > 0 { operand_bits(i, 0) } else { 0 };
    match m {
        M::Add => alu::select_binary::<Add>(width, form, locked),
        M::Or => alu::select_binary::<Or>(width, form, locked),
        M::Adc => alu::select_binary::<Adc>(width, form, locked),
        M::Sbb => alu::select_binary::<Sbb>(width, form, locked),
        M::And => alu::select_binary::<And>(width, form, locked),
        M::Sub => alu::select_binary::<Sub>(width, form, locked),
        M::Xor => alu::select_binary::<Xor>(width, form, locked),
        M::Cmp => alu::select_compare::<Sub>(width, form),
        M::Test => alu::select_compare::<And>(width, form),
        M::Inc => alu::select_unary::<Inc>(width, form, locked),
        M::Dec => alu::select_unary::<Dec>(width, form, locked),
        M::Neg => alu::select_unary::<Neg>(width, form, locked),
        M::Not => alu::select_unary::<Not>(width, form, locked),
        M::Xadd => alu::select_xadd(width, form),
        M::Cmpxchg => alu::select_cmpxchg(width, form),
        M::Xchg => {
            if form == Form::RM {
                op.b = op.a;
            }
            alu::select_xchg(width, form)
        }
        M::Mov => mov::select_mov(width, form),
        M::Movzx => mov::select_movzx(width, operand_bits(i, 1), form),
        M::Movsx | M::Movsxd => match (width, operand_bits(i, 1)) {
            (w, f) if w == f => mov::select_mov(width, form),
            (w, f) => mov::select_movsx(w, f, form),
        },
        M::Lea => Some(mov::select_lea(width)),
        M::Bswap => Some(mov::select_bswap(width)),
        M::Movbe => mov::select_movbe(operand_bits(i, 0), form),
        M::Cbw => Some(mov::select_extend_accumulator(16)),
        M::Cwde => Some(mov::select_extend_accumulator(32)),
        M::Cdqe => Some(mov::select_extend_accumulator(64)),
        M::Cwd => Some(mov::select_extend_to_d(16)),
        M::Cdq => Some(mov::select_extend_to_d(32)),
        M::Cqo => Some(mov::select_extend_to_d(64)),
        M::Nop | M::Reservednop | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => {
            Some(mov::nop)
        }
        M::Prefetch | M::Prefetchw | M::Prefetchwt1 | M::Endbr32 | M::Endbr64 => Some(mov::nop),
        M::Shl | M::Sal => Some(select_shift::<Shl>(i, width)),
        M::Shr => Some(select_shift::<Shr>(i, width)),
        M::Sar => Some(select_shift::<Sar>(i, width)),
        M::Rol => Some(select_shift::<Rol>(i, width)),
        M::Ror => Some(select_shift::<Ror>(i, width)),
        M::Rcl => Some(select_shift::<Rcl>(i, width)),
        M::Rcr => Some(select_shift::<Rcr>(i, width)),
        M::Shld | M::Shrd => {
            let by_cl = i.op_kind(2) == OpKind::Register;
            if !by_cl {
                op.imm = i.immediate(2);
            }
            shift::select_double(width, m == M::Shld, form, by_cl)
        }
        M::Mul => mul_div::select(mul_div::Kind::Mul, width, form),
        M::Div => mul_div::select(mul_div::Kind::Div, width, form),
        M::Idiv => mul_div::select(mul_div::Kind::Idiv, width, form),
        M::Imul if i.op_count() == 1 => mul_div::select(mul_div::Kind::Imul, width, form),
        M::Imul => {
            let immediate = i.op_count() == 3;
            if immediate {
                op.imm = i.immediate(2);
            }
            mul_div::select_imul(width, form, immediate)
        }
        M::Bt | M::Bts | M::Btr | M::Btc => {
            let what = match m {
                M::Bt => 0,
                M::Bts => 1,
                M::Btr => 2,
                _ => 3,
            };
            op.extra = what | if form == Form::MR { 0x80 } else { 0 };
            bits::select_bit(width, form)
        }
        M::Bsf => bits::select_scan(width, false, form),
        M::Bsr => bits::select_scan(width, true, form),
        M::Cmpxchg8b => Some(bits::cmpxchg8b),
        M::Cmpxchg16b => Some(bits::cmpxchg16b),
        M::Push => stack::select_push(push_bits(i), form),
        M::Pop => stack::select_pop(push_bits(i), form),
        M::Pusha => Some(stack::select_pusha(16)),
        M::Pushad => Some(stack::select_pusha(32)),
        M::Popa => Some(stack::select_popa(16)),
        M::Popad => Some(stack::select_popa(32)),
        M::Leave => Some(stack::select_leave(push_bits(i))),
        M::Enter => {
            op.imm = u64::from(i.immediate16());
            op.extra = i.immediate8_2nd();
            Some(stack::select_enter(push_bits(i)))
        }
        M::Daa => Some(legacy::daa),
        M::Das => Some(legacy::das),
        M::Aaa => Some(legacy::aaa),
        M::Aas => Some(legacy::aas),
        M::Aam => Some(legacy::aam),
        M::Aad => Some(legacy::aad),
        M::Salc => Some(legacy::salc),
        M::Lahf => Some(legacy::lahf),
        M::Sahf => Some(legacy::sahf),
        M::Clc => Some(legacy::clc),
        M::Stc => Some(legacy::stc),
        M::Cmc => Some(legacy::cmc),
        M::Cld => Some(legacy::cld),
        M::Std => Some(legacy::std),
        M::Bound => Some(legacy::select_bound(width)),
        M::Arpl if form == Form::RR => Some(legacy::arpl_reg),
        M::Arpl => Some(legacy::arpl_mem),
        M::Xlatb => {
            fill_memory(op, i, size);
            op.index = ZERO;
            Some(mov::xlat)
        }
        _ => select_conditional(op, i, width, form),
    }
}

/// CMOVcc and SETcc.
fn select_conditional(op: &mut Op, i: &Instruction, width: u32, form: Form) -> Option<Handler> {
    let name = format!("{:?}", i.mnemonic());
    let is_cmov = name.starts_with("Cmov");
    if !is_cmov && !name.starts_with("Set") || i.condition_code() == iced_x86::ConditionCode::None {
        return None;
    }
    op.extra = condition(i);
    if is_cmov { mov::select_cmov(width, form) } else { mov::select_set(form) }
}

fn select_shift<O: shift::Shift>(i: &Instruction, width: u32) -> Handler {
    shift::select_shift::<O>(width, i.op_kind(0) == OpKind::Memory, i.op_kind(1) == OpKind::Register)
}

/// Operand size in bits of a stack instruction: how far it moves the stack pointer.
fn push_bits(i: &Instruction) -> u32 {
    match i.mnemonic() {
        Mnemonic::Leave | Mnemonic::Enter => match i.code() {
            Code::Leavew | Code::Enterw_imm16_imm8 => 16,
            Code::Leaved | Code::Enterd_imm16_imm8 => 32,
            _ => 64,
        },
        _ => i.stack_pointer_increment().unsigned_abs() * 8,
    }
}

fn select_branch(op: &mut Op, i: &Instruction, size: CodeSize) -> Option<Handler> {
    use Mnemonic as M;
    let near = matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if near {
        let bits = match i.op0_kind() {
            OpKind::NearBranch16 => 16,
            OpKind::NearBranch32 => 32,
            _ => 64,
        };
        op.imm = i.near_branch_target();
        op.amask = address_mask(bits);
        return match i.mnemonic() {
            M::Jmp => branch::select_jmp(bits, Form::Other),
            M::Call => branch::select_call(bits, Form::Other),
            M::Loop | M::Loope | M::Loopne => {
                op.b = match i.mnemonic() {
                    M::Loop => 0,
                    M::Loope => 1,
                    _ => 2,
                };
                op.extra = count_bits(i);
                Some(branch::loop_)
            }
            M::Jcxz | M::Jecxz | M::Jrcxz => {
                op.extra = count_bits(i);
                Some(branch::jcxz)
            }
            _ if i.is_jcc_short_or_near() => Some(branch::select_jcc(condition(i))),
            _ => None,
        };
    }
    match i.mnemonic() {
        M::Jmp if i.is_jmp_near_indirect() => {
            let form = operands(op, i, size);
            branch::select_jmp(operand_bits(i, 0), form)
        }
        M::Call if i.is_call_near_indirect() => {
            let form = operands(op, i, size);
            branch::select_call(operand_bits(i, 0), form)
        }
        M::Ret => {
            let bits = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 16,
                Code::Retnd | Code::Retnd_imm16 => 32,
                _ => 64,
            };
            op.imm = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
            Some(branch::select_ret(bits))
        }
        _ => None,
    }
}

/// Address size of LOOP and JCXZ.
fn count_bits(i: &Instruction) -> u8 {
    let name = format!("{:?}", i.code());
    if name.starts_with("Jcxz") || name.ends_with("_CX") {
        16
    } else if name.starts_with("Jecxz") || name.ends_with("_ECX") {
        32
    } else {
        64
    }
}

fn select_string(op: &mut Op, i: &Instruction, size: CodeSize) -> Option<Handler> {
    use string::Kind;
    if !i.is_string_instruction() {
        return None;
    }
    let bits = i.memory_size().size() as u32 * 8;
    let kind = match i.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => Kind::Movs,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => Kind::Stos,
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => Kind::Lods,
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => Kind::Cmps,
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => Kind::Scas,
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Kind::Ins,
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Kind::Outs,
        _ => return None,
    };
    op.b = (0..i.op_count()).find_map(|n| string_address_bits(i.op_kind(n))).unwrap_or(64);
    op.seg = segment_number(i, size);
    op.extra = if i.has_repne_prefix() {
        string::REPNE
    } else if i.has_rep_prefix() {
        string::REPE
    } else {
        string::ONCE
    };
    Some(string::select(kind, bits))
}

fn string_address_bits(kind: OpKind) -> Option<u8> {
    Some(match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 16,
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 32,
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 64,
        _ => return None,
    })
}
