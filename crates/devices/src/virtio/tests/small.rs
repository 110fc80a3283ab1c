//! Console and entropy.

use std::io::Write;
use std::sync::{Arc, Mutex};

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::snapshot::Snapshot;
use crate::virtio::Flavor;
use crate::virtio::console::{Console, ConsoleHandle};
use crate::virtio::rng::{Entropy, Rng};

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn console() -> (Rig, Screen, ConsoleHandle) {
    let screen = Screen::default();
    let (device, handle) = Console::new("virtio-console.0", Box::new(screen.clone()), 80, 25);
    (Rig::new(Box::new(device), Flavor::Modern), screen, handle)
}

#[test]
fn console_transmit_prints_and_receive_fills_buffers() {
    let (rig, screen, handle) = console();
    assert_eq!(handle.receive(b"early "), 6, "input before the driver is kept");
    let mut rings = rig.start(EVENT_IDX | 1, 2);
    rig.memory.write(Gpa(DATA), b"hello, world\n").unwrap();
    rings[1].add(&[(DATA, 7, false), (DATA + 7, 6, false)]);
    rings[1].kick(&rig);
    assert_eq!(rings[1].take(), Some((0, 0)));
    assert_eq!(*lock(&screen.0), b"hello, world\n");

    rings[0].add(&[(DATA + 0x100, 4, true)]);
    assert!(rings[0].wants_kick());
    rings[0].kick(&rig);
    assert_eq!(rings[0].take(), Some((0, 4)));
    rings[0].add(&[(DATA + 0x104, 64, true)]);
    assert!(rings[0].wants_kick(), "input waits, so the device listens");
    rings[0].kick(&rig);
    assert_eq!(rings[0].take(), Some((1, 2)));
    rings[0].add(&[(DATA + 0x106, 64, true)]);
    rings[0].kick(&rig);
    assert_eq!(handle.receive(b"late"), 4);
    assert_eq!(rings[0].take(), Some((2, 4)));
    let mut text = [0; 10];
    rig.memory.read(Gpa(DATA + 0x100), &mut text).unwrap();
    assert_eq!(&text, b"early late");
}

#[test]
fn console_resize_interrupts_and_shows() {
    let (rig, _screen, handle) = console();
    rig.enable_msix();
    handle.resize(100, 40);
    rig.start(1, 2);
    assert!(lock(&rig.board.messages).is_empty());
    let generation = rig.common(21, 1);
    handle.resize(132, 50);
    handle.resize(132, 50);
    assert_eq!(*lock(&rig.board.messages), [(0xfee0_0000, 0x40)]);
    assert_ne!(rig.common(21, 1), generation);
    assert_eq!(rig.read(rig.structure(4), 8), 1 << 32 | 50 << 16 | 132);
    assert_eq!(rig.isr(), 2);
}

#[test]
fn console_emergency_write_prints_without_driver() {
    let (rig, screen, _handle) = console();
    rig.write(rig.structure(4) + 8, 4, u64::from(b'!'));
    assert_eq!(*lock(&screen.0), b"!");
}

#[test]
fn console_input_backlog_is_bounded() {
    let (_rig, _screen, handle) = console();
    assert_eq!(handle.receive(&[b'x'; 100_000]), 64 << 10);
    assert_eq!(handle.receive(b"y"), 0);
}

#[test]
fn console_restored_in_mid_use_goes_on() {
    let (rig, _screen, handle) = console();
    let mut rings = rig.start(EVENT_IDX, 2);
    rings[0].add(&[(DATA, 1, true)]);
    assert_eq!(handle.receive(b"abc"), 3);
    let blob = lock(&rig.device).save();
    let (device, handle) = Console::new("virtio-console.0", Box::new(Screen::default()), 80, 25);
    let next = Rig::with_memory(Box::new(device), Flavor::Modern, rig.memory.clone());
    lock(&next.device).restore(&blob).unwrap();
    next.host.remap();
    rings[0].add(&[(DATA + 1, 9, true)]);
    rings[0].kick(&next);
    assert_eq!((rings[0].take(), rings[0].take()), (Some((0, 1)), Some((1, 2))));
    assert_eq!(handle.receive(b"d"), 1);
    let mut text = [0; 3];
    next.memory.read(Gpa(DATA), &mut text).unwrap();
    assert_eq!(&text, b"abc");
}

#[test]
fn rng_seeded_repeats_and_host_differs() {
    let fill = |entropy| {
        let rig = Rig::new(Box::new(Rng::new("virtio-rng.0", entropy)), Flavor::Modern);
        let mut ring = rig.start(INDIRECT, 1).remove(0);
        ring.add_indirect(DATA + 0x1000, &[(DATA, 5, true), (DATA + 5, 11, true)]);
        ring.kick(&rig);
        assert_eq!(ring.take(), Some((0, 16)));
        rig.memory.load_gpa::<u64>(Gpa(DATA + 8)).unwrap()
    };
    let seeded = fill(Entropy::seeded(7));
    assert_eq!(seeded, fill(Entropy::seeded(7)));
    assert_ne!(seeded, fill(Entropy::seeded(8)));
    let host = fill(Entropy::host().unwrap());
    assert_ne!(host, fill(Entropy::host().unwrap()));
}

#[test]
fn rng_huge_request_is_cut_and_bad_memory_survived() {
    let rig = Rig::new(Box::new(Rng::new("virtio-rng.0", Entropy::seeded(7))), Flavor::Modern);
    let mut ring = rig.start(0, 1).remove(0);
    ring.add(&[(DATA, 0x10_0000, true), (DATA, u32::MAX, true)]);
    ring.add(&[(0xa_0000, 64, true)]);
    ring.add(&[(DATA, 64, false)]);
    ring.kick(&rig);
    assert_eq!(ring.take(), Some((0, 64 << 10)));
    assert_eq!((ring.take(), ring.take()), (Some((2, 0)), Some((3, 0))));
}
