//! Translation units: the guest instructions that one translator call consumes, and which flags are live between them.

#![expect(clippy::cast_possible_truncation, reason = "offsets in a page")]

use iced_x86::{
    Code, Decoder, DecoderError, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
    Register, RflagsBits,
};

use crate::hints::Hints;
use crate::look::{flag_effects, is_write};
use crate::normal::{Decoding, normal};

/// Instructions in a unit at most.
pub const MAX_INSTRUCTIONS: usize = 48;
/// Instructions looked at beyond a unit's end for whether they overwrite the flags.
const PEEK: usize = 6;

/// The six arithmetic flags.
pub const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// A unit: instructions with their offsets in the page. It does not leave its page.
pub struct Unit {
    /// The instructions; their RIPs are offsets in the page.
    pub instructions: Vec<Instruction>,
    /// Offset of the first byte behind the unit.
    pub end: usize,
    /// What is known of its instructions.
    pub hints: Hints,
}

/// Reads the instructions of a page of code. One decoder for all: making one costs more than an instruction.
pub struct Reader<'a> {
    decoder: Decoder<'a>,
    page: &'a [u8; 4096],
}

impl<'a> Reader<'a> {
    /// Reads `page`.
    #[must_use]
    pub fn new(page: &'a [u8; 4096], decoding: Decoding) -> Self {
        Self { decoder: decoding.decoder(page, 0), page }
    }

    /// The page.
    #[must_use]
    pub const fn page(&self) -> &'a [u8; 4096] {
        self.page
    }

    /// From here on [`Reader::next`] reads. False: that is not in the page.
    fn go_to(&mut self, offset: usize) -> bool {
        self.decoder.set_ip(offset as u64);
        self.decoder.set_position(offset).is_ok()
    }

    /// The next instruction into `i`. False: it does not lie within the page.
    fn next(&mut self, i: &mut Instruction) -> bool {
        self.decoder.decode_out(i);
        if self.decoder.bitness() != 64 {
            *i = normal(*i, self.decoder.bitness());
        }
        self.decoder.last_error() == DecoderError::None
    }

    /// The unit at `offset`. `limit` bounds its instructions (1 for bisecting). Empty if the first instruction cannot be decoded within
    /// the page.
    #[must_use]
    pub fn form(&mut self, offset: usize, limit: usize) -> Unit {
        let mut unit = Unit { instructions: Vec::with_capacity(24), end: offset, hints: Hints::new() };
        if !self.go_to(offset) {
            return unit;
        }
        let limit = limit.clamp(1, MAX_INSTRUCTIONS);
        let mut ends = false;
        while !ends && unit.instructions.len() < limit {
            // Read where it is to be: instructions are large.
            unit.instructions.push(Instruction::default());
            let Some(i) = unit.instructions.last_mut() else { break };
            if self.next(i) {
                unit.end += i.len();
                ends = ends_unit(i) || takes_translations_back(i);
            } else {
                unit.instructions.pop();
                ends = true;
            }
        }
        unit
    }

    /// Flags that may be read before they are overwritten, from `offset` on; all of them where that is not seen. And the offset behind the bytes that
    /// this was read from.
    #[must_use]
    pub fn live_at(&mut self, offset: usize) -> (u32, usize) {
        let (mut live, mut unknown, mut at) = (0, STATUS, offset);
        let in_page = self.go_to(offset);
        let mut i = Instruction::default();
        for _ in 0..PEEK {
            if !in_page || !self.next(&mut i) {
                // What could not be decoded was looked at too.
                at = (at + MAX_LEN).min(4096);
                break;
            }
            at += i.len();
            let (read, written) = flag_effects(&i);
            live |= read & unknown;
            // DEVIATION: an instruction that can fault or call out shows flags that are dead to a handler, and they are not kept: that they
            // are dead for the code itself is enough, for handlers save and restore what they find. Code that then patches what follows
            // so that it reads them finds others.
            if i.flow_control() != FlowControl::Next {
                break;
            }
            unknown &= !written;
            if unknown == 0 {
                break;
            }
        }
        (live | unknown, at)
    }
}

/// Whether a unit ends with this instruction. It goes on behind a conditional jump that is not taken.
#[must_use]
pub fn ends_unit(i: &Instruction) -> bool {
    i.flow_control() != FlowControl::Next && !is_conditional(i)
}

/// Whether an instruction is a direct conditional jump behind which translated code goes on.
#[must_use]
pub fn is_conditional(i: &Instruction) -> bool {
    (i.is_jcc_short_or_near() || count(i).is_some()) && !is_narrow_branch(i)
}

/// Of a jump that looks at RCX or ECX: its opcode, and whether it is ECX. Those of CX are interpreted: 64-bit code has none.
#[must_use]
pub const fn count(i: &Instruction) -> Option<(u8, bool)> {
    match i.code() {
        Code::Loopne_rel8_64_RCX => Some((0xe0, false)),
        Code::Loope_rel8_64_RCX => Some((0xe1, false)),
        Code::Loop_rel8_64_RCX => Some((0xe2, false)),
        Code::Jrcxz_rel8_64 => Some((0xe3, false)),
        Code::Loopne_rel8_64_ECX | Code::Loopne_rel8_32_ECX | Code::Loopne_rel8_16_ECX => Some((0xe0, true)),
        Code::Loope_rel8_64_ECX | Code::Loope_rel8_32_ECX | Code::Loope_rel8_16_ECX => Some((0xe1, true)),
        Code::Loop_rel8_64_ECX | Code::Loop_rel8_32_ECX | Code::Loop_rel8_16_ECX => Some((0xe2, true)),
        Code::Jecxz_rel8_64 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_16 => Some((0xe3, true)),
        _ => None,
    }
}

/// Whether an instruction takes translations back. A unit ends behind it: what was learnt of them holds no more.
fn takes_translations_back(i: &Instruction) -> bool {
    switches_space(i) || i.mnemonic() == Mnemonic::Invlpg
}

/// Whether an instruction loads CR3.
#[must_use]
pub fn switches_space(i: &Instruction) -> bool {
    i.op0_register() == Register::CR3 && i.op_count() == 2 && i.op0_kind() == OpKind::Register
}

/// Whether a direct branch cuts its target to 16 bits: AMD's do with an operand-size prefix, in 64-bit code too (APM 3 Jcc). No compiler emits
/// it, so it is interpreted.
#[must_use]
pub fn is_narrow_branch(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::NearBranch16
}

/// Bytes of a unit that checks itself, at most.
pub const MAX_CHECKED_BYTES: usize = 112;

/// The unit at `offset` of code that changes often: what it is made of is compared where it is entered, so it ends with the first
/// instruction that may change what follows.
#[must_use]
pub fn form_checked(reader: &mut Reader<'_>, offset: usize, limit: usize) -> Unit {
    let mut unit = reader.form(offset, limit);
    let mut info = InstructionInfoFactory::new();
    let mut bytes = 0;
    let mut count = 0;
    for i in &unit.instructions {
        bytes += i.len();
        if bytes > MAX_CHECKED_BYTES {
            break;
        }
        count += 1;
        let writes = info.info(i).used_memory().iter().any(|m| is_write(m.access()));
        if writes || i.is_privileged() || i.is_string_instruction() {
            break;
        }
    }
    unit.instructions.truncate(count);
    unit.end = unit.instructions.last().map_or(offset, |i| i.ip() as usize + i.len());
    unit
}

/// The longest instruction (SDM 2A 2.3.11).
pub const MAX_LEN: usize = 15;

/// Whether an instruction at this offset may reach into the next page. Jumps to such a place are never linked: what is there depends
/// on two pages.
#[must_use]
pub const fn may_cross(offset: u64) -> bool {
    offset < 4096 && offset + MAX_LEN as u64 > 4096
}

/// The unit of the one instruction at `offset` that reaches into the next page, whose first bytes are `next`. Empty if there is none.
#[must_use]
pub fn form_crossing(page: &[u8; 4096], next: &[u8; MAX_LEN], offset: usize, decoding: Decoding) -> Unit {
    let mut unit = Unit { instructions: Vec::new(), end: offset, hints: Hints::new() };
    let mut bytes = page.get(offset..).unwrap_or_default().to_vec();
    bytes.extend_from_slice(next);
    bytes.truncate(MAX_LEN);
    let mut decoder = decoding.decoder(&bytes, offset as u64);
    let i = decoder.decode();
    if decoder.last_error() == DecoderError::None && offset + i.len() > 4096 {
        unit.end += i.len();
        unit.instructions.push(normal(i, decoding.bits));
    }
    unit
}
