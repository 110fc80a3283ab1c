//! Address types. A bare `u64` never stands for an address (see `docs/glossary.md`).

use serde::{Deserialize, Serialize};

/// Bytes in a small page.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Mask of the offset within a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// Guest virtual (linear) address: after segmentation, before paging.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[repr(transparent)]
pub struct Gva(pub u64);

/// Guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[repr(transparent)]
pub struct Gpa(pub u64);

/// Guest frame number: a guest physical address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[repr(transparent)]
pub struct Gfn(pub u64);

macro_rules! address {
    ($name:ident) => {
        impl $name {
            /// The address of the first byte of the page that holds `self`.
            #[must_use]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !PAGE_MASK)
            }

            /// Offset of `self` within its page, 0 to 4095.
            #[must_use]
            pub const fn page_offset(self) -> usize {
                (self.0 & PAGE_MASK) as usize
            }

            /// `self + bytes`, wrapping at 2^64.
            #[must_use]
            pub const fn add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }

        impl std::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}
address!(Gva);
address!(Gpa);

impl Gpa {
    /// The frame that holds this address.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Gfn {
    /// Address of the frame's first byte.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}
