//! The bit counts and BMI1 in plain Rust: kernels use them all the time, and a stub's POPF costs more than they do.
//! Flags that the manual calls undefined are as AMD's family 19H leaves them.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86::Exception;
use x86::bits::rflags::{CF, OF, PF, SF, ZF};

use super::{VectorCpu, VectorOp};

/// What is computed from `a` (the first source; for one source unused) and `b` (the last).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Function {
    Popcnt,
    Tzcnt,
    Lzcnt,
    Andn,
    Blsr,
    Blsi,
    Blsmsk,
}

/// A resolved instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalar {
    function: Function,
    /// Destination register.
    dst: u8,
    /// First source of ANDN.
    a: u8,
    /// Last source, or memory.
    b: Option<u8>,
    /// Operand size: 2, 4 or 8 bytes.
    size: u8,
}

impl Scalar {
    /// Resolves `i`, if it is one of these.
    pub fn new(i: &Instruction) -> Option<Self> {
        let function = match i.mnemonic() {
            Mnemonic::Popcnt => Function::Popcnt,
            Mnemonic::Tzcnt => Function::Tzcnt,
            Mnemonic::Lzcnt => Function::Lzcnt,
            Mnemonic::Andn => Function::Andn,
            Mnemonic::Blsr => Function::Blsr,
            Mnemonic::Blsi => Function::Blsi,
            Mnemonic::Blsmsk => Function::Blsmsk,
            _ => return None,
        };
        let register = |op: u32| u8::try_from(i.op_register(op).number()).ok();
        let last = i.op_count().checked_sub(1)?;
        Some(Self {
            function,
            dst: register(0)?,
            a: if last == 2 { register(1)? } else { 0 },
            b: if i.op_kind(last) == OpKind::Memory { None } else { Some(register(last)?) },
            size: u8::try_from(i.op_register(0).size()).ok()?,
        })
    }
}

/// Result, the flags set, and the flags that keep their value.
fn compute(function: Function, a: u64, b: u64, bits: u32) -> (u64, u64, u64) {
    let mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
    let zf = |r: u64| if r & mask == 0 { ZF } else { 0 };
    let sf = |r: u64| if r >> (bits - 1) & 1 != 0 { SF } else { 0 };
    let pf = |r: u64| if (r & 0xff).count_ones().is_multiple_of(2) { PF } else { 0 };
    let cf = |c: bool| if c { CF } else { 0 };
    match function {
        Function::Popcnt => (u64::from(b.count_ones()), zf(b), 0),
        Function::Tzcnt => {
            let r = u64::from(b.trailing_zeros().min(bits));
            (r, cf(b == 0) | zf(r), OF)
        }
        Function::Lzcnt => {
            let r = u64::from(b.leading_zeros().wrapping_sub(64 - bits));
            (r, cf(b == 0) | zf(r), OF)
        }
        Function::Andn => {
            let r = !a & b & mask;
            (r, zf(r) | sf(r) | pf(r), 0)
        }
        Function::Blsr => {
            let r = b & b.wrapping_sub(1);
            (r, zf(r) | sf(r) | pf(r) | cf(b == 0), 0)
        }
        Function::Blsi => {
            let r = b & b.wrapping_neg();
            (r, zf(r) | sf(r) | pf(r) | cf(b != 0), 0)
        }
        Function::Blsmsk => {
            let r = (b ^ b.wrapping_sub(1)) & mask;
            (r, sf(r) | pf(r) | cf(b == 0), 0)
        }
    }
}

pub(super) fn execute<C: VectorCpu>(s: Scalar, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let bits = u32::from(s.size) * 8;
    let mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
    let b = match s.b {
        Some(r) => cpu.gpr(usize::from(r)) & mask,
        None => {
            let offset = op.operand(cpu)?;
            let mut data = [0; 8];
            cpu.read(op.segment(), offset, &mut data[..usize::from(s.size).min(8)])?;
            u64::from_le_bytes(data)
        }
    };
    let a = cpu.gpr(usize::from(s.a)) & mask;
    let (result, flags, kept) = compute(s.function, a, b, bits);
    let dst = usize::from(s.dst);
    let result = if s.size == 2 { cpu.gpr(dst) & !mask | result & mask } else { result & mask };
    cpu.set_gpr(dst, result);
    let old = if kept == 0 { 0 } else { cpu.rflags() & kept };
    cpu.set_status_flags(old | flags);
    Ok(())
}
