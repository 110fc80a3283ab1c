//! A descriptor ring (3.2.6, 3.4): head is the card's, tail the driver's; they are equal when the card has nothing.

use guestmem::{Gpa, GuestMemory};
use serde::{Deserialize, Serialize};

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: u32 = 16;

/// A descriptor as it lies in memory.
pub(super) type Descriptor = [u8; 16];

/// One ring's registers.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Ring {
    pub base: u64,
    pub len_bytes: u32,
    pub head: u32,
    pub tail: u32,
}

impl Ring {
    /// Descriptors.
    pub const fn size(&self) -> u32 {
        self.len_bytes / DESCRIPTOR
    }

    /// Descriptors that are the card's. None of a ring whose registers contradict each other, as drivers leave them in
    /// between.
    pub const fn filled(&self) -> u32 {
        let size = self.size();
        if self.head >= size || self.tail >= size {
            0
        } else if self.tail >= self.head {
            self.tail - self.head
        } else {
            size - self.head + self.tail
        }
    }

    /// Where the descriptor `ahead` of the head lies; `ahead` is below [`Ring::filled`].
    pub fn at(&self, ahead: u32) -> Gpa {
        let index = (self.head + ahead) % self.size().max(1);
        Gpa(self.base.wrapping_add(u64::from(index) * u64::from(DESCRIPTOR)))
    }

    /// The descriptor there, if that is RAM.
    pub fn read(&self, memory: &GuestMemory, ahead: u32) -> Option<Descriptor> {
        let mut raw = Descriptor::default();
        let gpa = self.at(ahead);
        gpa.0.checked_add(u64::from(DESCRIPTOR))?;
        memory.read(gpa, &mut raw).ok().map(|()| raw)
    }

    /// Moves the head on over `count` descriptors, no more than [`Ring::filled`].
    pub fn advance(&mut self, count: u32) {
        self.head = (self.head + count) % self.size().max(1);
    }
}
