//! The process that is killed: a virtio disk and a driver that writes batch after batch.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use devices::virtio::block::{Block, BlockOptions, Image, ImageOptions};

use crate::driver::{Driver, Request};
use crate::model::{Round, SLOT_BYTES, content};

/// Writes until somebody ends it. `words`: image, format, seed, round.
pub fn run(words: &[String]) -> anyhow::Result<()> {
    let [path, format, seed, number] = words else { anyhow::bail!("a victim has four words") };
    let round = Round { seed: seed.parse()?, number: number.parse()? };
    let format = Some(crate::format(format)?);
    let image = Image::open(&ImageOptions { format, ..ImageOptions::new(Path::new(path)) })?;
    let options = BlockOptions { queues: 2, ..BlockOptions::new(&Arc::new(image)) };
    let flushes = !round.is_write_through();
    let mut driver = Driver::new(Box::new(Block::new("disk", &options)?), flushes)?;
    let mut stdout = std::io::stdout();
    for batch in 0.. {
        for write in round.batch(batch) {
            let sector = write.slot * (SLOT_BYTES / 512);
            driver.submit(match write.version {
                0 => Request::Zeroes { sector, sectors: u32::try_from(SLOT_BYTES / 512)? },
                version => Request::Write { sector, data: content(write.slot, version) },
            })?;
        }
        ensure!(driver.finish()?, "a write failed");
        if flushes {
            driver.submit(Request::Flush)?;
            ensure!(driver.finish()?, "a flush failed");
        }
        stdout
            .write_all(format!("{batch}\n").as_bytes())
            .and_then(|()| stdout.flush())
            .context("nobody listens")?;
    }
    Ok(())
}
