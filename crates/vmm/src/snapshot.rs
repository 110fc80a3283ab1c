//! The whole machine as bytes.
//!
//! | bytes | what |
//! |---|---|
//! | 16 | `TRELLIS-SNAPSHOT` |
//! | 4 | version of this layout, little-endian |
//! | 8 | length of the state in bytes |
//! | … | the state: JSON of [`State`] (device states carry versions of their own) |
//! | 8 + 4096 each | number of a page of machine memory and its content; pages of zeros are left out |
//! | 8 | all ones: the end |
//!
//! Reading treats the bytes as untrusted: lengths and page numbers are checked, device states by their devices.
//!
// DEVIATION: the map from guest pages to machine pages is not saved; it is the identity of `GuestMemory::new` as yet.

use std::io::{self, Read, Write};

use devices::snapshot::{RestoreError, StateBlob};
use guestmem::{GuestMemory, Hva};
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use x86::CpuState;
use x86::addr::PAGE_SIZE;

use crate::clock::ClockState;

const MAGIC: &[u8; 16] = b"TRELLIS-SNAPSHOT";
const VERSION: u32 = 1;
/// More state than any machine has.
const MAX_STATE_BYTES: u64 = 256 << 20;
const END: u64 = u64::MAX;
const PAGE: usize = 4096;

/// A snapshot that cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Reading or writing it.
    #[error("cannot read or write the snapshot: {0}")]
    Io(#[from] io::Error),
    /// No snapshot.
    #[error("this is no snapshot of a machine: it does not begin with {:?}", "TRELLIS-SNAPSHOT")]
    NoSnapshot,
    /// Of another version.
    #[error("the snapshot has layout version {0}, this program knows {VERSION}")]
    Version(u32),
    /// Damaged.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// For another machine than this configuration makes.
    #[error("the snapshot does not fit this machine: {0}")]
    Unfit(String),
    /// A device's state.
    #[error(transparent)]
    Device(#[from] RestoreError),
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SavedVcpu {
    pub state: CpuState,
    /// NMI, INIT and start-up requests that it has not taken yet ([`engine::Signals`]).
    pub pending: u32,
}

/// Everything but memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    pub memory_bytes: u64,
    pub cpu: String,
    pub clock: ClockState,
    pub vcpus: Vec<SavedVcpu>,
    pub devices: Vec<StateBlob>,
}

/// A page of machine memory: its number, its content.
type SavedPage = (u64, Box<[u8]>);

/// A machine at rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub(crate) state: State,
    /// Number and content of the pages of machine memory that are not zero, ascending.
    pages: Vec<SavedPage>,
}

impl Snapshot {
    /// With the memory of `mem`.
    pub(crate) fn new(state: State, mem: &GuestMemory) -> Result<Self, SnapshotError> {
        Ok(Self { state, pages: nonzero_pages(mem)? })
    }

    /// Writes the pages to `mem`, which is zero.
    pub(crate) fn fill(&self, mem: &GuestMemory) {
        for (number, page) in &self.pages {
            mem.write_machine(Hva(number * PAGE_SIZE), page);
        }
    }

    /// Pages of memory in it.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Writes it.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_to(&self, mut to: impl Write) -> Result<(), SnapshotError> {
        let state = serde_json::to_vec(&self.state).map_err(|e| SnapshotError::Damaged(e.to_string()))?;
        to.write_all(MAGIC)?;
        to.write_all(&VERSION.to_le_bytes())?;
        to.write_all(&(state.len() as u64).to_le_bytes())?;
        to.write_all(&state)?;
        for (number, page) in &self.pages {
            to.write_all(&number.to_le_bytes())?;
            to.write_all(page)?;
        }
        to.write_all(&END.to_le_bytes())?;
        Ok(to.flush()?)
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is none, of another version or damaged.
    pub fn read_from(mut from: impl Read) -> Result<Self, SnapshotError> {
        let mut magic = [0; 16];
        from.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(SnapshotError::NoSnapshot);
        }
        let mut version = [0; 4];
        from.read_exact(&mut version)?;
        match u32::from_le_bytes(version) {
            VERSION => {}
            other => return Err(SnapshotError::Version(other)),
        }
        let len = read_u64(&mut from)?;
        if len > MAX_STATE_BYTES {
            return Err(SnapshotError::Damaged(format!("its state would have {len:#x} bytes")));
        }
        let mut bytes = Vec::new();
        from.by_ref().take(len).read_to_end(&mut bytes)?;
        let state: State =
            serde_json::from_slice(&bytes).map_err(|e| SnapshotError::Damaged(e.to_string()))?;
        let pages = read_pages(from, state.memory_bytes / PAGE_SIZE)?;
        Ok(Self { state, pages })
    }

    /// It as bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let written = self.write_to(&mut bytes);
        debug_assert!(written.is_ok(), "plain data serialises, memory takes all bytes");
        bytes
    }

    /// One from bytes.
    ///
    /// # Errors
    /// As [`Snapshot::read_from`].
    pub fn from_slice(bytes: &[u8]) -> Result<Self, SnapshotError> {
        Self::read_from(bytes)
    }
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Pages with ascending numbers below `limit`, up to the end mark.
fn read_pages(mut from: impl Read, limit: u64) -> Result<Vec<SavedPage>, SnapshotError> {
    let mut pages: Vec<SavedPage> = Vec::new();
    loop {
        let number = read_u64(&mut from)?;
        if number == END {
            return Ok(pages);
        }
        if number >= limit || pages.last().is_some_and(|&(last, _)| number <= last) {
            return Err(SnapshotError::Damaged(format!("memory page {number:#x} is out of place")));
        }
        let mut page = vec![0; PAGE].into_boxed_slice();
        from.read_exact(&mut page)?;
        pages.push((number, page));
    }
}

/// The pages of machine memory that are not zero. Read through the file, so that holes stay holes.
fn nonzero_pages(mem: &GuestMemory) -> Result<Vec<SavedPage>, SnapshotError> {
    let file = mem.memfd();
    let seek = |to| match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None), // nothing but holes from there
        Err(error) => Err(io::Error::from(error)),
    };
    let mut pages = Vec::new();
    let mut at = 0;
    while at < mem.len_bytes() {
        let Some(start) = seek(SeekFrom::Data(at))? else { break };
        let end = seek(SeekFrom::Hole(start))?.unwrap_or(mem.len_bytes());
        for number in start / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
            let mut page = vec![0; PAGE].into_boxed_slice();
            mem.read_machine(Hva(number * PAGE_SIZE), &mut page);
            if page.iter().any(|&byte| byte != 0) {
                pages.push((number, page));
            }
        }
        at = end.max(start + 1);
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClockMode;

    fn sample() -> Snapshot {
        let mem = GuestMemory::new(64 << 20).unwrap();
        mem.write_machine(Hva(0x5000), &[1; 10]);
        mem.write_machine(Hva(0x3f0_0ffe), &[2; 4]);
        let clock = ClockState { mode: ClockMode::Icount, tsc_hz: 1_000_000_000, tsc: 7, wall_base_ns: 8 };
        let vcpus = vec![SavedVcpu { state: CpuState::reset(), pending: 2 }];
        let devices = Vec::new();
        let state = State { memory_bytes: 64 << 20, cpu: "max".to_owned(), clock, vcpus, devices };
        Snapshot::new(state, &mem).unwrap()
    }

    #[test]
    fn bytes_and_back_is_the_same_and_sparse() {
        let snapshot = sample();
        assert_eq!(snapshot.pages(), 3);
        let bytes = snapshot.to_vec();
        assert!(bytes.len() < 64 << 10);
        assert_eq!(Snapshot::from_slice(&bytes).unwrap(), snapshot);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let good = sample().to_vec();
        assert!(matches!(Snapshot::from_slice(b"TRELLIS-SNAPSHOX0123"), Err(SnapshotError::NoSnapshot)));
        for len in [0, 15, 20, 40, good.len() - 1] {
            assert!(Snapshot::from_slice(&good[..len]).is_err(), "{len}");
        }
        let mut bad = good.clone();
        bad[16] = 9;
        assert!(matches!(Snapshot::from_slice(&bad), Err(SnapshotError::Version(9))));
        let mut bad = good.clone();
        bad[20..28].fill(0xff);
        assert!(matches!(Snapshot::from_slice(&bad), Err(SnapshotError::Damaged(_))));
        let mut bad = good;
        let last_page = bad.len() - 8 - 4096 - 8;
        bad[last_page..last_page + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(matches!(Snapshot::from_slice(&bad), Err(SnapshotError::Damaged(_))));
    }
}
