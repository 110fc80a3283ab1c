//! Takes numbers from a fuzzer's bytes; when they run out, from a generator that continues them.

/// A cursor in the input.
pub struct Input<'a> {
    data: &'a [u8],
    state: u64,
}

impl<'a> Input<'a> {
    /// At the start of `data`.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        let state = data
            .iter()
            .fold(0x9e37_79b9_7f4a_7c15u64, |s, &b| (s ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self { data, state }
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        if let Some((&first, rest)) = self.data.split_first() {
            self.data = rest;
            return first;
        }
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.state.to_be_bytes()[0]
    }

    /// The next two bytes.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next eight bytes.
    pub fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u16) -> u16 {
        self.half() % n
    }

    /// A number of any magnitude: small, near a power of two, or anything.
    pub fn number(&mut self) -> u64 {
        match self.byte() & 3 {
            0 => u64::from(self.byte()),
            1 => (1u64 << (self.byte() & 63)).wrapping_add(u64::from(self.byte())).wrapping_sub(8),
            2 => u64::from(self.half()),
            _ => self.word(),
        }
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8]) {
        for byte in out {
            *byte = self.byte();
        }
    }
}
