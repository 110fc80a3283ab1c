//! The disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::snapshot::{RestoreError, Snapshot};
use crate::virtio::Flavor;
use crate::virtio::block::image::tests::{Moody, Scratch};
use crate::virtio::block::{Block, BlockOptions, Image, ImageError, ImageOptions};

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x20;
const BUFFER: u64 = DATA + 0x1000;
const TABLE: u64 = DATA + 0x8_0000;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const ALL: u64 = u64::MAX;

fn options(file: &Scratch) -> BlockOptions {
    BlockOptions { serial: "disk-0".to_owned(), ..BlockOptions::open(&file.0).unwrap() }
}

fn disk(options: &BlockOptions) -> Rig {
    Rig::new(Box::new(Block::new("virtio-blk.0", options).unwrap()), Flavor::Modern)
}

fn header(rig: &Rig, kind: u32, sector: u64) {
    let mut raw = u64::from(kind).to_le_bytes().to_vec();
    raw.extend(sector.to_le_bytes());
    rig.memory.write(Gpa(HEADER), &raw).unwrap();
    rig.memory.write(Gpa(STATUS), &[0xee]).unwrap();
}

/// One request; gives the status and how much was written.
fn request(rig: &Rig, ring: &mut Ring, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
    header(rig, kind, sector);
    let mut pieces = vec![(HEADER, 16, false)];
    pieces.extend(data);
    pieces.push((STATUS, 1, true));
    ring.add(&pieces);
    ring.kick(rig);
    let (_, written) = ring.wait();
    (rig.memory.load_gpa(Gpa(STATUS)).unwrap(), written)
}

fn counter(rig: &Rig, name: &str) -> u64 {
    lock(&rig.device).counters().iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn config_and_id_describe_the_disk() {
    let file = Scratch::new("blk-config", &[0; 8192]);
    let rig = disk(&options(&file));
    let mut ring = rig.start(ALL, 1).remove(0);
    let config = rig.structure(4);
    assert_eq!(rig.read(config, 8), 16);
    assert_eq!((rig.read(config + 12, 4), rig.read(config + 20, 4)), (254, 512));
    assert_eq!(rig.read(config + 0x800, 8), 0);
    assert_eq!(request(&rig, &mut ring, 8, 0, &[(BUFFER, 20, true)]), (0, 21));
    let mut id = [1; 20];
    rig.memory.read(Gpa(BUFFER), &mut id).unwrap();
    assert_eq!(&id, b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn write_then_read_in_both_modes_gives_the_data() {
    for synchronous in [false, true] {
        let file = Scratch::new(if synchronous { "blk-sync" } else { "blk-thread" }, &[0; 1 << 20]);
        let rig = disk(&BlockOptions { synchronous, ..options(&file) });
        rig.enable_msix();
        let mut ring = rig.start(ALL, 1).remove(0);
        let data: Vec<u8> = (0..300_032u32).map(|i| ((i * 7) >> 3) as u8).collect();
        rig.memory.write(Gpa(BUFFER), &data).unwrap();
        let (a, b) = (BUFFER, BUFFER + 100_001);
        let out = [(a, 100_001, false), (b, 200_031, false)];
        assert_eq!(request(&rig, &mut ring, 1, 3, &out), (0, 1));
        assert_eq!(request(&rig, &mut ring, 4, 0, &[]), (0, 1));
        assert_eq!(std::fs::read(&file.0).unwrap()[1536..301_568], data);
        rig.memory.fill(Gpa(BUFFER), data.len() as u64, 0).unwrap();
        let into = [(a, 77, true), (a + 77, 299_955, true)];
        assert_eq!(request(&rig, &mut ring, 0, 3, &into), (0, 300_033));
        let mut back = vec![0; data.len()];
        rig.memory.read(Gpa(BUFFER), &mut back).unwrap();
        assert_eq!(back, data);
        assert_eq!((counter(&rig, "requests"), counter(&rig, "bytes_written")), (3, 300_032));
        assert!(!lock(&rig.board.messages).is_empty());
    }
}

#[test]
fn indirect_and_event_idx_carry_many_requests() {
    let image: Vec<u8> = (0..256u32 * 512).map(|i| (i >> 9) as u8).collect();
    let file = Scratch::new("blk-many", &image);
    let rig = disk(&options(&file));
    rig.enable_msix();
    let mut ring = rig.start(INDIRECT | EVENT_IDX, 1).remove(0);
    let mut done = 0u16;
    while done < 1000 {
        for i in 0..20u64 {
            let sector = (u64::from(done) + i) % 256;
            let head = HEADER + 0x100 + i * 16;
            rig.memory.write(Gpa(head), &[0; 8]).unwrap();
            rig.memory.write(Gpa(head + 8), &sector.to_le_bytes()).unwrap();
            let pieces = [(head, 16, false), (BUFFER + i * 512, 512, true), (STATUS + i, 1, true)];
            ring.add_indirect(TABLE + i * 64, &pieces);
            if ring.wants_kick() {
                ring.kick(&rig);
            }
        }
        ring.want_interrupt(done.wrapping_add(19));
        // In any order.
        (0..20).for_each(|_| assert_eq!(ring.wait().1, 513));
        for i in 0..20u64 {
            let sector = ((u64::from(done) + i) % 256) as u8;
            assert_eq!(rig.memory.load_gpa::<u8>(Gpa(BUFFER + i * 512 + 511)), Some(sector));
        }
        done += 20;
    }
    let (kicks, interrupts) = (counter(&rig, "notifications"), lock(&rig.board.messages).len());
    assert!(kicks < 1000 && interrupts < 500, "{kicks} notifications, {interrupts} interrupts");
}

#[test]
fn bad_requests_fail_and_leave_the_disk() {
    let file = Scratch::new("blk-bad", &[5; 4096]);
    let rig = disk(&options(&file));
    let mut ring = rig.start(ALL, 1).remove(0);
    let r = |ring: &mut Ring, kind, sector, data: &[Piece]| request(&rig, ring, kind, sector, data).0;
    let sector = [(BUFFER, 512, false)];
    assert_eq!(r(&mut ring, 1, 8, &sector), 1, "beyond the end");
    assert_eq!(r(&mut ring, 1, u64::MAX, &sector), 1);
    assert_eq!(r(&mut ring, 1, u64::MAX >> 9, &sector), 1);
    assert_eq!(r(&mut ring, 1, 0, &[(BUFFER, 100, false)]), 1, "no whole sectors");
    assert_eq!(r(&mut ring, 0, 7, &[(BUFFER, 1024, true)]), 1);
    assert_eq!(r(&mut ring, 0, 0, &[(0xa_0000, 512, true)]), 1, "no RAM");
    assert_eq!(r(&mut ring, 1, 0, &[(RAM - 100, 512, false)]), 1);
    assert_eq!(r(&mut ring, 0, 0, &[(BUFFER, !511, true)]), 1);
    assert_eq!(r(&mut ring, 99, 0, &[]), 2);
    assert_eq!(r(&mut ring, 0, 0, &[]), 0, "nothing to read is read");
    ring.add(&[(HEADER, 16, false)]);
    ring.add(&[(STATUS, 1, true)]);
    ring.add(&[(HEADER, 3, false), (STATUS, 1, true)]);
    ring.add(&[(0, 0, false)]);
    ring.kick(&rig);
    let mut written: Vec<u32> = (0..4).map(|_| ring.wait().1).collect();
    written.sort_unstable();
    assert_eq!(written, [0, 0, 1, 1]);
    assert_eq!(rig.common(20, 1), 15, "a bad request is no reason to reset");
    assert_eq!(std::fs::read(&file.0).unwrap(), [5; 4096]);
}

#[test]
fn read_only_disk_refuses_writes() {
    let file = Scratch::new("blk-ro", &[5; 1000]);
    let image = Image::open(&ImageOptions { read_only: true, ..ImageOptions::new(&file.0) }).unwrap();
    let rig = disk(&BlockOptions::new(&Arc::new(image)));
    let features = rig.negotiate(ALL);
    assert_eq!(features & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    let mut ring = rig.start(ALL, 1).remove(0);
    assert_eq!(request(&rig, &mut ring, 1, 0, &[(BUFFER, 512, false)]).0, 1);
    assert_eq!(request(&rig, &mut ring, 0, 1, &[(BUFFER, 512, true)]), (0, 513));
    assert_eq!(rig.memory.load_gpa::<u16>(Gpa(BUFFER + 487)), Some(5), "the last byte, then zeros");
    assert_eq!(request(&rig, &mut ring, 4, 0, &[]).0, 0);
}

#[test]
fn discard_and_write_zeroes_check_ranges_first() {
    let file = Scratch::new("blk-zero", &[5; 32768]);
    let rig = disk(&options(&file));
    let mut ring = rig.start(ALL, 1).remove(0);
    let ranges = |list: &[(u64, u32, u32)]| {
        for (i, &(sector, count, flags)) in (0..).zip(list) {
            let at = BUFFER + 16 * i;
            rig.memory.write(Gpa(at), &sector.to_le_bytes()).unwrap();
            rig.memory.write(Gpa(at + 8), &count.to_le_bytes()).unwrap();
            rig.memory.write(Gpa(at + 12), &flags.to_le_bytes()).unwrap();
        }
        [(BUFFER, 16 * list.len() as u32, false)]
    };
    assert_eq!(request(&rig, &mut ring, 11, 0, &ranges(&[(0, 1, 0), (64, 1, 0)])).0, 1);
    assert_eq!(request(&rig, &mut ring, 13, 0, &ranges(&[(64, 1, 0)])).0, 1);
    assert_eq!(request(&rig, &mut ring, 13, 0, &ranges(&[(0, 1, 0), (1, 1, 0)])).0, 1);
    assert_eq!(request(&rig, &mut ring, 13, 0, &ranges(&[(0, 1, 2)])).0, 2);
    assert_eq!(request(&rig, &mut ring, 11, 0, &ranges(&[(0, 8, 1)])).0, 2);
    assert_eq!(request(&rig, &mut ring, 11, 0, &[]).0, 1);
    assert_eq!(std::fs::read(&file.0).unwrap(), [5; 32768]);
    assert_eq!(request(&rig, &mut ring, 13, 0, &ranges(&[(1, 1, 0)])).0, 0);
    assert_eq!(request(&rig, &mut ring, 13, 0, &ranges(&[(8, 8, 1)])).0, 0);
    assert_eq!(request(&rig, &mut ring, 11, 0, &ranges(&[(16, 8, 0), (24, 8, 0)])).0, 0);
    let now = std::fs::read(&file.0).unwrap();
    assert!(now[512..1024].iter().chain(&now[4096..8192]).all(|&b| b == 0));
    assert!(now[..512].iter().chain(&now[1024..4096]).all(|&b| b == 5));
    assert_eq!(now.len(), 32768);
}

#[test]
fn cache_mode_follows_the_driver() {
    let file = Scratch::new("blk-cache", &[5; 4096]);
    let rig = disk(&options(&file));
    let writeback = rig.structure(4) + 32;
    rig.start(FLUSH | CONFIG_WCE, 1);
    assert_eq!(rig.read(writeback, 1), 1);
    rig.write(writeback, 1, 0);
    assert_eq!(rig.read(writeback, 1), 0);
    let mut ring = rig.start(FLUSH, 1).remove(0);
    rig.write(writeback, 1, 0);
    assert_eq!(rig.read(writeback, 1), 1, "not negotiated, and reset");
    assert_eq!(request(&rig, &mut ring, 1, 0, &[(BUFFER, 512, false)]).0, 0);
}

#[test]
fn reset_in_mid_flight_stops_the_device_cleanly() {
    let file = Scratch::new("blk-reset", &[5; 1 << 20]);
    let rig = disk(&options(&file));
    for round in 0..50u64 {
        let mut ring = rig.start(0, 1).remove(0);
        header(&rig, 0, 0);
        for _ in 0..60 {
            ring.add(&[(HEADER, 16, false), (BUFFER, 65536, true), (STATUS, 1, true)]);
        }
        ring.kick(&rig);
        std::thread::sleep(Duration::from_micros(20 * round));
        rig.set_common(20, 1, 0);
        assert_eq!(rig.common(20, 1), 0);
        // The device must not touch memory any more.
        let used = ring.used_idx();
        rig.memory.fill(Gpa(BUFFER), 65536, 0).unwrap();
        std::thread::sleep(Duration::from_micros(300));
        assert_eq!(ring.used_idx(), used);
        assert_eq!(rig.memory.load_gpa::<u64>(Gpa(BUFFER)), Some(0));
    }
    let mut ring = rig.start(ALL, 1).remove(0);
    assert_eq!(request(&rig, &mut ring, 0, 0, &[(BUFFER, 512, true)]), (0, 513));
}

#[test]
fn saved_with_requests_waiting_and_restored_goes_on() {
    let file = Scratch::new("blk-save", &[6; 8192]);
    let rig = disk(&options(&file));
    rig.enable_msix();
    let mut ring = rig.start(EVENT_IDX | INDIRECT, 1).remove(0);
    assert_eq!(request(&rig, &mut ring, 0, 0, &[(BUFFER, 512, true)]), (0, 513));
    header(&rig, 0, 2);
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.kick(&rig);
    let blob = lock(&rig.device).save();
    assert_eq!(ring.used_idx(), 2, "what was notified is done when it is saved");
    // One more, not notified before the save.
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.want_interrupt(2);
    let memory = rig.memory.clone();
    drop(rig);

    let block = Block::new("virtio-blk.0", &options(&file)).unwrap();
    let next = Rig::with_memory(Box::new(block), Flavor::Modern, memory);
    lock(&next.device).restore(&blob).unwrap();
    next.host.remap();
    assert_eq!((ring.wait().1, ring.wait().1), (513, 513));
    assert_eq!(next.common(20, 1), 15);
    assert_eq!(request(&next, &mut ring, 0, 1, &[(BUFFER, 1024, true)]), (0, 1025));
    let again = lock(&next.device).save();
    assert_eq!(lock(&next.device).save(), again);
    eventually("interrupt", || lock(&next.board.messages).iter().find(|m| m.1 == 0x41).copied());
}

#[test]
fn restore_of_an_unfit_state_changes_nothing() {
    let (small, big) = (Scratch::new("blk-small", &[6; 512]), Scratch::new("blk-big", &[6; 1024]));
    let blob = lock(&disk(&options(&small)).device).save();
    let rig = disk(&options(&big));
    let mut ring = rig.start(ALL, 1).remove(0);
    let before = lock(&rig.device).save();
    assert!(matches!(lock(&rig.device).restore(&blob), Err(RestoreError::Unfit { .. })));
    let mut damaged = before.clone();
    damaged.data["registers"]["queues"] = serde_json::json!([]);
    assert!(matches!(lock(&rig.device).restore(&damaged), Err(RestoreError::Unfit { .. })));
    assert_eq!(lock(&rig.device).save(), before);
    assert_eq!(request(&rig, &mut ring, 0, 0, &[(BUFFER, 512, true)]), (0, 513));
}

#[test]
fn shutdown_releases_nothing_half_done_and_later_requests_wait() {
    for synchronous in [false, true] {
        let file = Scratch::new(if synchronous { "blk-down-sync" } else { "blk-down" }, &[5; 65536]);
        shut_down_and_try(&file, synchronous);
    }
}

fn shut_down_and_try(file: &Scratch, synchronous: bool) {
    let rig = disk(&BlockOptions { synchronous, ..options(file) });
    let mut ring = rig.start(ALL, 1).remove(0);
    assert!(matches!(BlockOptions::open(&file.0), Err(ImageError::Busy { .. })));
    lock(&rig.device).shutdown();
    lock(&rig.device).shutdown();
    header(&rig, 0, 0);
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.kick(&rig);
    assert_eq!(lock(&rig.device).save().name, "virtio-blk.0");
    let mut ring = rig.start(ALL, 1).remove(0);
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), None);
    assert_eq!(counter(&rig, "requests"), 0);
    drop(rig);
    assert!(BlockOptions::open(&file.0).is_ok());
}

#[test]
fn synchronous_disk_completes_within_the_notification() {
    let file = Scratch::new("blk-now", &[5; 4096]);
    let rig = disk(&BlockOptions { synchronous: true, ..options(&file) });
    let mut ring = rig.start(0, 1).remove(0);
    header(&rig, 0, 0);
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), Some((0, 513)));
}

#[test]
fn several_queues_serve_side_by_side() {
    let image: Vec<u8> = (0..2048u32 * 512).map(|i| (i >> 9) as u8).collect();
    let file = Scratch::new("blk-queues", &image);
    let rig = disk(&BlockOptions { queues: 4, ..options(&file) });
    assert_eq!(rig.read(rig.structure(4) + 34, 2), 4);
    rig.enable_msix();
    assert_ne!(rig.negotiate(ALL) & (1 << 12), 0, "several queues are offered");
    let mut rings = rig.start(ALL, 4);
    for round in 0..200u64 {
        for (queue, ring) in (0u64..).zip(&mut rings) {
            let (at, sector) = (HEADER + 0x100 * (queue + 1), (4 * round + queue) % 2048);
            rig.memory.write(Gpa(at), &[0; 8]).unwrap();
            rig.memory.write(Gpa(at + 8), &sector.to_le_bytes()).unwrap();
            ring.add(&[(at, 16, false), (BUFFER + queue * 512, 512, true), (at + 16, 1, true)]);
            ring.kick(&rig);
        }
        for (queue, ring) in (0u64..).zip(&mut rings) {
            assert_eq!(ring.wait().1, 513);
            let seen = rig.memory.load_gpa::<u8>(Gpa(BUFFER + queue * 512)).unwrap();
            assert_eq!(seen, ((4 * round + queue) % 2048) as u8);
        }
    }
    let state = lock(&rig.device).save();
    assert_eq!(state.data["device"]["queues"].as_array().unwrap().len(), 4);
}

#[test]
fn a_slow_request_stops_neither_the_driver_nor_others() {
    let (image, host) = Moody::image();
    let rig = disk(&BlockOptions::new(&image));
    rig.enable_msix();
    let mut ring = rig.start(EVENT_IDX, 1).remove(0);
    host.waits.store(true, Ordering::SeqCst);
    header(&rig, 0, 0);
    ring.add(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    ring.kick(&rig);
    for _ in 0..20 {
        let at = HEADER + 0x100;
        rig.memory.write(Gpa(at), &[0; 8]).unwrap();
        rig.memory.write(Gpa(at + 8), &8u64.to_le_bytes()).unwrap();
        ring.add(&[(at, 16, false), (BUFFER + 0x1000, 512, true), (at + 16, 1, true)]);
        ring.kick(&rig);
        assert_eq!(ring.wait().1, 513);
    }
    let status = rig.memory.load_gpa::<u8>(Gpa(STATUS));
    host.waits.store(false, Ordering::SeqCst);
    assert_eq!(status, Some(0xee), "the slow one is still under way");
    assert_eq!(ring.wait().1, 513);
}

#[test]
fn a_full_host_is_an_error_until_there_is_room() {
    let (image, host) = Moody::image();
    let rig = disk(&BlockOptions::new(&image));
    let mut ring = rig.start(ALL, 1).remove(0);
    host.full.store(true, Ordering::SeqCst);
    assert_eq!(request(&rig, &mut ring, 1, 9, &[(BUFFER, 512, false)]).0, 1);
    assert_eq!(request(&rig, &mut ring, 0, 9, &[(BUFFER, 512, true)]), (0, 513));
    host.full.store(false, Ordering::SeqCst);
    assert_eq!(request(&rig, &mut ring, 1, 9, &[(BUFFER, 512, false)]), (0, 1));
    assert_eq!(rig.common(20, 1), 15, "the device goes on");
    assert_eq!(counter(&rig, "failures"), 1);
}
