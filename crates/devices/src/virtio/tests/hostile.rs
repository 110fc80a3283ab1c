//! A guest that writes nonsense everywhere. Seeds are fixed, so a failure replays by running the test again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::snapshot::Snapshot;
use crate::virtio::balloon::{Balloon, BalloonOptions};
use crate::virtio::block::image::tests::Scratch;
use crate::virtio::block::{Block, BlockOptions};
use crate::virtio::channel::Channel;
use crate::virtio::console::Console;
use crate::virtio::rng::{Entropy, Rng, SplitMix64};
use crate::virtio::share::{Share, ShareOptions, ShareProtocol};
use crate::virtio::{Flavor, VirtioDevice};

fn devices(file: &Scratch, synchronous: bool) -> Vec<Box<dyn VirtioDevice>> {
    std::fs::create_dir_all(file.0.with_extension("d")).unwrap();
    let options = BlockOptions { synchronous, queues: 2, ..BlockOptions::open(&file.0).unwrap() };
    let share = |protocol| -> Box<dyn VirtioDevice> {
        let (path, tag) = (file.0.with_extension("d"), "tag".to_owned());
        let options = ShareOptions { path, tag, read_only: false, protocol, is_static: false };
        Box::new(Share::new("share.0", &options, synchronous).unwrap())
    };
    vec![
        Box::new(Block::new("virtio-blk.0", &options).unwrap()),
        Box::new(Console::new("virtio-console.0", Box::new(std::io::sink()), 80, 25).0),
        Box::new(Channel::new("channel", "port", Box::new(std::io::sink())).0),
        Box::new(super::net::card()),
        Box::new(Rng::new("virtio-rng.0", Entropy::seeded(3))),
        Box::new(Balloon::new("balloon", BalloonOptions::default()).0),
        Box::new(super::vsock::device(&file.0.with_extension("s")).0),
        share(ShareProtocol::P9),
        share(ShareProtocol::Fuse),
    ]
}

/// A ring word: often something plausible.
fn word(rng: &mut SplitMix64) -> u64 {
    match rng.next() % 6 {
        0 => rng.next(),
        1 => DATA + rng.next() % 0x1000,
        2 => u64::from(rng.next() as u16 & 7) << 32 | 512 | (rng.next() & 0xf) << 48,
        3 => rng.next() & 0xf,
        4 => 0x10_0000 + (rng.next() & 0xffff),
        _ => 0,
    }
}

fn scribble(rig: &Rig, rng: &mut SplitMix64) {
    for base in [0x10_0000, 0x10_4000, 0x10_8000, 0x11_0000, 0x11_4000, 0x11_8000, DATA] {
        for i in 0..64 {
            let value = word(rng);
            rig.memory.write(Gpa(base + 8 * i), &value.to_le_bytes()).unwrap();
        }
    }
    // An available index that is not absurd, or nothing after it would be looked at.
    for queue in 0..2 {
        let at = 0x10_4002 + queue * 0x1_0000;
        rig.memory.write(Gpa(at), &(rng.next() as u16 % 9).to_le_bytes()).unwrap();
    }
}

#[test]
fn random_rings_never_panic_or_hang() {
    let file = Scratch::new("hostile-rings", &[1; 65536]);
    let start = Instant::now();
    for synchronous in [true, false] {
        for device in devices(&file, synchronous) {
            let rig = Rig::new(device, Flavor::Modern);
            let queues = rig.common(18, 2) as u16;
            let mut rng = SplitMix64::new(0x1234);
            for round in 0..300u64 {
                let wanted = if round % 3 == 0 { u64::MAX } else { INDIRECT };
                let rings = rig.start(wanted, queues);
                for _ in 0..3 {
                    scribble(&rig, &mut rng);
                    rings.iter().for_each(|r| r.kick(&rig));
                }
            }
            lock(&rig.device).save();
        }
    }
    assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 65536);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn random_register_accesses_never_panic() {
    let file = Scratch::new("hostile-regs", &[1; 65536]);
    for device in devices(&file, false) {
        let rig = Rig::new(device, Flavor::Transitional);
        let mut rng = SplitMix64::new(0x77);
        let (modern, ports) = (rig.bar(4), (rig.config(0x10, 4) & !3) as u16);
        let window = rig.capability(9, Some(5));
        for _ in 0..30_000 {
            let len = 1usize << (rng.next() % 4);
            let place = [0, 0, 0, 0x1000, 0x2000, 0x3000][rng.next() as usize % 6];
            let offset = if rng.next() & 3 == 0 { rng.next() & 0xfff } else { rng.next() & 0x3f };
            let at = (modern + place + offset).min(modern + 0x3ff8);
            let value = word(&mut rng);
            match rng.next() % 8 {
                0 | 1 => drop(rig.read(at, len)),
                2 | 3 => rig.write(at, len, value),
                4 => rig.write(modern + 20, 1, [0, 1, 3, 11, 15, 128][rng.next() as usize % 6]),
                5 => drop(rig.bus.port_read(ports + (offset & 0x3f) as u16, len.min(4) as u8)),
                6 => rig.bus.port_write(ports + (offset & 0x1f) as u16, len.min(4) as u8, value as u32),
                _ => {
                    rig.set_config(window + 4, 1, 4);
                    rig.set_config(window + 8, 4, value);
                    rig.set_config(window + 12, 4, 1 << (rng.next() % 3));
                    rig.set_config(window + 16, 4, rng.next() & 0xffff_ffff);
                    rig.config(window + 16, 4);
                }
            }
        }
    }
}

#[test]
fn rings_that_change_under_our_feet_are_survived() {
    let file = Scratch::new("hostile-race", &[1; 65536]);
    for device in devices(&file, false) {
        let rig = Rig::new(device, Flavor::Modern);
        let queues = rig.common(18, 2) as u16;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop_even_if_this_panics = StopOnDrop(&stop);
            scope.spawn(|| {
                let mut rng = SplitMix64::new(5);
                while !stop.load(Ordering::Relaxed) {
                    scribble(&rig, &mut rng);
                }
            });
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                for ring in rig.start(INDIRECT | EVENT_IDX, queues) {
                    ring.kick(&rig);
                }
            }
        });
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn random_snapshots_never_panic() {
    let file = Scratch::new("hostile-snap", &[1; 65536]);
    for device in devices(&file, false) {
        let rig = Rig::new(device, Flavor::Modern);
        let queues = rig.common(18, 2) as u16;
        rig.start(u64::MAX, queues);
        let good = lock(&rig.device).save();
        let mut rng = SplitMix64::new(9);
        for _ in 0..2000 {
            let mut bad = good.clone();
            corrupt(&mut bad.data, &mut rng);
            let _ = lock(&rig.device).restore(&bad);
        }
        lock(&rig.device).restore(&good).unwrap();
    }
}

/// Replaces a random leaf.
fn corrupt(value: &mut serde_json::Value, rng: &mut SplitMix64) {
    use serde_json::Value;
    let pick = |len: usize, rng: &mut SplitMix64| rng.next() as usize % len;
    match value {
        Value::Object(map) if !map.is_empty() => {
            let at = pick(map.len(), rng);
            corrupt(map.values_mut().nth(at).unwrap(), rng);
        }
        Value::Array(list) if !list.is_empty() && rng.next() & 15 != 0 => {
            let at = pick(list.len(), rng);
            corrupt(&mut list[at], rng);
        }
        other => {
            *other = match rng.next() % 4 {
                0 => Value::Null,
                1 => (rng.next() & 0xffff).into(),
                2 => rng.next().into(),
                _ => serde_json::json!([]),
            };
        }
    }
}
