//! Stress knobs: what the suites turn to make rare paths common. For tests and for bisecting a wrong translation; no user needs them.
//!
//! `TRELLIS_BT=unit=1,warm=0,chain=off,fp=off,code=256K,tlb=off,forget=9,again=2,log=1,context=off,evict=5,check=on,adapt=1,helpers=off,rdtsc=callout` sets them for a process.

/// How long the frame's TLB keeps its entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlbKnob {
    /// Until they must go.
    All,
    /// Until an access needs another: there is one entry, and every access comes to Rust for it (`tlb=one`).
    One,
    /// Until translated code is entered again (`tlb=off`).
    Entry,
}

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
    /// How long the TLB keeps its entries.
    pub tlb: TlbKnob,
    /// All translations are forgotten at every so many entries; 0: never.
    pub forget: u64,
    /// Every so many fragments that the dispatcher finds are dropped, with all of their page, and made anew; 0: none.
    pub again: u64,
    /// Filled entries of TLB and jump cache that are remembered one by one, to be emptied; more are looked for in all of the table.
    pub log: u32,
    /// What is known by linear address (jump tables, links between pages) is trusted when the address space was switched since.
    pub context: bool,
    /// The next segment of code memory is emptied at every so many entries; 0: only when there is no room.
    pub evict: u64,
    /// Every fragment checks its bytes itself.
    pub check: bool,
    /// Guilty visits after which an instruction gets another form (`adapt=n`, `adapt=off`); [`u32::MAX`]: from the start (`adapt=all`).
    pub adapt: u32,
    /// The engine's assembly does instructions that would else be the interpreter's.
    pub helpers: bool,
    /// How RDTSC is done where it may be done in fragments.
    pub rdtsc: bt::TimeStamp,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            unit: bt::unit::MAX_INSTRUCTIONS,
            warm: 8,
            chain: true,
            fp: true,
            code_bytes: 128 << 20,
            tlb: TlbKnob::All,
            forget: 0,
            again: 0,
            log: bt::frame::LOG_ENTRIES,
            context: true,
            evict: 0,
            check: false,
            adapt: 64,
            helpers: true,
            rdtsc: bt::TimeStamp::Inline,
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
                ("tlb", _) => {
                    k.tlb = match value {
                        "one" => TlbKnob::One,
                        _ if on => TlbKnob::All,
                        _ => TlbKnob::Entry,
                    }
                }
                ("forget", Ok(n)) => k.forget = n as u64,
                ("again", Ok(n)) => k.again = n as u64,
                ("log", Ok(n)) => k.log = u32::try_from(n).unwrap_or(u32::MAX),
                ("context", _) => k.context = on,
                ("evict", Ok(n)) => k.evict = n as u64,
                ("check", _) => k.check = on,
                ("adapt", Ok(n)) => k.adapt = u32::try_from(n).unwrap_or(u32::MAX),
                ("adapt", _) if value == "all" => k.adapt = crate::adapt::ALL,
                ("adapt", Err(_)) if !on => k.adapt = 0,
                ("helpers", _) => k.helpers = on,
                ("rdtsc", _) => {
                    k.rdtsc = match value {
                        "trap" => bt::TimeStamp::Trap,
                        "callout" => bt::TimeStamp::Callout,
                        _ => bt::TimeStamp::Inline,
                    }
                }
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
        let text = "unit=1,warm=0,chain=off,fp=off,code=256K,tlb=off,forget=9,again=2,log=1,context=off,evict=5,check=on,\
                    adapt=1,helpers=off,rdtsc=trap,nonsense=1";
        let k = Knobs::parse(text);
        let expected = Knobs {
            unit: 1,
            warm: 0,
            chain: false,
            fp: false,
            code_bytes: 256 << 10,
            tlb: TlbKnob::Entry,
            forget: 9,
            again: 2,
            log: 1,
            context: false,
            evict: 5,
            check: true,
            adapt: 1,
            helpers: false,
            rdtsc: bt::TimeStamp::Trap,
        };
        assert_eq!(k, expected);
        assert_eq!(Knobs::parse("tlb=one").tlb, TlbKnob::One);
        assert_eq!(Knobs::parse("adapt=off").adapt, 0);
        assert_eq!(Knobs::parse(""), Knobs::default());
    }
}
