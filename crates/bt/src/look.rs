//! What a translation asks of an instruction again and again, found once.
//!
//! iced-x86 knows all of it, but its answers are general and take long: half of a translation's time went there. What does not depend on the operands is
//! kept in a table of all instruction codes; what a table cannot tell is still asked of iced-x86 ([`Effect::Ask`]).

use std::sync::LazyLock;

use iced_x86::{
    Code, ConditionCode, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register,
};

use crate::unit::STATUS;

/// What an instruction writes, flags set aside.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Effect {
    /// To be asked.
    #[default]
    Ask,
    /// Neither memory nor a general register.
    Nothing,
    /// Its first operand.
    First,
    /// RSP and the stack, in 64-bit code.
    Push,
    /// RSP and its first operand, in 64-bit code.
    Pop,
    /// RSP, in 64-bit code.
    Return,
}

/// What is known of an instruction by its code.
#[derive(Clone, Copy)]
struct Traits {
    /// See [`Look::read`] and [`Look::written`].
    read: u8,
    written: u8,
    touches: bool,
    /// The flags depend on the operands too.
    special: bool,
    falls: bool,
    ident: bool,
    effect: Effect,
}

static TRAITS: LazyLock<Vec<Traits>> = LazyLock::new(|| Code::values().map(Traits::of).collect());

/// What is to be known of an instruction.
#[derive(Clone, Copy, Default, Debug)]
pub struct Look {
    /// Arithmetic flags that it reads.
    pub read: u32,
    /// Those that it overwrites whatever happens.
    pub written: u32,
    /// It may change some.
    pub touches: bool,
    /// Control goes on behind it.
    pub falls: bool,
    /// It may be executed as it is, its operands renamed.
    pub ident: bool,
    /// It has a memory operand with a ModRM byte, as we see it.
    pub memory: bool,
    /// It names a general register that is another in the host: RSP, or one that lives in the frame.
    pub renamed: bool,
    /// It writes memory. Of what is not [`Look::is_known`], known when [`Look::each_written`] has asked.
    pub writes: bool,
    effect: Effect,
}

impl Traits {
    fn of(code: Code) -> Self {
        let mut i = Instruction::default();
        i.set_code(code);
        let (read, written) = flags_of(&i);
        let flag_bits = |flags: u32| u8::try_from(flags).unwrap_or(u8::MAX);
        Self {
            read: flag_bits(read),
            written: flag_bits(written),
            touches: i.rflags_modified() & STATUS != 0,
            special: is_shift(i.mnemonic()) || matches!(i.mnemonic(), Mnemonic::Xor | Mnemonic::Sub),
            falls: i.flow_control() == FlowControl::Next,
            ident: is_ident(&i),
            effect: effect(code),
        }
    }
}

fn traits(i: &Instruction) -> Traits {
    // The table has all codes.
    TRAITS[i.code() as usize]
}

/// Flags that an instruction reads, and that it overwrites whatever happens.
#[must_use]
pub fn flag_effects(i: &Instruction) -> (u32, u32) {
    flags_by(traits(i), i)
}

#[inline]
fn flags_by(known: Traits, i: &Instruction) -> (u32, u32) {
    if known.special || i.has_rep_prefix() || i.has_repne_prefix() {
        return flags_of(i);
    }
    (u32::from(known.read), u32::from(known.written))
}

/// As [`flag_effects`], without the table.
fn flags_of(i: &Instruction) -> (u32, u32) {
    let read = i.rflags_read() & STATUS;
    let mut written = i.rflags_modified() & STATUS;
    if may_leave_flags(i) {
        written = 0;
    }
    (read, written)
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Shifts by a count that may be zero leave the flags alone then; REP string instructions with a count of zero too. MOV of control and
/// debug registers leaves them undefined by the manual (SDM 2B MOV), alone on every processor.
fn may_leave_flags(i: &Instruction) -> bool {
    if !is_shift(i.mnemonic()) {
        return i.mnemonic() == Mnemonic::Mov || i.has_rep_prefix() || i.has_repne_prefix();
    }
    let last = i.op_count().saturating_sub(1);
    i.op_kind(last) == OpKind::Register || i.immediate(last) & 0x1f == 0
}

/// Instructions that may be executed as they are, their operands renamed, if they name general registers only.
fn is_ident(i: &Instruction) -> bool {
    use Mnemonic as M;
    let plain = matches!(
        i.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Movbe
            | M::Movnti
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Lahf
            | M::Sahf
    );
    let extended = matches!(
        i.mnemonic(),
        M::Popcnt
            | M::Lzcnt
            | M::Tzcnt
            | M::Crc32
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Adcx
            | M::Adox
    );
    let fence = matches!(i.mnemonic(), M::Pause | M::Lfence | M::Mfence | M::Sfence);
    let conditional = i.condition_code() != ConditionCode::None && i.flow_control() == FlowControl::Next;
    plain || extended || fence || conditional
}

/// What instructions of a code write. Those that are frequent; others are asked.
fn effect(code: Code) -> Effect {
    use Mnemonic as M;
    if code.encoding() != EncodingKind::Legacy {
        return Effect::Ask;
    }
    match code {
        Code::Push_r64 | Code::Pushq_imm32 | Code::Pushq_imm8 | Code::Call_rel32_64 => return Effect::Push,
        Code::Pop_r64 => return Effect::Pop,
        Code::Retnq => return Effect::Return,
        // One operand: RAX and RDX are written.
        Code::Imul_rm8 | Code::Imul_rm16 | Code::Imul_rm32 | Code::Imul_rm64 => return Effect::Ask,
        _ => {}
    }
    match code.mnemonic() {
        M::Cmp | M::Test | M::Nop | M::Endbr64 | M::Ucomiss | M::Ucomisd | M::Comiss | M::Comisd => {
            Effect::Nothing
        }
        _ if code.is_jcc_short_or_near() || code.is_jmp_short_or_near() => Effect::Nothing,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Add | M::Or | M::Adc | M::Sbb | M::And => {
            Effect::First
        }
        M::Sub | M::Xor | M::Inc | M::Dec | M::Neg | M::Not | M::Imul | M::Bswap => Effect::First,
        M::Movaps | M::Movups | M::Movapd | M::Movupd | M::Movdqa | M::Movdqu | M::Movd | M::Movq => {
            Effect::First
        }
        M::Movss | M::Movsd | M::Movlps | M::Movhps | M::Movlpd | M::Movhpd => Effect::First,
        M::Pxor | M::Xorps | M::Xorpd | M::Punpcklqdq | M::Pshufd | M::Cvtsi2sd | M::Cvttsd2si => {
            Effect::First
        }
        M::Addss | M::Addsd | M::Subss | M::Subsd | M::Mulss | M::Mulsd | M::Divss | M::Divsd => {
            Effect::First
        }
        mnemonic if is_shift(mnemonic) => Effect::First,
        _ if code.condition_code() != ConditionCode::None && code.flow_control() == FlowControl::Next => {
            Effect::First
        }
        _ => Effect::Ask,
    }
}

/// Whether operands of this kind are what they are whatever the instruction: registers, a memory operand with a ModRM byte, constants.
const fn is_plain(kind: OpKind) -> bool {
    matches!(kind, OpKind::Memory) || (kind as u32) < OpKind::MemorySegSI as u32
}

/// See [`gpr_number`].
const GPR_NUMBERS: [u8; 256] = {
    let mut numbers = [u8::MAX; 256];
    let mut r = 1;
    while r <= 68 {
        // AL to BL, AH to BH, SPL to R15L, and three times sixteen in order.
        numbers[r as usize] = match r {
            1..=4 => r - 1,
            5..=8 => r - 5,
            9..=20 => r - 5,
            _ => (r - 21) & 15,
        };
        r += 1;
    }
    numbers
};

/// The number of a general register; above 15 for what is none.
#[must_use]
pub const fn gpr_number(r: Register) -> u8 {
    let index = r as u8;
    GPR_NUMBERS[index as usize]
}

impl Look {
    /// Looks at an instruction.
    #[must_use]
    #[inline]
    pub fn at(i: &Instruction) -> Self {
        let known = traits(i);
        let (read, written) = flags_by(known, i);
        let mut look = Self {
            read,
            written,
            touches: known.touches,
            falls: known.falls,
            ident: known.ident,
            effect: known.effect,
            ..Self::default()
        };
        if known.special {
            look.touches = i.rflags_modified() & STATUS != 0;
        }
        let count = i.op_count();
        let first = [
            (i.op0_kind(), i.op0_register()),
            (i.op1_kind(), i.op1_register()),
            (i.op2_kind(), i.op2_register()),
        ];
        first.into_iter().take(count as usize).for_each(|(kind, r)| look.has(kind, r));
        (3..count).for_each(|n| look.has(i.op_kind(n), i.op_register(n)));
        // A shift by nothing writes nothing. To pop RSP is something else.
        if known.special && !look.touches || look.effect == Effect::Pop && i.op0_register() == Register::RSP {
            look.effect = Effect::Ask;
        }
        look.writes =
            look.effect == Effect::Push || look.effect == Effect::First && i.op0_kind() == OpKind::Memory;
        look
    }

    /// It has this operand; the register counts if it is one.
    #[inline]
    fn has(&mut self, kind: OpKind, r: Register) {
        match kind {
            OpKind::Register => {
                let number = gpr_number(r);
                self.ident &= number < 16;
                self.renamed |= matches!(number, 4 | 13..=15);
            }
            OpKind::Memory => self.memory = true,
            kind if is_plain(kind) => {}
            _ => self.effect = Effect::Ask,
        }
    }

    /// Whether it is known without asking what it writes.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.effect != Effect::Ask
    }

    /// Tells each general register that the instruction writes, and notes whether it writes memory.
    pub fn each_written(
        &mut self,
        i: &Instruction,
        info: &mut InstructionInfoFactory,
        mut tell: impl FnMut(Register),
    ) {
        let mut tell_gpr = |r: Register| {
            if r.is_gpr() {
                tell(r);
            }
        };
        match self.effect {
            Effect::Nothing => {}
            Effect::First if self.writes => {}
            Effect::First => tell_gpr(i.op0_register()),
            Effect::Push | Effect::Return => tell_gpr(Register::RSP),
            Effect::Pop => {
                tell_gpr(Register::RSP);
                tell_gpr(i.op0_register());
            }
            Effect::Ask => {
                let info = info.info(i);
                self.writes = info.used_memory().iter().any(|m| is_write(m.access()));
                let written = info.used_registers().iter().filter(|u| is_write(u.access()));
                written.for_each(|u| tell_gpr(u.register()));
            }
        }
    }
}

/// Whether an access may write.
#[must_use]
pub const fn is_write(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normal::Decoding;

    /// Instructions of all kinds: what random bytes are.
    fn each(mut see: impl FnMut(&Instruction)) {
        let mut seed = 0x1234_5678_9abc_def1_u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()
        };
        for round in 0..400_000 {
            let mut bytes: [u8; 16] = [random(), random()].concat().try_into().unwrap();
            // The second opcode map is as large as the first.
            match round & 7 {
                0 | 1 => bytes[0] = 0x0f,
                2 => bytes[..2].copy_from_slice(&[0x48, 0x0f]),
                3 => bytes[0] = 0x48,
                _ => {}
            }
            for bits in [64, 32, 16] {
                let i = Decoding { bits, amd: false }.decoder(&bytes, 0).decode();
                if !i.is_invalid() {
                    see(&crate::normal::normal(i, bits));
                }
            }
        }
    }

    #[test]
    fn gpr_numbers_are_those_of_the_full_registers() {
        for r in Register::values() {
            let number = if r.is_gpr() { r.full_register().number() } else { 255 };
            assert_eq!(usize::from(gpr_number(r)), number, "{r:?}");
        }
    }

    #[test]
    fn look_says_what_is_true_of_the_instruction() {
        each(|i| {
            let look = Look::at(i);
            assert_eq!((look.read, look.written), flags_of(i), "{i}");
            assert_eq!(look.touches, i.rflags_modified() & STATUS != 0, "{i}");
            assert_eq!(look.falls, i.flow_control() == FlowControl::Next, "{i}");
            let mut operands = 0..i.op_count();
            assert_eq!(look.memory, operands.any(|n| i.op_kind(n) == OpKind::Memory), "{i}");
            let registers = || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register);
            let gprs_only = registers().all(|n| i.op_register(n).is_gpr());
            assert_eq!(look.ident, is_ident(i) && gprs_only, "{i}");
        });
    }

    #[test]
    fn what_is_written_is_what_iced_says() {
        let mut factory = InstructionInfoFactory::new();
        let mut known = std::collections::HashSet::new();
        each(|i| {
            let mut look = Look::at(i);
            if look.effect == Effect::Ask {
                return;
            }
            known.insert(i.code());
            let mut written = Vec::new();
            look.each_written(i, &mut factory, |r| written.push(r.full_register()));
            let info = factory.info(i);
            assert_eq!(look.writes, info.used_memory().iter().any(|m| is_write(m.access())), "{i}");
            let registers = info.used_registers().iter().filter(|u| is_write(u.access()));
            let mut wanted: Vec<_> =
                registers.map(|u| u.register()).filter(|r| r.is_gpr()).map(Register::full_register).collect();
            wanted.sort_unstable();
            written.sort_unstable();
            assert_eq!(written, wanted, "{i} {:?}", i.code());
        });
        assert!(known.len() > 300, "{} codes", known.len());
    }
}
