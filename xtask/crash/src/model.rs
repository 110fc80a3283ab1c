//! What is written when, and what must be there afterwards. Victim and judge work it out alike, from the seed.
//!
//! A round is a victim's life; it writes batches. A batch writes some slots, each once, and is flushed.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use anyhow::Context as _;
use devices::virtio::block::{Image, ImageFormat};
use devices::virtio::rng::SplitMix64;
use machine_tests::qcow2::empty_qcow2;

/// Places that are written: one in each cluster of the disk.
pub const SLOTS: u64 = 4096;
/// Distance of slots: a cluster of qcow2.
pub const SLOT_BYTES: u64 = 64 << 10;
/// Bytes written in a slot.
pub const BLOCK_BYTES: usize = 4096;
/// The disk.
pub const DISK_BYTES: u64 = SLOTS * SLOT_BYTES;
/// Most writes in a batch.
const MOST_WRITES: u64 = 48;

/// A victim's life.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Of the whole run.
    pub seed: u64,
    /// Which life.
    pub number: u32,
}

/// What a slot holds: the number of a write, or 0 for zeros.
pub type Version = u64;

/// A write: of a numbered block, or of zeros over the whole slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub slot: u64,
    /// What.
    pub version: Version,
}

impl Round {
    /// Every fourth victim does not negotiate FLUSH: then each write is durable when it completes.
    pub const fn is_write_through(self) -> bool {
        self.number % 4 == 3
    }

    /// The writes of a batch; no slot twice, since their order is open.
    pub fn batch(self, batch: u32) -> Vec<Write> {
        let mut rng = SplitMix64::new(self.seed ^ u64::from(self.number) << 40 ^ u64::from(batch) << 8);
        let (start, step, count) = (rng.next(), rng.next() | 1, 1 + rng.next() % MOST_WRITES);
        let write = |n: u64| {
            // An odd step visits each of a power of two places once.
            let slot = start.wrapping_add(n.wrapping_mul(step)) % SLOTS;
            let number = (u64::from(self.number) + 1) << 32 | u64::from(batch) << 8 | n;
            Write { slot, version: if rng.next().is_multiple_of(6) { 0 } else { number } }
        };
        (0..count).map(write).collect()
    }
}

/// The bytes of a version.
pub fn content(slot: u64, version: Version) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK_BYTES];
    }
    let mut rng = SplitMix64::new(version ^ slot << 48);
    let words = std::iter::repeat_with(|| rng.next()).take(BLOCK_BYTES / 8 - 1);
    std::iter::once(version).chain(words).flat_map(u64::to_le_bytes).collect()
}

/// What every slot must hold.
#[derive(Default)]
pub struct Blocks(HashMap<u64, Version>);

impl Blocks {
    fn version(&self, slot: u64) -> Version {
        self.0.get(&slot).copied().unwrap_or(0)
    }

    /// Holds the image against what a victim had reported; then what is there counts. Says whether a batch was found half
    /// written.
    pub fn judge(&mut self, image: &Image, round: Round, reported: u32) -> anyhow::Result<bool> {
        for batch in 0..reported {
            self.0.extend(round.batch(batch).into_iter().map(|write| (write.slot, write.version)));
        }
        let under_way: HashMap<u64, Version> =
            round.batch(reported).into_iter().map(|write| (write.slot, write.version)).collect();
        let mut news = 0;
        for slot in 0..SLOTS {
            let mut found = vec![0; BLOCK_BYTES];
            image.read(slot * SLOT_BYTES, &mut found).with_context(|| format!("reading slot {slot}"))?;
            let flushed = self.version(slot);
            if found == content(slot, flushed) {
                continue;
            }
            let newer = under_way.get(&slot).copied().filter(|&version| found == content(slot, version));
            let is = u64::from_le_bytes(found[..8].try_into()?);
            let newer = newer.with_context(|| {
                format!("slot {slot} should hold {flushed:#x}, which was flushed, and begins with {is:#x}")
            })?;
            self.0.insert(slot, newer);
            news += 1;
        }
        Ok(news > 0 && news < under_way.len())
    }
}

/// Makes an empty image; clusters of qcow2 are as large as slots.
pub fn make_image(path: &Path, format: ImageFormat) -> anyhow::Result<()> {
    if format == ImageFormat::Raw {
        return Ok(File::create(path)?.set_len(DISK_BYTES)?);
    }
    Ok(std::fs::write(path, empty_qcow2(DISK_BYTES))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_repeatable_and_write_no_slot_twice() {
        let round = Round { seed: 7, number: 3 };
        for batch in 0..200 {
            let writes = round.batch(batch);
            assert_eq!(writes, round.batch(batch));
            let slots: std::collections::HashSet<u64> = writes.iter().map(|write| write.slot).collect();
            assert_eq!(slots.len(), writes.len());
        }
    }

    #[test]
    fn a_lost_block_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        make_image(&path, ImageFormat::Raw).unwrap();
        let image = Image::open(&devices::virtio::block::ImageOptions::new(&path)).unwrap();
        let round = Round { seed: 1, number: 0 };
        let error = Blocks::default().judge(&image, round, 1).unwrap_err();
        assert!(error.to_string().contains("which was flushed"), "{error}");
        for write in round.batch(0) {
            image.write(write.slot * SLOT_BYTES, &content(write.slot, write.version)).unwrap();
        }
        assert!(!Blocks::default().judge(&image, round, 1).unwrap());
        let first = round.batch(1)[0];
        image.write(first.slot * SLOT_BYTES, &content(first.slot, first.version)).unwrap();
        assert_eq!(
            Blocks::default().judge(&image, round, 1).unwrap(),
            round.batch(1).len() > 1 && first.version != 0
        );
        image.write(4 * SLOT_BYTES, &[1; 512]).unwrap();
        assert!(Blocks::default().judge(&image, round, 1).is_err());
    }
}
