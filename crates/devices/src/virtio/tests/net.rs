//! The network card on a backend that the test holds the other end of.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestmem::Gpa;
use hostnet::{Header, Offloads};

use super::driver::*;
use crate::bus::lock;
use crate::net::CardOptions;
use crate::net::fake::{Fake, Wire};
use crate::snapshot::Snapshot;
use crate::virtio::Flavor;
use crate::virtio::net::{Net, Plug};

const MRG_RXBUF: u64 = 1 << 15;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// A card that nobody answers, for tests of every device.
pub fn card() -> Net {
    let plug: Plug = Arc::new(Mutex::new(Box::new(Fake(Arc::default()))));
    Net::new("virtio-net.0", MAC, &plug, CardOptions::default()).unwrap()
}

fn rig() -> (Rig, Arc<Mutex<Wire>>) {
    let wire = Arc::<Mutex<Wire>>::default();
    let plug: Plug = Arc::new(Mutex::new(Box::new(Fake(Arc::clone(&wire)))));
    (
        Rig::new(
            Box::new(Net::new("virtio-net.0", MAC, &plug, CardOptions::default()).unwrap()),
            Flavor::Transitional,
        ),
        wire,
    )
}

fn bytes(rig: &Rig, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    rig.memory.read(Gpa(at), &mut data).unwrap();
    data
}

#[test]
fn configuration_tells_address_and_link() {
    let (rig, wire) = rig();
    let at = rig.structure(4);
    let mac: Vec<u8> = (0..6).map(|i| rig.read(at + i, 1) as u8).collect();
    assert_eq!(mac, MAC);
    assert_eq!(rig.read(at + 6, 2), 1);
    rig.start(0, 2);
    lock(&wire).down = true;
    eventually("link down", || (rig.read(at + 6, 2) == 0).then_some(()));
    // A configuration change is told by an interrupt.
    eventually("interrupt", || (rig.isr() & 2 != 0).then_some(()));
}

#[test]
fn frames_and_headers_are_passed_on() {
    let (rig, wire) = rig();
    let mut rings = rig.start(MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4, 2);
    let header = Header { flags: 1, checksum_start: 34, checksum_offset: 16, ..Header::default() };
    let mut packet = header.to_bytes().to_vec();
    packet.extend([0, 0]);
    packet.extend(b"hello, network");
    rig.memory.write(Gpa(DATA), &packet).unwrap();
    // The header and the frame cut where the driver likes.
    rings[1].add(&[(DATA, 5, false), (DATA + 5, 10, false), (DATA + 15, packet.len() as u32 - 15, false)]);
    rings[1].kick(&rig);
    assert_eq!(rings[1].wait().1, 0);
    assert_eq!(lock(&wire).sent, [(header, b"hello, network".to_vec())]);
    assert_eq!(lock(&wire).accepts, [Offloads { checksum: true, tso4: true, ..Offloads::default() }]);
}

#[test]
fn long_frame_fills_several_buffers_and_appears_whole() {
    let (rig, wire) = rig();
    let mut rings = rig.start(MRG_RXBUF, 2);
    let frame: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
    lock(&wire).coming.push_back((Header::default(), frame.clone()));
    for i in 0..2u64 {
        rings[0].add(&[(DATA + 0x1000 * i, 1024, true)]);
        rings[0].kick(&rig);
    }
    // Two buffers do not suffice: nothing of it may be seen.
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(rings[0].used_idx(), 0);
    rings[0].add(&[(DATA + 0x2000, 1024, true)]);
    rings[0].kick(&rig);
    let lens: Vec<u32> = (0..3).map(|_| rings[0].wait().1).collect();
    assert_eq!(lens, [1024, 1024, 3012 - 2048]);
    let mut seen = bytes(&rig, DATA, 1024);
    seen.extend(bytes(&rig, DATA + 0x1000, 1024));
    seen.extend(bytes(&rig, DATA + 0x2000, 3012 - 2048));
    assert_eq!(seen[10..12], [3, 0], "num_buffers");
    assert_eq!(seen[12..], frame);
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_lost_and_the_next_comes() {
    let (rig, wire) = rig();
    let mut rings = rig.start(0, 2);
    lock(&wire).coming.push_back((Header::default(), vec![1; 3000]));
    lock(&wire).coming.push_back((Header::default(), vec![2; 60]));
    rings[0].add(&[(DATA, 1526, true)]);
    rings[0].kick(&rig);
    assert_eq!(rings[0].wait().1, 72);
    assert_eq!(bytes(&rig, DATA + 12, 60), [2; 60]);
}

#[test]
fn frames_that_make_no_sense_are_given_back_and_not_sent() {
    let (rig, wire) = rig();
    let mut rings = rig.start(INDIRECT, 2);
    // Shorter than a header, empty, longer than any frame, outside RAM; then a good one.
    rings[1].add(&[(DATA, 4, false)]);
    rings[1].add(&[(DATA, 12, false)]);
    rings[1].add(&[(DATA, 200_000, false)]);
    rings[1].add(&[(RAM - 16, 64, false)]);
    rings[1].add(&[(DATA, 12 + 60, false)]);
    rings[1].kick(&rig);
    for _ in 0..5 {
        rings[1].wait();
    }
    let sent = std::mem::take(&mut lock(&wire).sent);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1.len(), 60);
}

#[test]
fn card_goes_on_after_save_and_restore() {
    let (rig, wire) = rig();
    let mut rings = rig.start(MRG_RXBUF | EVENT_IDX, 2);
    for round in 0..3u8 {
        rig.memory.write(Gpa(DATA), &[round; 100]).unwrap();
        rings[1].add(&[(DATA, 100, false)]);
        rings[1].kick(&rig);
        rings[1].wait();
        rings[0].add(&[(DATA + 0x1000, 2048, true)]);
        rings[0].kick(&rig);
        lock(&wire).coming.push_back((Header::default(), vec![round; 80]));
        assert_eq!(rings[0].wait().1, 92);
        assert_eq!(bytes(&rig, DATA + 0x100c, 80), [round; 80]);
        let saved = lock(&rig.device).save();
        lock(&rig.device).restore(&saved).unwrap();
    }
    let sent = lock(&wire).sent.len();
    assert_eq!(sent, 3);
}

#[test]
fn a_second_card_takes_over_when_the_first_is_gone() {
    let wire = Arc::<Mutex<Wire>>::default();
    let plug: Plug = Arc::new(Mutex::new(Box::new(Fake(Arc::clone(&wire)))));
    for round in 1..=2 {
        let rig = Rig::new(
            Box::new(Net::new("virtio-net.0", MAC, &plug, CardOptions::default()).unwrap()),
            Flavor::Modern,
        );
        let mut rings = rig.start(0, 2);
        rings[1].add(&[(DATA, 100, false)]);
        rings[1].kick(&rig);
        rings[1].wait();
        assert_eq!(lock(&wire).sent.len(), round);
    }
}
