//! What a qcow2 file that is to be written must not be: tables that refer to each other or twice to the same place, a size beyond
//! its format, encrypted. (qcow2 specification: "Header", "L1 table", "L2 table".)
//!
//! The crate reads tables when it needs them and believes them; a table that is also data would be overwritten by the guest.
//! - INV-QCOW-4: of the clusters that a writable image's tables refer to at the beginning, none is both a table and data, and none
//!   belongs to two places unless a snapshot shares it.
//!
//! It costs the reading of all second-level tables: an eight-thousandth of what is allocated.

use std::io;

use super::host_file::HostFile;

/// Most entries of the first table: what imago takes, too.
const MAX_L1: u64 = 4 << 20;
/// The field of an entry that holds an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
/// Incompatible feature: entries of the second table are twice as long.
const EXTENDED: u64 = 1 << 4;

/// The header's fields.
struct Header {
    cluster_bits: u32,
    size: u64,
    encrypted: bool,
    l1: (u64, u64),
    counts: (u64, u64),
    extended: bool,
}

impl Header {
    /// `None` if it is none that whoever opens the image would take.
    fn read(host: &HostFile) -> io::Result<Option<Self>> {
        let mut raw = [0; 104];
        host.read(0, &mut raw)?;
        let word =
            |at: usize| raw.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        let half = |at: usize| word(at) >> 32;
        let version = half(4);
        let cluster_bits = u32::try_from(half(20)).unwrap_or(0);
        let features = if version >= 3 { word(72) } else { 0 };
        Ok((9..=21).contains(&cluster_bits).then(|| Self {
            cluster_bits,
            size: word(24),
            encrypted: half(32) != 0,
            l1: (word(40), half(36)),
            counts: (word(48), half(56) << cluster_bits),
            extended: features & EXTENDED != 0,
        }))
    }

    /// Bytes of the disk that an entry of the first table covers.
    fn covered(&self) -> u64 {
        let entries = 1u64 << (self.cluster_bits - if self.extended { 4 } else { 3 });
        entries << self.cluster_bits
    }
}

/// A bit for each cluster of the file.
struct Used {
    bits: Vec<u64>,
    cluster_bits: u32,
}

impl Used {
    /// Takes the cluster at `offset`; says whether it was free. What lies beyond the file's end is nobody's yet.
    fn take(&mut self, offset: u64) -> bool {
        let Some((word, bit)) = self.place(offset) else { return true };
        let free = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        free
    }

    fn is_free(&self, offset: u64) -> bool {
        self.place(offset).is_none_or(|(word, bit)| self.bits[word] & bit == 0)
    }

    fn take_range(&mut self, (offset, len): (u64, u64)) -> bool {
        let end = offset.saturating_add(len).min((self.bits.len() as u64 * 64) << self.cluster_bits);
        let mut free = true;
        let mut at = offset >> self.cluster_bits << self.cluster_bits;
        while at < end {
            free &= self.take(at);
            at += 1 << self.cluster_bits;
        }
        free
    }

    fn place(&self, offset: u64) -> Option<(usize, u64)> {
        let cluster = offset >> self.cluster_bits;
        let word = usize::try_from(cluster / 64).ok().filter(|&word| word < self.bits.len())?;
        Some((word, 1 << (cluster % 64)))
    }
}

/// Reads a table that lies in the file.
fn table(host: &HostFile, offset: u64, len: u64) -> io::Result<Vec<u64>> {
    let len = len.min(host.len_bytes.saturating_sub(offset));
    let mut raw = vec![0; usize::try_from(len / 8 * 8).map_err(io::Error::other)?];
    host.read(offset, &mut raw)?;
    Ok(raw.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn overlap(what: &str, offset: u64) -> io::Error {
    io::Error::other(format!(
        "{what} at {offset:#x} overlaps another part of the file; try qemu-img check -r all"
    ))
}

/// What every image must be, written or not.
pub(super) fn check_header(host: &HostFile) -> io::Result<()> {
    let Some(header) = Header::read(host)? else { return Ok(()) };
    if header.encrypted {
        return Err(io::Error::other(
            "it is encrypted, which is not supported; decrypt it with qemu-img convert",
        ));
    }
    if header.size / header.covered() >= MAX_L1 {
        return Err(io::Error::other(format!(
            "its disk of {} bytes is larger than its format can hold",
            header.size
        )));
    }
    Ok(())
}

/// INV-QCOW-4.
pub(super) fn check_tables(host: &HostFile) -> io::Result<()> {
    let Some(header) = Header::read(host)? else { return Ok(()) };
    let cluster_bits = header.cluster_bits;
    let clusters = host.len_bytes.div_ceil(1 << cluster_bits);
    let words = usize::try_from(clusters.div_ceil(64)).map_err(io::Error::other)?;
    let mut used = Used { bits: vec![0; words], cluster_bits };
    used.take(0);
    let (l1_at, l1_entries) = header.l1;
    if !used.take_range(header.counts) {
        return Err(overlap("the table of reference counts", header.counts.0));
    }
    if !used.take_range((l1_at, 8 * l1_entries)) {
        return Err(overlap("the first-level table", l1_at));
    }
    for block in table(host, header.counts.0, header.counts.1)? {
        if block & OFFSET != 0 && !used.take(block & OFFSET) {
            return Err(overlap("a block of reference counts", block & OFFSET));
        }
    }
    let l1: Vec<u64> = table(host, l1_at, 8 * l1_entries.min(MAX_L1))?
        .into_iter()
        .filter(|entry| entry & OFFSET != 0)
        .collect();
    for entry in &l1 {
        // Without the bit a snapshot has the table, too, but no other place of this one.
        if !used.take(entry & OFFSET) {
            return Err(overlap("a second-level table", entry & OFFSET));
        }
    }
    let step = if header.extended { 2 } else { 1 };
    for entry in l1 {
        for data in table(host, entry & OFFSET, 1 << cluster_bits)?.into_iter().step_by(step) {
            let offset = data & OFFSET;
            // Offset 0 is nowhere; with the bit it would be the header.
            if data & COMPRESSED != 0 || (offset == 0 && data & COPIED == 0) {
                continue;
            }
            let free = if data & COPIED != 0 { used.take(offset) } else { used.is_free(offset) };
            if !free {
                return Err(overlap("a cluster of data", offset));
            }
        }
    }
    Ok(())
}
