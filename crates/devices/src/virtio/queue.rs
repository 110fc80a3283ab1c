//! The device's side of a split virtqueue (virtio 1.2 section 2.7).
//!
//! Way of the data: the driver writes descriptors and the available ring, and notifies → the transport calls
//! [`VirtioDevice::notify`](super::VirtioDevice::notify) → the device [`Queue::pop`]s a [`Chain`], works on its
//! segments, and [`Queue::push`]es it to the used ring → [`Queue::should_signal`] says whether the driver wants to
//! hear of it.
//!
//! Why our own: two neighbouring guest pages need not be neighbours in the host, and the machine page behind one may
//! change at any time, so there are no host pointers to a region, which is what the `virtio-queue` crate works on.
//! Everything here goes through [`GuestMemory`], page by page, with writes that honour its traces.
//!
//! The rings are written by a hostile guest, while we look at them:
//! - INV-VQ-1: every descriptor is read once, into a private copy; what was checked is what is used.
//! - INV-VQ-2: a chain visits at most the queue's size of direct descriptors and, in all, [`MAX_SEGMENTS`] segments, so
//!   that loops end.
//! - INV-VQ-3: no segment wraps around the address space. Whether it is RAM is found out, page by page, when it is used.
//! - INV-VQ-4: ring addresses are aligned as the specification demands, so that no ring field crosses a page, and the rings
//!   do not wrap around the address space.
//!
//! A violation gives a [`QueueError`]; the device then stops using the queue and asks for a reset.
//!
//! Order of accesses: host instructions on x86 keep loads before loads and stores before stores; only a store that must be
//! seen before a later load (publish an index, then look at the other side's wish) needs a fence, and has one.

use std::sync::atomic::{Ordering, fence};

use guestmem::{Gpa, GuestMemory, Scalar};
use serde::{Deserialize, Serialize};

use super::chain::{Chain, MAX_SEGMENTS, Segment};

/// Largest queue the specification allows (2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Bits of a descriptor's flags (2.7.5).
mod desc_flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY` (2.7.8).
const USED_NO_NOTIFY: u16 = 1;
const DESC_BYTES: u32 = 16;

/// What the driver did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A ring or a descriptor table is not in RAM.
    #[error("no RAM behind the virtqueue structure at {0:#x}")]
    Unbacked(u64),
    /// The available index ran ahead by more than the queue holds.
    #[error("available index {avail:#x} is more than {size:#x} ahead of {next:#x}")]
    AvailIndex {
        /// Index read.
        avail: u16,
        /// Next entry we expected to take.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A head or next field beyond its table.
    #[error("descriptor {index:#x} is beyond its table of {len:#x}")]
    DescriptorIndex {
        /// Index read.
        index: u16,
        /// Entries in the table.
        len: u32,
    },
    /// A chain that is longer than its table, or than any device accepts: a loop.
    #[error("descriptor chain from {head:#x} does not end")]
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// A segment that wraps around the address space.
    #[error("descriptor segment {gpa:#x}+{len:#x} wraps")]
    Wraps {
        /// Start.
        gpa: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A device-readable segment after a device-writable one (2.7.4.2).
    #[error("readable descriptor after a writable one in chain {head:#x}")]
    Order {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect descriptor where none may be, or a table of impossible length (2.7.5.3).
    #[error("bad indirect descriptor in chain {head:#x}")]
    Indirect {
        /// Head of the chain.
        head: u16,
    },
}

/// Where a queue lies and what was negotiated for it: the driver's choice, fixed while the queue runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring ("driver area").
    pub avail: u64,
    /// Used ring ("device area").
    pub used: u64,
}

impl Layout {
    /// Whether the queue can be run at all (INV-VQ-4; 2.7: size a power of two; alignments of 16, 2 and 4).
    #[must_use]
    pub const fn is_usable(&self) -> bool {
        let size = self.size as u64;
        self.desc.checked_add(16 * size).is_some()
            && self.avail.checked_add(6 + 2 * size).is_some()
            && self.used.checked_add(6 + 8 * size).is_some()
            && self.size != 0
            && self.size.is_power_of_two()
            && self.size <= MAX_QUEUE_SIZE
            && self.desc & 15 == 0
            && self.avail & 1 == 0
            && self.used & 3 == 0
    }
}

/// How far a queue has come: what a snapshot must hold beside its [`Layout`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Available-ring index of the next chain to take.
    pub next_avail: u16,
    /// Used-ring index of the next completion.
    pub next_used: u16,
    /// Used-ring index up to which [`Queue::should_signal`] has decided.
    pub signalled: u16,
}

/// A running split virtqueue.
#[derive(Clone, Debug)]
pub struct Queue {
    layout: Layout,
    position: Position,
    event_idx: bool,
    indirect: bool,
}

/// A descriptor, read once.
#[derive(Clone, Copy)]
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    const fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A table that a chain walks: where, how many entries.
#[derive(Clone, Copy)]
struct Table {
    gpa: Gpa,
    len: u32,
}

impl Table {
    fn read(self, mem: &GuestMemory, index: u16) -> Result<Descriptor, QueueError> {
        if u32::from(index) >= self.len {
            return Err(QueueError::DescriptorIndex { index, len: self.len });
        }
        let at = self.gpa.add(u64::from(index) * u64::from(DESC_BYTES));
        let mut raw = [0; 16];
        mem.read(at, &mut raw).map_err(|e| QueueError::Unbacked(e.0.0))?;
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        Ok(Descriptor {
            gpa: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// Stores a ring field with one instruction, so that the driver never sees half of it.
fn store<T: Scalar>(mem: &GuestMemory, gpa: Gpa, value: T) -> Result<(), QueueError> {
    let page = mem.page(gpa.gfn()).ok_or(QueueError::Unbacked(gpa.0))?;
    if page.writable {
        mem.store(guestmem::Hva(page.hva.0 | gpa.page_offset() as u64), value);
        mem.note_write(gpa, T::SIZE);
    }
    Ok(())
}

fn load(mem: &GuestMemory, gpa: Gpa) -> Result<u16, QueueError> {
    mem.load_gpa(gpa).ok_or(QueueError::Unbacked(gpa.0))
}

impl Queue {
    /// A queue at `layout`, if that is usable; `event_idx` and `indirect` as negotiated.
    #[must_use]
    pub fn new(layout: Layout, position: Position, event_idx: bool, indirect: bool) -> Option<Self> {
        layout.is_usable().then_some(Self { layout, position, event_idx, indirect })
    }

    /// How far the queue has come.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.position
    }

    /// Number of descriptors.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.layout.size
    }

    fn slot(&self, index: u16) -> u64 {
        // The size is a power of two (Layout::is_usable).
        u64::from(index & (self.layout.size - 1))
    }

    fn avail_idx(&self, mem: &GuestMemory) -> Result<u16, QueueError> {
        load(mem, Gpa(self.layout.avail).add(2))
    }

    /// Whether the driver has made chains available that were not taken yet.
    ///
    /// # Errors
    /// When the ring is not in RAM.
    pub fn has_work(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        Ok(self.avail_idx(mem)? != self.position.next_avail)
    }

    /// Takes the next available chain into `chain` (reused, to spare allocations). False when there is none.
    ///
    /// # Errors
    /// What the driver did wrong; nothing is taken then.
    pub fn pop(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        let next = self.position.next_avail;
        let avail = self.avail_idx(mem)?;
        if avail == next {
            return Ok(false);
        }
        if avail.wrapping_sub(next) > self.layout.size {
            return Err(QueueError::AvailIndex { avail, next, size: self.layout.size });
        }
        let head = load(mem, Gpa(self.layout.avail).add(4 + 2 * self.slot(next)))?;
        self.walk(mem, head, chain)?;
        self.position.next_avail = next.wrapping_add(1);
        Ok(true)
    }

    fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.begin(head);
        let mut table = Table { gpa: Gpa(self.layout.desc), len: u32::from(self.layout.size) };
        let mut in_indirect = false;
        let mut index = head;
        let mut visited = 0u32;
        loop {
            // INV-VQ-2: no table can hold a longer chain without repeating itself.
            if visited >= table.len || visited >= MAX_SEGMENTS {
                return Err(QueueError::Loop { head });
            }
            visited += 1;
            let d = table.read(mem, index)?;
            if d.has(desc_flag::INDIRECT) {
                if in_indirect || !self.indirect {
                    return Err(QueueError::Indirect { head });
                }
                table = Self::indirect_table(d, head)?;
                (in_indirect, index, visited) = (true, 0, 0);
                continue;
            }
            Self::add_segment(d, chain)?;
            if !d.has(desc_flag::NEXT) {
                return Ok(());
            }
            index = d.next;
        }
    }

    /// 2.7.5.3: the table's length is a multiple of the descriptor size; the flags say INDIRECT without NEXT, and WRITE
    /// is ignored.
    fn indirect_table(d: Descriptor, head: u16) -> Result<Table, QueueError> {
        let bytes = u64::from(d.len);
        let fits = bytes != 0 && d.len.is_multiple_of(DESC_BYTES) && d.gpa.checked_add(bytes).is_some();
        if d.has(desc_flag::NEXT) || !fits {
            return Err(QueueError::Indirect { head });
        }
        Ok(Table { gpa: Gpa(d.gpa), len: d.len / DESC_BYTES })
    }

    fn add_segment(d: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        if d.gpa.checked_add(u64::from(d.len)).is_none() {
            return Err(QueueError::Wraps { gpa: d.gpa, len: d.len });
        }
        let head = chain.head;
        if chain.readable.len() + chain.writable.len() >= MAX_SEGMENTS as usize {
            return Err(QueueError::Loop { head });
        }
        let segment = Segment { gpa: Gpa(d.gpa), len: d.len };
        if d.has(desc_flag::WRITE) {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(QueueError::Order { head });
        }
        Ok(())
    }

    /// Hands a chain back, with the number of bytes written to its writable segments.
    ///
    /// # Errors
    /// When the used ring is not in RAM.
    pub fn push(&mut self, mem: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_all(mem, std::iter::once((head, written)))
    }

    /// Hands chains back, each with the number of bytes written to it; the driver sees all of them or none, as it must where
    /// one packet fills several (virtio 1.2 5.1.6.4).
    ///
    /// # Errors
    /// When the used ring is not in RAM.
    pub fn push_all(
        &mut self,
        mem: &GuestMemory,
        chains: impl Iterator<Item = (u16, u32)>,
    ) -> Result<(), QueueError> {
        let used = Gpa(self.layout.used);
        let mut next = self.position.next_used;
        for (head, written) in chains {
            let element = used.add(4 + 8 * self.slot(next));
            // Two stores: the element is not the driver's before the index says so, and its halves never cross a page.
            store(mem, element, u32::from(head))?;
            store(mem, element.add(4), written)?;
            next = next.wrapping_add(1);
        }
        self.position.next_used = next;
        store(mem, used.add(2), next)
    }

    /// Undoes the last `count` takings of [`Queue::pop`]. What they read is read again, so the caller has used nothing of it.
    pub const fn rewind(&mut self, count: u16) {
        self.position.next_avail = self.position.next_avail.wrapping_sub(count);
    }

    /// Whether the driver wants an interrupt for what was pushed since the last question (2.7.7.2, 2.7.10).
    ///
    /// # Errors
    /// When the available ring is not in RAM.
    pub fn should_signal(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        let new = self.position.next_used;
        if self.position.signalled == new {
            return Ok(false);
        }
        // The used index must be visible before we read the driver's wish, or both sides could miss each other.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.position.signalled, new);
        let avail = Gpa(self.layout.avail);
        if !self.event_idx {
            return Ok(load(mem, avail)? & AVAIL_NO_INTERRUPT == 0);
        }
        let event = load(mem, avail.add(4 + 2 * u64::from(self.layout.size)))?;
        Ok(crossed(event, new, old))
    }

    /// Tells the driver that notifications are not needed for now: the device is looking anyway.
    /// Only a hint (2.7.9.2), and with `EVENT_IDX` none is needed: an event index in the past says it.
    ///
    /// # Errors
    /// When the used ring is not in RAM.
    pub fn suppress_notifications(&self, mem: &GuestMemory) -> Result<(), QueueError> {
        if self.event_idx { Ok(()) } else { store(mem, Gpa(self.layout.used), USED_NO_NOTIFY) }
    }

    /// Asks for a notification of the next available chain, then says whether one has come in already: then no
    /// notification can be relied on, and the device must look again.
    ///
    /// # Errors
    /// When a ring is not in RAM.
    pub fn want_notifications(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        self.want_notifications_beyond(mem, 0)
    }

    /// The same for a chain beyond the next `seen`, which are known and not taken, as they do not suffice.
    ///
    /// # Errors
    /// When a ring is not in RAM.
    pub fn want_notifications_beyond(&self, mem: &GuestMemory, seen: u16) -> Result<bool, QueueError> {
        let used = Gpa(self.layout.used);
        let known = self.position.next_avail.wrapping_add(seen);
        if self.event_idx {
            store(mem, used.add(4 + 8 * u64::from(self.layout.size)), known)?;
        } else {
            store(mem, used, 0u16)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.avail_idx(mem)? != known)
    }
}

/// 2.7.10.1 `vring_need_event`: whether the index passed `event` on its way from `old` to `new`.
const fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
