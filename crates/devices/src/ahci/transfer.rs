//! A command's data in guest memory: the physical region descriptor table of its command table (AHCI 4.2.3).

use std::sync::Arc;

use guestmem::{Gpa, GuestMemory};

/// The table's offset in the command table.
const TABLE_AT: u64 = 0x80;
/// Bytes of an entry.
const ENTRY_BYTES: u64 = 16;
/// Byte count of an entry, less one.
const COUNT_MASK: u32 = (1 << 22) - 1;

/// Why data could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The table ends before the data does.
    Overflow,
    /// A place, or the table, is no memory.
    NoMemory,
}

/// A place in the table. Entries are read when they are reached, so that their number costs nothing.
pub(super) struct Places {
    memory: Arc<GuestMemory>,
    /// The next entry.
    entry: u64,
    entries_left: u32,
    /// What is left of the current entry.
    at: u64,
    left: u64,
    /// Bytes moved.
    pub done: u64,
}

impl Places {
    pub fn new(memory: &Arc<GuestMemory>, command_table: u64, entries: u16) -> Self {
        Self {
            memory: Arc::clone(memory),
            entry: command_table.wrapping_add(TABLE_AT),
            entries_left: entries.into(),
            at: 0,
            left: 0,
            done: 0,
        }
    }

    /// The next piece, of at most `most` bytes.
    fn piece(&mut self, most: usize) -> Result<(Gpa, usize), Trouble> {
        if self.left == 0 {
            self.entries_left = self.entries_left.checked_sub(1).ok_or(Trouble::Overflow)?;
            let mut raw = [0; 16];
            self.memory.read(Gpa(self.entry), &mut raw).map_err(|_| Trouble::NoMemory)?;
            self.entry = self.entry.wrapping_add(ENTRY_BYTES);
            let [b0, b1, b2, b3, b4, b5, b6, b7, .., c0, c1, c2, c3] = raw;
            // Bit 0 of the address is reserved.
            self.at = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]) & !1;
            self.left = u64::from(u32::from_le_bytes([c0, c1, c2, c3]) & COUNT_MASK) + 1;
        }
        let now = usize::try_from(self.left).unwrap_or(most).min(most);
        let piece = (Gpa(self.at), now);
        self.at = self.at.wrapping_add(now as u64);
        self.left -= now as u64;
        self.done += now as u64;
        Ok(piece)
    }

    /// Data to the guest.
    pub fn write(&mut self, mut data: &[u8]) -> Result<(), Trouble> {
        while !data.is_empty() {
            let (gpa, now) = self.piece(data.len())?;
            let (this, rest) = data.split_at(now);
            self.memory.write(gpa, this).map_err(|_| Trouble::NoMemory)?;
            data = rest;
        }
        Ok(())
    }

    /// Data from the guest.
    pub fn read(&mut self, mut data: &mut [u8]) -> Result<(), Trouble> {
        while !data.is_empty() {
            let (gpa, now) = self.piece(data.len())?;
            let (this, rest) = data.split_at_mut(now);
            self.memory.read(gpa, this).map_err(|_| Trouble::NoMemory)?;
            data = rest;
        }
        Ok(())
    }
}
