//! A small deterministic random number generator (splitmix64), so that a seed replays a case on every host.

/// The generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

/// Values at which instructions tend to differ.
const CORNERS: [u64; 20] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
    u64::MAX - 1,
    0xffff_ffff_8000_0000,
    0x0102_0304_0506_0708,
];

impl Rng {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.0;
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`.
    pub const fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True in `percent` of 100 cases.
    pub const fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the slice.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    /// A corner value, a small one, or any.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0..3 => *self.pick(&CORNERS),
            3 => self.below(64),
            4 => self.next() & 0xffff_ffff,
            5 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    /// 16 bytes as a vector register or memory may hold them: corners of integers or floating-point numbers, or noise.
    pub fn lane16(&mut self) -> [u8; 16] {
        let mut out = [0u8; 16];
        match self.below(6) {
            0 => {
                for part in out.chunks_mut(8) {
                    part.copy_from_slice(&self.value().to_le_bytes());
                }
            }
            1 => {
                for part in out.chunks_mut(4) {
                    part.copy_from_slice(&self.float().to_le_bytes());
                }
            }
            2 => {
                for part in out.chunks_mut(8) {
                    part.copy_from_slice(&f64::from(self.float()).to_le_bytes());
                }
            }
            3 => {
                for part in out.chunks_mut(4) {
                    part.copy_from_slice(&(self.below(0x40) as u32).to_le_bytes());
                }
            }
            _ => {
                for part in out.chunks_mut(8) {
                    part.copy_from_slice(&self.next().to_le_bytes());
                }
            }
        }
        out
    }

    fn float(&mut self) -> f32 {
        const CORNER: [u32; 14] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            0x0000_0001,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
            0x4f00_0000,
            0x5f00_0000,
        ];
        match self.below(3) {
            0 => f32::from_bits(*self.pick(&CORNER)),
            1 => (self.below(2000) as f32 - 1000.0) / 8.0,
            _ => f32::from_bits(self.next() as u32),
        }
    }
}
