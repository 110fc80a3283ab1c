//! The balloon.

use std::time::Duration;

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::snapshot::Snapshot;
use crate::virtio::Flavor;
use crate::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};

const STATS_VQ: u64 = 1 << 1;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;
const NOW: Duration = Duration::ZERO;

fn balloon() -> (Rig, BalloonHandle) {
    let (device, handle) = Balloon::new("balloon", BalloonOptions::default());
    (Rig::new(Box::new(device), Flavor::Modern), handle)
}

/// Fills `pages` pages from `at`.
fn fill(rig: &Rig, at: u64, pages: u64) {
    rig.memory.fill(Gpa(at), pages * 4096, 0x5a).unwrap();
}

fn byte(rig: &Rig, at: u64) -> u8 {
    rig.memory.load_gpa(Gpa(at)).unwrap()
}

#[test]
fn inflated_pages_are_given_back_and_deflated_ones_are_there_again() {
    let (rig, handle) = balloon();
    let mut rings = rig.start(STATS_VQ, 3);
    fill(&rig, 0x30_0000, 16);
    // Neighbours, a lone one, one that is no RAM.
    for (n, page) in [0x300u32, 0x301, 0x302, 0x308, 0xffff_ffff].into_iter().enumerate() {
        rig.memory.write(Gpa(DATA + 4 * n as u64), &page.to_le_bytes()).unwrap();
    }
    rings[0].add(&[(DATA, 20, false)]);
    let before = rig.memory.resident_bytes();
    rings[0].kick(&rig);
    assert_eq!(rings[0].take(), Some((0, 0)));
    assert_eq!(before - rig.memory.resident_bytes(), 4 * 4096);
    assert_eq!((byte(&rig, 0x30_2fff), byte(&rig, 0x30_3000), byte(&rig, 0x30_8000)), (0, 0x5a, 0));
    rings[1].add(&[(DATA, 8, false)]);
    rings[1].kick(&rig);
    assert_eq!(rings[1].take(), Some((0, 0)));
    fill(&rig, 0x30_0000, 2);
    let report = handle.report(NOW);
    assert_eq!((report.inflated_bytes, report.deflated_bytes), (4 * 4096, 2 * 4096));
}

#[test]
fn wanted_size_interrupts_and_shows_and_the_actual_one_is_the_guests() {
    let (rig, handle) = balloon();
    rig.enable_msix();
    rig.start(STATS_VQ, 3);
    handle.set_size((64 << 20) + 1);
    assert_eq!(*lock(&rig.board.messages), [(0xfee0_0000, 0x40)]);
    let config = rig.structure(4);
    assert_eq!(rig.read(config, 4), 64 << 8);
    rig.write(config + 4, 4, 77);
    rig.write(config, 4, 1);
    let report = handle.report(NOW);
    assert_eq!((report.wanted_bytes, report.actual_bytes, report.driver), (64 << 20, 77 * 4096, true));
    handle.set_size(u64::MAX);
    assert_eq!(rig.read(config, 4), 0xffff_ffff);
}

#[test]
fn reported_pages_are_given_back_whole() {
    for (features, queue) in [(STATS_VQ | REPORTING, 3), (REPORTING, 2)] {
        let (rig, handle) = balloon();
        let mut rings = rig.start(features, queue + 1);
        fill(&rig, 0x30_0000, 8);
        let before = rig.memory.resident_bytes();
        let ring = &mut rings[usize::from(queue)];
        // The second begins and ends in mid page, the third is beyond memory.
        ring.add(&[(0x30_0000, 0x2000, true), (0x30_3800, 0x2000, true), (1 << 40, u32::MAX, true)]);
        ring.kick(&rig);
        assert_eq!(ring.take(), Some((0, 0)));
        assert_eq!(before - rig.memory.resident_bytes(), 3 * 4096, "queue {queue}");
        assert_eq!((byte(&rig, 0x30_3fff), byte(&rig, 0x30_4000), byte(&rig, 0x30_5000)), (0x5a, 0, 0x5a));
        assert_eq!(handle.report(NOW).reported_bytes, 3 * 4096);
    }
}

#[test]
fn reported_pages_that_hold_a_poison_keep_it() {
    let (rig, handle) = balloon();
    let features = rig.negotiate(VERSION_1 | STATS_VQ | REPORTING | PAGE_POISON);
    rig.write(rig.structure(4) + 12, 4, 0xaaaa_aaaa);
    let mut rings: Vec<Ring> = (0..4).map(|q| rig.queue(q, 0, features)).collect();
    rig.driver_ok();
    fill(&rig, 0x30_0000, 1);
    rings[3].add(&[(0x30_0000, 0x1000, true)]);
    rings[3].kick(&rig);
    assert_eq!(rings[3].take(), Some((0, 0)));
    assert_eq!((byte(&rig, 0x30_0000), handle.report(NOW).reported_bytes), (0x5a, 0));
}

fn stats(rig: &Rig, ring: &mut Ring, free: u64) {
    let mut raw = Vec::new();
    for (tag, value) in [(4u16, free), (5, 1000), (77, 3)] {
        raw.extend(tag.to_le_bytes());
        raw.extend(value.to_le_bytes());
    }
    rig.memory.write(Gpa(DATA), &raw).unwrap();
    ring.add(&[(DATA, raw.len() as u32, false)]);
    ring.kick(rig);
}

#[test]
fn statistics_are_kept_and_asked_for_anew() {
    let (rig, handle) = balloon();
    let mut rings = rig.start(STATS_VQ, 3);
    assert!(handle.report(NOW).guest.is_empty());
    stats(&rig, &mut rings[2], 500);
    assert_eq!(rings[2].take(), None, "the device keeps it");
    let free =
        |value: u64| vec![("guest_free_bytes".to_owned(), value), ("guest_total_bytes".to_owned(), 1000)];
    let asking = handle.clone();
    let asked = std::thread::spawn(move || asking.report(Duration::from_secs(20)));
    eventually("the buffer", || rings[2].take());
    stats(&rig, &mut rings[2], 400);
    assert_eq!(asked.join().unwrap().guest, free(400));
    // A driver that does not answer is waited for no longer than that.
    assert_eq!(handle.report(Duration::from_millis(5)).guest, free(400));
}

#[test]
fn restored_balloon_knows_its_size_and_its_buffer() {
    let (rig, handle) = balloon();
    let mut rings = rig.start(STATS_VQ | EVENT_IDX, 3);
    handle.set_size(8 << 20);
    rig.write(rig.structure(4) + 4, 4, 5);
    stats(&rig, &mut rings[2], 500);
    let blob = lock(&rig.device).save();
    let (device, handle) = Balloon::new("balloon", BalloonOptions::default());
    let next = Rig::with_memory(Box::new(device), Flavor::Modern, rig.memory.clone());
    lock(&next.device).restore(&blob).unwrap();
    next.host.remap();
    let report = handle.report(Duration::from_millis(1));
    assert_eq!((report.wanted_bytes, report.actual_bytes), (8 << 20, 5 * 4096));
    assert_eq!(rings[2].take(), Some((0, 0)), "the driver is asked for new ones");
}
