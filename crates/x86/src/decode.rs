//! What every reader of decoded instructions needs beyond the decoder itself.

use iced_x86::{ConditionCode as C, Instruction};

/// The condition of Jcc, SETcc, CMOVcc as encoded: 0 for O to 15 for G (SDM 1 appendix B). 15 for what has none.
#[must_use]
pub fn condition(i: &Instruction) -> u8 {
    const ENCODED: [C; 15] =
        [C::o, C::no, C::b, C::ae, C::e, C::ne, C::be, C::a, C::s, C::ns, C::p, C::np, C::l, C::ge, C::le];
    (0..15).find(|&n| ENCODED[usize::from(n)] == i.condition_code()).unwrap_or(15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    #[test]
    fn condition_is_the_low_opcode_digit() {
        for n in 0..16 {
            let i = Decoder::new(64, &[0x70 | n, 0], DecoderOptions::NONE).decode();
            assert_eq!(condition(&i), n);
        }
    }
}
