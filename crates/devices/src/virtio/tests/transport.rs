//! What a driver finds before it uses a queue (virtio 1.2 4.1, cross-checked with Linux `virtio_pci_modern_dev.c`).

use std::sync::atomic::Ordering;

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::virtio::rng::{Entropy, Rng};
use crate::virtio::{Flavor, VirtioDevice};

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new("virtio-rng.0", Entropy::seeded(1)))
}

#[test]
fn identity_is_what_the_specification_says() {
    let rig = Rig::new(rng(), Flavor::Modern);
    assert_eq!(rig.config(0, 4), 0x1044_1af4);
    assert!(rig.config(8, 1) >= 1);
    let rig = Rig::new(rng(), Flavor::Transitional);
    assert_eq!(rig.config(0, 4), 0x1005_1af4);
    assert_eq!((rig.config(8, 1), rig.config(0x2e, 2)), (0, 4));
    assert_eq!(rig.config(0x3d, 1), 1);
}

#[test]
fn capabilities_describe_structures_that_linux_accepts() {
    let rig = Rig::new(rng(), Flavor::Modern);
    // Linux wants: common at least 56 bytes and 4-aligned, notify at least 2 bytes and 2-aligned, ISR 1, all in memory BARs.
    for (kind, min_len, align) in [(1, 56, 4), (2, 2, 2), (3, 1, 1), (4, 1, 4)] {
        let at = rig.capability(9, Some(kind));
        let (cap_len, bar) = (rig.config(at + 2, 1), rig.config(at + 4, 1) as u16);
        assert_eq!(cap_len, if kind == 2 { 20 } else { 16 });
        let (offset, len) = (rig.config(at + 8, 4), rig.config(at + 12, 4));
        assert!(len >= min_len && offset % align == 0, "structure {kind}");
        assert!(offset + len <= 0x4000 && rig.config(0x10 + 4 * bar, 4) & 1 == 0);
    }
    assert_eq!(rig.config(rig.capability(9, Some(2)) + 16, 4), 4);
}

#[test]
fn features_without_version_1_or_not_offered_are_refused() {
    let rig = Rig::new(rng(), Flavor::Modern);
    for (select, value) in [(0, 0u64), (1, 3)] {
        rig.set_common(20, 1, 0);
        rig.set_common(20, 1, 3);
        rig.set_common(8, 4, select);
        rig.set_common(12, 4, value);
        rig.set_common(20, 1, 11);
        assert_eq!(rig.common(20, 1), 3);
    }
    rig.set_common(0, 4, 1);
    assert_eq!(rig.common(4, 4), 1, "VERSION_1 and no ACCESS_PLATFORM (bit 33)");
    rig.set_common(0, 4, 2);
    assert_eq!(rig.common(4, 4), 0);
    assert_eq!(rig.negotiate(u64::MAX), VERSION_1 | INDIRECT | EVENT_IDX);
}

#[test]
fn queue_registers_behave() {
    let rig = Rig::new(rng(), Flavor::Modern);
    rig.negotiate(VERSION_1);
    assert_eq!(rig.common(18, 2), 1);
    rig.set_common(22, 2, 7);
    assert_eq!(rig.common(24, 2), 0, "a queue that is not there has size 0");
    rig.set_common(22, 2, 0);
    let max = rig.common(24, 2);
    for bad in [0, 3, max * 2] {
        rig.set_common(24, 2, bad);
        assert_eq!(rig.common(24, 2), max);
    }
    rig.set_common(32, 8, 0x1_2345_6780);
    assert_eq!(rig.common(32, 8), 0x1_2345_6780);
    assert_eq!(rig.common(36, 4), 1);
    rig.set_common(26, 2, 9);
    assert_eq!(rig.common(26, 2), 0xffff, "a vector that is not there");
    rig.set_common(26, 2, 1);
    assert_eq!(rig.common(26, 2), 1);
    rig.set_common(32, 4, 0x11);
    rig.set_common(28, 2, 1);
    assert_eq!(rig.common(28, 2), 0, "unaligned rings are not enabled");
    rig.set_common(20, 1, 0);
    assert_eq!((rig.common(26, 2), rig.common(32, 8), rig.common(20, 1)), (0xffff, 0, 0));
}

#[test]
fn request_with_pin_sets_isr_and_reading_lowers_it() {
    let rig = Rig::new(rng(), Flavor::Modern);
    let mut ring = rig.start(0, 1).remove(0);
    ring.add(&[(DATA, 32, true)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), Some((0, 32)));
    assert_eq!(rig.board.pins.load(Ordering::SeqCst), 1);
    assert_ne!(rig.config(6, 2) & 8, 0, "interrupt status");
    assert_eq!(rig.isr(), 1);
    assert_eq!((rig.isr(), rig.board.pins.load(Ordering::SeqCst)), (0, 0));
    assert_ne!(rig.memory.load_gpa::<u64>(Gpa(DATA)), Some(0));
}

#[test]
fn request_with_msix_sends_the_queues_vector() {
    let rig = Rig::new(rng(), Flavor::Modern);
    rig.enable_msix();
    let mut ring = rig.start(0, 1).remove(0);
    ring.add(&[(DATA, 8, true)]);
    ring.kick(&rig);
    assert_eq!(*lock(&rig.board.messages), [(0xfee0_0000, 0x41)]);
    assert_eq!((rig.board.pins.load(Ordering::SeqCst), rig.isr()), (0, 0));
}

#[test]
fn broken_ring_asks_for_reset_and_recovers() {
    let rig = Rig::new(rng(), Flavor::Modern);
    rig.enable_msix();
    let mut ring = rig.start(0, 1).remove(0);
    ring.publish(0xfff0);
    ring.kick(&rig);
    assert_eq!(rig.common(20, 1), 15 | 64);
    assert_eq!(*lock(&rig.board.messages), [(0xfee0_0000, 0x40)], "configuration change");
    ring.kick(&rig);
    let mut ring = rig.start(0, 1).remove(0);
    ring.add(&[(DATA, 8, true)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), Some((0, 8)));
}

#[test]
fn window_in_configuration_space_reaches_the_registers() {
    let rig = Rig::new(rng(), Flavor::Modern);
    let at = rig.capability(9, Some(5));
    let point = |offset: u64, len: u64| {
        rig.set_config(at + 4, 1, 4);
        rig.set_config(at + 8, 4, offset);
        rig.set_config(at + 12, 4, len);
    };
    point(20, 1);
    rig.set_config(at + 16, 1, 1);
    assert_eq!(rig.config(at + 16, 1), 1);
    assert_eq!(rig.common(20, 1), 1);
    point(18, 2);
    assert_eq!(rig.config(at + 16, 2), 1);
    point(19, 2);
    rig.set_config(at + 16, 4, 0);
    point(0xffff_fffc, 4);
    rig.set_config(at + 16, 4, 0xffff_ffff);
    assert_eq!(rig.config(at + 16, 4), 0);
}

#[test]
fn bus_reset_starts_over() {
    let rig = Rig::new(rng(), Flavor::Transitional);
    rig.enable_msix();
    let mut ring = rig.start(0, 1).remove(0);
    rig.host.reset();
    rig.host.place_bars().unwrap();
    assert_eq!(rig.common(20, 1), 0);
    ring.add(&[(DATA, 8, true)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), None);
}

#[test]
fn legacy_ports_run_a_queue() {
    let rig = Rig::new(rng(), Flavor::Transitional);
    let base = (rig.config(0x10, 4) & !3) as u16;
    let bus = &rig.bus;
    bus.port_write(base + 18, 1, 3);
    assert_eq!(bus.port_read(base, 4), 0x3800_0000, "ANY_LAYOUT, INDIRECT_DESC, EVENT_IDX");
    bus.port_write(base + 4, 4, 0);
    bus.port_write(base + 14, 2, 0);
    let size = bus.port_read(base + 12, 2) as u16;
    assert_eq!((size, bus.port_read(base + 8, 4)), (64, 0));
    bus.port_write(base + 8, 4, 0x100);
    let (desc, avail, used) = (0x10_0000, 0x10_0000 + 1024, 0x10_1000);
    rig.memory.write(Gpa(desc), &[0, 0, 0x20, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    rig.memory.write(Gpa(avail + 2), &[1, 0, 0, 0]).unwrap();
    // As old drivers do: the queue is used before DRIVER_OK.
    bus.port_write(base + 16, 2, 0);
    assert_eq!(rig.memory.load_gpa::<u16>(Gpa(used + 2)), Some(1));
    assert_eq!((bus.port_read(base + 19, 1), bus.port_read(base + 19, 1)), (1, 0));
    bus.port_write(base + 18, 1, 7);
    assert_eq!(bus.port_read(base + 18, 1), 7);
    bus.port_write(base + 8, 4, 0);
    assert_eq!(bus.port_read(base + 18, 1), 0);
}
