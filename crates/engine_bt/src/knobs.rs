//! Stress knobs: what the suites turn to make rare paths common. For tests and for bisecting a wrong translation; no user needs them.
//!
//! `TRELLIS_BT=unit=1,warm=0,chain=off,fp=off,code=256K,tlb=off,forget=9` sets them for a process.

/// The knobs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Knobs {
    /// Instructions in a unit at most.
    pub unit: usize,
    /// How often a place is interpreted before it is translated.
    pub warm: u16,
    /// Direct jumps are linked.
    pub chain: bool,
    /// x87 and vector instructions run in fragments.
    pub fp: bool,
    /// Bytes of code memory.
    pub code_bytes: usize,
    /// The TLB keeps its entries from one entry into translated code to the next.
    pub tlb: bool,
    /// All translations are forgotten at every so many entries; 0: never.
    pub forget: u64,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            unit: bt::unit::MAX_INSTRUCTIONS,
            warm: 20,
            chain: true,
            fp: true,
            code_bytes: 64 << 20,
            tlb: true,
            forget: 0,
        }
    }
}

impl Knobs {
    /// The knobs of `TRELLIS_BT`; what cannot be read is left as it is.
    pub fn from_environment() -> Self {
        std::env::var("TRELLIS_BT").map_or_else(|_| Self::default(), |text| Self::parse(&text))
    }

    /// Knobs from text.
    pub fn parse(text: &str) -> Self {
        let mut k = Self::default();
        for (name, value) in text.split(',').filter_map(|part| part.split_once('=')) {
            let number = value.trim_end_matches(['K', 'k']).parse::<usize>();
            let on = !matches!(value, "off" | "0" | "no");
            match (name, number) {
                ("unit", Ok(n)) => k.unit = n,
                ("warm", Ok(n)) => k.warm = u16::try_from(n).unwrap_or(u16::MAX),
                ("code", Ok(n)) => k.code_bytes = (n << 10).clamp(64 << 10, 1 << 30),
                ("chain", _) => k.chain = on,
                ("fp", _) => k.fp = on,
                ("tlb", _) => k.tlb = on,
                ("forget", Ok(n)) => k.forget = n as u64,
                _ => {}
            }
        }
        k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_sets_what_it_knows() {
        let k = Knobs::parse("unit=1,warm=0,chain=off,fp=off,code=256K,tlb=off,forget=9,nonsense=1");
        let expected =
            Knobs { unit: 1, warm: 0, chain: false, fp: false, code_bytes: 256 << 10, tlb: false, forget: 9 };
        assert_eq!(k, expected);
        assert_eq!(Knobs::parse(""), Knobs::default());
    }
}
