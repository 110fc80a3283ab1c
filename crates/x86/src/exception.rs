//! Exceptions as one small value that travels through `Result`s at no cost.

use std::num::NonZeroU32;

/// An exception: vector and error code (SDM 3A 6.15). CR2 of a page fault travels beside it, in the vCPU.
///
/// Packed into a non-zero 32-bit word so that `Result<(), Exception>` is one register.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exception(NonZeroU32);

const MARK: u32 = 1 << 31;
const HAS_ERROR: u32 = 1 << 30;

#[expect(missing_docs, reason = "the manual's mnemonics")]
impl Exception {
    pub const DE: Self = Self::new(0);
    pub const DB: Self = Self::new(1);
    pub const BP: Self = Self::new(3);
    pub const OF: Self = Self::new(4);
    pub const BR: Self = Self::new(5);
    pub const UD: Self = Self::new(6);
    pub const NM: Self = Self::new(7);
    pub const DF: Self = Self::with_error(8, 0);
    pub const MF: Self = Self::new(16);
    pub const AC: Self = Self::with_error(17, 0);
    pub const XM: Self = Self::new(19);
    /// #GP(0)
    pub const GP0: Self = Self::gp(0);
    /// #SS(0)
    pub const SS0: Self = Self::ss(0);

    #[must_use]
    pub const fn ts(error: u16) -> Self {
        Self::with_error(10, error)
    }
    #[must_use]
    pub const fn np(error: u16) -> Self {
        Self::with_error(11, error)
    }
    #[must_use]
    pub const fn ss(error: u16) -> Self {
        Self::with_error(12, error)
    }
    #[must_use]
    pub const fn gp(error: u16) -> Self {
        Self::with_error(13, error)
    }
    #[must_use]
    pub const fn pf(error: u16) -> Self {
        Self::with_error(14, error)
    }
}

impl Exception {
    /// An exception without error code.
    #[must_use]
    pub const fn new(vector: u8) -> Self {
        match NonZeroU32::new(MARK | vector as u32) {
            Some(word) => Self(word),
            None => unreachable!(),
        }
    }

    /// An exception with an error code.
    #[must_use]
    pub const fn with_error(vector: u8, error: u16) -> Self {
        match NonZeroU32::new(MARK | HAS_ERROR | (error as u32) << 8 | vector as u32) {
            Some(word) => Self(word),
            None => unreachable!(),
        }
    }

    /// The vector, 0 to 31.
    #[must_use]
    pub const fn vector(self) -> u8 {
        (self.0.get() & 0xff) as u8
    }

    /// The error code, if this exception pushes one.
    #[must_use]
    pub const fn error_code(self) -> Option<u16> {
        if self.0.get() & HAS_ERROR == 0 { None } else { Some((self.0.get() >> 8 & 0xffff) as u16) }
    }
}

impl std::fmt::Debug for Exception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 22] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "#CSO", "#TS", "#NP", "#SS",
            "#GP", "#PF", "#15", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
        ];
        let vector = self.vector();
        match NAMES.get(usize::from(vector)) {
            Some(name) => f.write_str(name)?,
            None => write!(f, "#{vector}")?,
        }
        self.error_code().map_or(Ok(()), |e| write!(f, "({e:#x})"))
    }
}

/// Bits of a page fault's error code (SDM 3A 4.7).
#[expect(missing_docs, reason = "the manual's names")]
pub mod pf {
    pub const PRESENT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const USER: u16 = 4;
    pub const RSVD: u16 = 8;
    pub const FETCH: u16 = 16;
    pub const PKEY: u16 = 32;
}
