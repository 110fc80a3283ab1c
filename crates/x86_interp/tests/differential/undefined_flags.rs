//! Status flags that an instruction leaves undefined (SDM volumes 2A to 2C, "Flags Affected" of each instruction), and
//! results that are undefined. The test does not compare them, and no later instruction of a case may read them, even
//! where today's processors agree.

use iced_x86::{Instruction, Mnemonic as M, OpKind};
use x86::bits::rflags::{AF, CF, OF, PF, SF, ZF};

/// The count of a shift or rotate as the processor masks it, if it is known.
fn count(i: &Instruction, cl: Option<u8>) -> Option<u32> {
    let last = i.op_count() - 1;
    let raw = match i.op_kind(last) {
        OpKind::Immediate8 => Some(i.immediate8()),
        _ => cl,
    };
    // "The count is masked to 5 bits (or 6 bits if in 64-bit mode and REX.W is used)" (SDM 2B SAL/SAR/SHL/SHR).
    let mask = if width(i) == 64 { 63 } else { 31 };
    raw.map(|c| u32::from(c) & mask)
}

/// Width in bits of the first operand.
fn width(i: &Instruction) -> u32 {
    match i.op0_kind() {
        OpKind::Register => i.op0_register().size() as u32 * 8,
        _ => i.memory_size().size() as u32 * 8,
    }
}

/// Shifts: AF if the count is not 0; OF unless it is 1; CF if it is not less than the operand (SHL, SHR).
fn shift(i: &Instruction, cl: Option<u8>) -> u64 {
    let cf = if i.mnemonic() == M::Sar { 0 } else { CF };
    match count(i, cl) {
        None => AF | OF | if width(i) < 32 { cf } else { 0 },
        Some(0) => 0,
        Some(1) => AF,
        Some(n) if n >= width(i) => AF | OF | cf,
        Some(_) => AF | OF,
    }
}

/// Rotates: OF unless the count is 1 (or 0, which affects no flags).
fn rotate(i: &Instruction, cl: Option<u8>) -> u64 {
    match count(i, cl) {
        Some(0 | 1) => 0,
        _ => OF,
    }
}

/// SHLD, SHRD: AF if the count is not 0; OF unless it is 1; all if it is greater than the operand (SDM 2B SHLD).
fn double_shift(i: &Instruction, cl: Option<u8>) -> u64 {
    match count(i, cl) {
        Some(0) => 0,
        Some(1) => AF,
        Some(n) if n <= width(i) => AF | OF,
        Some(_) => CF | OF | SF | ZF | AF | PF,
        None if width(i) == 16 => CF | OF | SF | ZF | AF | PF,
        None => AF | OF,
    }
}

/// The flags that `i` leaves undefined; `cl` is CL before it, if that is known.
pub fn flags(i: &Instruction, cl: Option<u8>) -> u64 {
    match i.mnemonic() {
        // SDM 2A AND, 2B OR, TEST, XOR: "the state of the AF flag is undefined".
        M::And | M::Or | M::Xor | M::Test => AF,
        // SDM 2B MUL, 2A IMUL: "the SF, ZF, AF, and PF flags are undefined".
        M::Mul | M::Imul => SF | ZF | AF | PF,
        // SDM 2A DIV, IDIV: "the CF, OF, SF, ZF, AF, and PF flags are undefined".
        M::Div | M::Idiv => CF | OF | SF | ZF | AF | PF,
        M::Shl | M::Sal | M::Shr | M::Sar => shift(i, cl),
        // SDM 2B RCL/RCR/ROL/ROR: "the OF flag is affected only for single-bit rotates; undefined for multi-bit".
        M::Rol | M::Ror | M::Rcl | M::Rcr => rotate(i, cl),
        M::Shld | M::Shrd => double_shift(i, cl),
        // SDM 2A BT, BTC, BTR, BTS: "ZF is unaffected. OF, SF, AF, and PF are undefined".
        M::Bt | M::Bts | M::Btr | M::Btc => OF | SF | AF | PF,
        // SDM 2A BSF, BSR: "the CF, OF, SF, AF, and PF flags are undefined".
        M::Bsf | M::Bsr => CF | OF | SF | AF | PF,
        // SDM 2A LZCNT, 2B TZCNT: "OF, SF, PF, and AF flags are undefined".
        M::Lzcnt | M::Tzcnt => OF | SF | PF | AF,
        // SDM 2A ANDN, BLSI, BLSMSK, BLSR, BZHI: "AF and PF flags are undefined"; so TBM's (APM 3 BLCFILL …).
        M::Andn | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => AF | PF,
        // SDM 2A BEXTR: "AF, SF, and PF are undefined".
        M::Bextr => AF | SF | PF,
        // SDM 2A AAA, AAS: "the OF, SF, ZF, and PF flags are undefined".
        M::Aaa | M::Aas => OF | SF | ZF | PF,
        // SDM 2A AAD, AAM: "the OF, AF, and CF flags are undefined".
        M::Aad | M::Aam => OF | AF | CF,
        // SDM 2A DAA, DAS: "the OF flag is undefined".
        M::Daa | M::Das => OF,
        _ => 0,
    }
}

/// Whether the destination itself may be undefined.
pub fn result(i: &Instruction, cl: Option<u8>) -> bool {
    match i.mnemonic() {
        // SDM 2A BSWAP: "the result of 16-bit BSWAP is undefined".
        M::Bswap => i.op0_register().size() == 2,
        // SDM 2B SHLD, SHRD: "if a count is greater than the operand size, the result is undefined".
        M::Shld | M::Shrd => width(i) == 16 && count(i, cl).is_none_or(|n| n > 16),
        _ => false,
    }
}
