//! The card as a driver sees it, on a backend whose other end the test holds.

#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guestmem::{Gpa, GuestMemory};
use hostnet::{Header, Offloads};

use super::regs::{self, cause, ctrl, rctl, rxcsum, tctl};
use super::*;
use crate::net::fake::{Fake, Wire};
use crate::net::sum;
use crate::pci::PciDevice as _;

const RAM: u64 = 2 << 20;
const TX: u64 = 0x1000;
const RX: u64 = 0x2000;
const DATA: u64 = 0x1_0000;
const BUFFERS: u64 = 0x8_0000;
const SIZE: u32 = 16;
const MAC: Mac = [0x52, 0x54, 0, 1, 2, 3];

struct Rig {
    card: E1000,
    memory: Arc<GuestMemory>,
    wire: Arc<Mutex<Wire>>,
    tail: u32,
    next: u32,
}

impl Rig {
    fn new(offloads: Offloads) -> Self {
        let wire = Arc::new(Mutex::new(Wire { offloads, ..Wire::default() }));
        let plug: Plug = Arc::new(Mutex::new(Box::new(Fake(Arc::clone(&wire)))));
        let memory = GuestMemory::new(RAM).unwrap();
        let mut card =
            E1000::new("e1000.0", MAC, &plug, CardOptions::default(), Arc::clone(&memory)).unwrap();
        card.config_write(4, &[7, 0]);
        Self { card, memory, wire, tail: 0, next: 0 }
    }

    fn get(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.card.bar_read(0, offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u32, value: u32) {
        self.card.bar_write(0, offset.into(), &value.to_le_bytes());
    }

    /// Rings as a driver sets them up, with buffers of 2 KiB.
    fn start(&mut self) {
        for (base, at) in [(regs::TDBAL, TX), (regs::RDBAL, RX)] {
            self.set(base, u32::try_from(at).unwrap());
            self.set(base + 8, SIZE * 16);
        }
        for n in 0..SIZE {
            let buffer = BUFFERS + u64::from(n) * 2048;
            self.write(RX + u64::from(n) * 16, &buffer.to_le_bytes());
        }
        self.set(regs::RDT, SIZE - 1);
        self.set(regs::TCTL, tctl::EN | tctl::PSP);
        self.set(regs::RCTL, rctl::EN | rctl::BAM);
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write(Gpa(at), bytes).unwrap();
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read(Gpa(at), &mut data).unwrap();
        data
    }

    /// Adds a transmit descriptor: address and its second half.
    fn add(&mut self, address: u64, second: u64) {
        let at = TX + u64::from(self.tail) * 16;
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &second.to_le_bytes());
        self.tail = (self.tail + 1) % SIZE;
    }

    /// Tells of what was added, and waits until the card has taken it.
    fn send(&mut self) {
        let tail = self.tail;
        self.set(regs::TDT, tail);
        self.until(|rig| rig.get(regs::TDBAL + 0x10) == tail);
    }

    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(60), "it never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn sent(&self) -> Vec<(Header, Vec<u8>)> {
        std::mem::take(&mut lock(&self.wire).sent)
    }

    /// What comes next into the receive ring: the descriptor, and the bytes.
    fn received(&mut self) -> ([u8; 16], Vec<u8>) {
        let at = RX + u64::from(self.next) * 16;
        self.until(|rig| rig.read(at + 12, 1)[0] & 1 != 0);
        let descriptor: [u8; 16] = self.read(at, 16).try_into().unwrap();
        let len = u16::from_le_bytes([descriptor[8], descriptor[9]]).into();
        let data = self.read(BUFFERS + u64::from(self.next) * 2048, len);
        self.next = (self.next + 1) % SIZE;
        (descriptor, data)
    }

    fn comes(&self, frame: &[u8]) {
        lock(&self.wire).coming.push_back((Header::default(), frame.to_vec()));
    }
}

/// A TCP packet over IPv4 as a driver prepares it for segmentation: no lengths, no sums but the pseudo header's.
fn tcp(payload: usize) -> Vec<u8> {
    let mut p = vec![0; 54];
    p[..6].fill(9);
    p[6..12].copy_from_slice(&MAC);
    p[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
    p[18..20].copy_from_slice(&[0x12, 0xff]);
    p[22..24].copy_from_slice(&[64, 6]);
    p[26..34].copy_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2]);
    p[34..54].copy_from_slice(&[0, 80, 0, 81, 0xff, 0xff, 0xff, 0, 0, 0, 0, 1, 0x50, 0x19, 1, 0, 0, 0, 0, 0]);
    let pseudo = sum(&p[26..34], 6);
    p[50..52].copy_from_slice(&pseudo.to_be_bytes());
    p.extend((0..payload).map(|i| (i * 7) as u8));
    p
}

/// A context for [`tcp`]: IP 14, its sum at 24 over 14..=33; TCP at 34, its sum at 50.
fn context(command: u8, header: u8, mss: u16) -> (u64, u64) {
    let low = 14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40;
    let high = u64::from(command | 0x20) << 24 | u64::from(header) << 40 | u64::from(mss) << 48;
    (low, high)
}

const EOP: u64 = 1 << 24;
const IC: u64 = 1 << 26;
const TSE: u64 = 1 << 26;
const RS: u64 = 1 << 27;
const DATA_DESCRIPTOR: u64 = 1 << 29 | 1 << 20;
const SUMS: u64 = 3 << 40;

fn check_tcp(packet: &[u8]) {
    assert_eq!(sum(&packet[14..34], 0), 0xffff, "IP sum");
    let len = usize::from(u16::from_be_bytes([packet[16], packet[17]]));
    assert_eq!(len + 14, packet.len());
    let pseudo = u32::from(sum(&packet[26..34], 6)) + (len as u32 - 20);
    assert_eq!(sum(&packet[34..], pseudo), 0xffff, "TCP sum");
}

#[test]
fn legacy_descriptors_send_and_report() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    rig.set(regs::IMS, cause::TXDW);
    rig.write(DATA, &tcp(100));
    rig.add(DATA, 54);
    rig.add(DATA + 54, 100 | EOP | RS);
    // And a short one, with a sum put in at 16 over everything from 14 on.
    rig.add(DATA, 20 | EOP | IC | 16 << 16 | 14 << 40);
    rig.send();
    let sent = rig.sent();
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[0].1, tcp(100));
    assert_eq!(sent[1].1.len(), 60, "padded");
    assert_eq!(sum(&sent[1].1[14..20], 0), 0xffff);
    assert_eq!(rig.read(TX + 16 + 12, 1)[0] & 1, 1, "DD");
    assert_eq!(rig.read(TX + 12, 1)[0] & 1, 0, "not asked for");
    rig.until(|rig| rig.card.function().intx().level());
    assert_ne!(rig.get(regs::ICR) & cause::TXDW, 0);
    assert!(!rig.card.function().intx().level(), "a read of ICR lowers the pin");
    assert_eq!((rig.get(0x4080), rig.get(0x4080)), (2, 0), "statistics are cleared by reading");
}

#[test]
fn segmentation_is_done_here_or_left_to_the_backend() {
    for tso4 in [false, true] {
        let mut rig = Rig::new(Offloads { checksum: tso4, tso4, tso6: false });
        rig.start();
        let payload = 3000;
        rig.write(DATA, &tcp(payload));
        let (low, high) = context(7, 54, 1400);
        rig.add(low, high);
        rig.add(DATA, 54 | DATA_DESCRIPTOR | TSE | SUMS);
        rig.add(DATA + 54, payload as u64 | DATA_DESCRIPTOR | TSE | EOP | RS);
        rig.send();
        let sent = rig.sent();
        let original = tcp(payload);
        if tso4 {
            let (header, frame) = &sent[0];
            assert_eq!((header.flags, header.gso_type, header.gso_size), (1, 1, 1400));
            assert_eq!((header.header_len, header.checksum_start, header.checksum_offset), (54, 34, 16));
            assert_eq!(u16::from_be_bytes([frame[16], frame[17]]), 3040);
            assert_eq!(sum(&frame[14..34], 0), 0xffff);
            assert_eq!(frame[54..], original[54..]);
            let pseudo = u32::from(sum(&frame[26..34], 6)) + 3020;
            assert_eq!(frame[50..52], sum(&[], pseudo).to_be_bytes());
            continue;
        }
        assert_eq!(sent.iter().map(|(_, f)| f.len() - 54).collect::<Vec<_>>(), [1400, 1400, 200]);
        let mut data: Vec<u8> = Vec::new();
        for (nth, (header, frame)) in sent.iter().enumerate() {
            assert_eq!(*header, Header::default());
            check_tcp(frame);
            let sequence = u32::from_be_bytes(frame[38..42].try_into().unwrap());
            assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(1400 * nth as u32));
            assert_eq!(u16::from_be_bytes([frame[18], frame[19]]), 0x12ff + nth as u16);
            assert_eq!(frame[47], if nth == 2 { 0x19 } else { 0x10 }, "FIN and PSH in the last alone");
            data.extend(&frame[54..]);
        }
        assert_eq!(data, original[54..]);
    }
}

#[test]
fn sums_are_put_in_or_left_out() {
    for checksum in [false, true] {
        let mut rig = Rig::new(Offloads { checksum, ..Offloads::default() });
        rig.start();
        let mut packet = tcp(100);
        packet[16..18].copy_from_slice(&140u16.to_be_bytes());
        let pseudo = sum(&packet[26..34], 6 + 120);
        packet[50..52].copy_from_slice(&pseudo.to_be_bytes());
        rig.write(DATA, &packet);
        let (low, high) = context(3, 0, 0);
        rig.add(low, high);
        rig.add(DATA, 154 | DATA_DESCRIPTOR | EOP | SUMS);
        rig.send();
        let (header, frame) = rig.sent().remove(0);
        if checksum {
            assert_eq!((header.flags, header.checksum_start, header.checksum_offset), (1, 34, 16));
            assert_eq!(frame[50..52], pseudo.to_be_bytes());
        } else {
            check_tcp(&frame);
        }
    }
}

#[test]
fn tags_are_put_in_and_taken_out() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    rig.set(regs::CTRL, ctrl::VME);
    rig.write(DATA, &tcp(10));
    rig.add(DATA, 64 | EOP | 1 << 30 | 5 << 48);
    rig.send();
    let (_, frame) = rig.sent().remove(0);
    assert_eq!(frame[12..18], [0x81, 0, 0, 5, 8, 0]);
    let mut coming = frame;
    coming[..6].copy_from_slice(&MAC);
    rig.comes(&coming);
    let (descriptor, data) = rig.received();
    assert_eq!(data.len(), 64 + 4);
    assert_eq!(data[12..14], [8, 0]);
    assert_ne!(descriptor[12] & 8, 0, "VP");
    assert_eq!(descriptor[14..], [5, 0]);
}

#[test]
fn frames_for_others_are_left_and_sums_are_checked() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    rig.set(regs::RXCSUM, rxcsum::IPOFL | rxcsum::TUOFL);
    let mut packet = tcp(100);
    rig.comes(&packet);
    packet[..6].copy_from_slice(&[1, 0, 0x5e, 0, 0, 1]);
    rig.comes(&packet);
    packet[..6].copy_from_slice(&MAC);
    rig.comes(&packet);
    let mut good = packet.clone();
    good[16..18].copy_from_slice(&140u16.to_be_bytes());
    let ip = !sum(&good[14..34], 0);
    good[24..26].copy_from_slice(&ip.to_be_bytes());
    good[50..52].fill(0);
    let transport = !sum(&good[34..], u32::from(sum(&good[26..34], 6 + 120)));
    good[50..52].copy_from_slice(&transport.to_be_bytes());
    rig.comes(&good);
    let (descriptor, data) = rig.received();
    assert_eq!(data[..6], MAC, "neither another's nor a group that was not asked for");
    assert_eq!(descriptor[12] & 4, 4, "not looked at: its length is nonsense");
    let (descriptor, _) = rig.received();
    assert_eq!((descriptor[12] & 0x64, descriptor[13]), (0x60, 0));
    good[60] ^= 1;
    good[22] ^= 1;
    rig.comes(&good);
    assert_eq!(rig.received().0[13], 0x60);
    rig.set(regs::RCTL, rctl::EN | rctl::UPE | rctl::MPE);
    rig.comes(&tcp(10));
    assert_eq!(rig.received().1[..6], [9; 6]);
}

#[test]
fn frame_waits_for_buffers_and_long_ones_fill_several() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    let mut frame = vec![3; 5000];
    frame[..6].copy_from_slice(&MAC);
    rig.comes(&frame);
    rig.comes(&[0xff; 60]);
    let (_, data) = rig.received();
    assert_eq!(data[..60], [0xff; 60], "too long without LPE");
    rig.set(regs::RCTL, rctl::EN | rctl::LPE);
    rig.set(regs::RDT, 2);
    rig.until(|rig| rig.get(regs::RDBAL + 0x10) == 1);
    rig.comes(&frame);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.get(regs::RDBAL + 0x10), 1, "one buffer is not enough");
    rig.set(regs::RDT, 8);
    let pieces: Vec<_> = (0..3).map(|_| rig.received()).collect();
    assert_eq!(pieces.iter().map(|(d, _)| d[12] & 2).collect::<Vec<_>>(), [0, 0, 2], "EOP");
    let all: Vec<u8> = pieces.into_iter().flat_map(|(_, data)| data).collect();
    assert_eq!(all[..5000], frame);
    assert_eq!(all.len(), 5004);
    assert_ne!(rig.get(0x40a0), 0, "RNBC");
}

#[test]
fn interrupts_keep_their_distance() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    const GAP: Duration = Duration::from_millis(16);
    rig.set(regs::ITR, 62_500);
    rig.set(regs::IMS, cause::ALL);
    rig.set(regs::ICS, cause::RXT0);
    let first = Instant::now();
    assert!(rig.card.function().intx().level());
    rig.get(regs::ICR);
    rig.set(regs::ICS, cause::RXT0);
    assert!(!rig.card.function().intx().level() || first.elapsed() >= GAP);
    rig.until(|rig| rig.card.function().intx().level());
    assert!(first.elapsed() >= GAP - Duration::from_millis(1), "{:?}", first.elapsed());
    rig.set(regs::IMC, cause::ALL);
    assert!(!rig.card.function().intx().level());
    assert_eq!(lock(&rig.card.shared.state).interrupts(), 2);
}

#[test]
fn reset_through_the_ports_forgets_all_but_the_address() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    rig.set(regs::RAL0, 7);
    rig.card.bar_write(1, 0, &regs::CTRL.to_le_bytes());
    rig.card.bar_write(1, 4, &ctrl::RST.to_le_bytes());
    assert_eq!(rig.get(regs::RCTL) | rig.get(regs::TCTL) | rig.get(regs::TDBAL + 8), 0);
    assert_eq!(rig.get(regs::RAL0), 0x0100_5452);
    assert_eq!(rig.get(regs::RAH0), 0x8000_0302);
    assert_eq!(rig.get(regs::STATUS) & 2, 2, "the link stays");
    lock(&rig.wire).down = true;
    rig.card.worker.wake();
    rig.until(|rig| rig.get(regs::STATUS) & 2 == 0);
    assert_ne!(rig.get(regs::ICR) & cause::LSC, 0);
}

#[test]
fn state_survives_and_a_damaged_one_is_refused() {
    let mut rig = Rig::new(Offloads::default());
    rig.start();
    rig.write(DATA, &tcp(100));
    rig.add(DATA, 54);
    rig.send();
    let saved = rig.card.save();
    rig.set(regs::CTRL, ctrl::RST);
    rig.card.restore(&saved).unwrap();
    // The packet goes on where it stood.
    rig.add(DATA + 54, 100 | EOP);
    rig.send();
    assert_eq!(rig.sent().remove(0).1, tcp(100));
    for (path, value) in
        [("/state/plain", "[1]"), ("/state/statistics", "[]"), ("/state/transmit/ring/len_bytes", "7")]
    {
        let mut bad = saved.clone();
        *bad.data.pointer_mut(path).unwrap() = serde_json::from_str(value).unwrap();
        assert!(rig.card.restore(&bad).is_err(), "{path}");
    }
}

#[test]
fn hostile_rings_cost_packets_only() {
    let mut rig = Rig::new(Offloads { checksum: true, tso4: true, tso6: true });
    rig.start();
    // Buffers outside memory or around its end, packets without end, segments without size, offsets beyond the packet.
    rig.add(u64::MAX - 3, 60 | EOP);
    rig.add(RAM - 10, 60 | EOP);
    rig.add(DATA, EOP);
    for _ in 0..3 {
        rig.add(DATA, 0xf_ffff | DATA_DESCRIPTOR | TSE);
    }
    rig.add(DATA, 60 | DATA_DESCRIPTOR | EOP);
    rig.send();
    for (low, high) in [context(7, 54, 0), context(7, 255, 1), context(7, 10, 1400), (u64::MAX, u64::MAX)] {
        rig.add(low, high & !(0xf << 20) | 1 << 29);
        rig.add(DATA, 5000 | DATA_DESCRIPTOR | TSE | SUMS | EOP);
        rig.add(DATA, 60 | DATA_DESCRIPTOR | SUMS | EOP);
        rig.send();
    }
    assert!(rig.sent().iter().all(|(_, frame)| frame.len() <= MAX_FRAME));
    // Rings that are no rings: no memory, no length, heads and tails beyond.
    for (base, len, head, tail) in [
        (0xffff_fff0, 0xffff_ffff, 0, 9),
        (TX, 0, 5, 9),
        (TX, 128, 8, 3),
        (TX, 128, 3, 0xffff),
        (RAM, 4096, 0, 200),
    ] {
        for ring in [regs::TDBAL, regs::RDBAL] {
            rig.set(ring, base as u32);
            rig.set(ring + 4, if base == TX { 0 } else { 0xffff_ffff });
            rig.set(ring + 8, len);
            rig.set(ring + 0x10, head);
            rig.set(ring + 0x18, tail);
        }
        rig.comes(&[0xff; 60]);
        std::thread::sleep(Duration::from_millis(5));
    }
    // The card still lives.
    rig.set(regs::CTRL, ctrl::RST);
    (rig.tail, rig.next) = (0, 0);
    rig.start();
    rig.sent();
    rig.write(DATA, &tcp(10));
    rig.add(DATA, 64 | EOP | RS);
    rig.send();
    assert_eq!(rig.sent()[0].1, tcp(10));
}
