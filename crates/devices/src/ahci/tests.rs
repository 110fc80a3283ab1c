//! A driver's view of the controller, polite and not.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guestmem::{Gpa, GuestMemory};

use super::registers::{cmd, event, global, reg, status};
use super::{Ahci, BAR, Drive, PORT_BYTES, PORTS_AT};
use crate::pci::PciDevice as _;
use crate::snapshot::Snapshot as _;
use crate::virtio::block::{Image, ImageOptions};
use crate::virtio::rng::SplitMix64;

const RAM: u64 = 4 << 20;
const LIST: u64 = 0x1000;
const FIS: u64 = 0x2000;
const TABLE: u64 = 0x3000;
const DATA: u64 = 0x10_0000;
const DISK_BYTES: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Rig {
    ahci: Ahci,
    memory: Arc<GuestMemory>,
    files: Vec<tempfile::NamedTempFile>,
}

/// Port 0 is a disk, port 1 a CD-ROM whose block n begins with n.
fn rig(synchronous: bool) -> Rig {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(DISK_BYTES as u64).unwrap();
    let mut medium = tempfile::NamedTempFile::new().unwrap();
    for block in 0..100u32 {
        let mut bytes = vec![0; 2048];
        bytes[..4].copy_from_slice(&block.to_le_bytes());
        medium.write_all(&bytes).unwrap();
    }
    let open = |file: &tempfile::NamedTempFile, read_only| {
        Arc::new(Image::open(&ImageOptions { read_only, ..ImageOptions::new(file.path()) }).unwrap())
    };
    let drives = [
        Drive { image: open(&disk, false), cdrom: false, serial: "D1".to_owned() },
        Drive { image: open(&medium, true), cdrom: true, serial: "C1".to_owned() },
    ];
    let memory = GuestMemory::new(RAM).unwrap();
    let mut ahci = Ahci::new(&drives, &memory, synchronous).unwrap();
    ahci.config_write(4, &6u16.to_le_bytes()); // memory, bus master
    let mut rig = Rig { ahci, memory, files: vec![disk, medium] };
    rig.set(global::GHC, global::GHC_IE | global::GHC_AE);
    for port in 0..2 {
        rig.start(port);
    }
    rig
}

impl Rig {
    fn set(&mut self, offset: u64, value: u32) {
        self.ahci.bar_write(BAR, offset, &value.to_le_bytes());
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.ahci.bar_read(BAR, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn port(&mut self, port: u64, register: u64) -> u32 {
        self.get(PORTS_AT + port * PORT_BYTES + register)
    }

    fn set_port(&mut self, port: u64, register: u64, value: u32) {
        self.set(PORTS_AT + port * PORT_BYTES + register, value);
    }

    fn start(&mut self, port: u64) {
        let apart = u32::try_from(port * 0x400).unwrap();
        self.set_port(port, reg::CLB, u32::try_from(LIST).unwrap() + apart);
        self.set_port(port, reg::FB, u32::try_from(FIS).unwrap() + apart);
        self.set_port(port, reg::IE, event::ALL);
        self.set_port(port, reg::CMD, cmd::FRE | cmd::ST);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(Gpa(at), bytes).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(Gpa(DATA), &mut bytes).unwrap();
        bytes
    }

    /// Puts a command into a slot: data at [`DATA`], in pieces of `piece` bytes.
    fn prepare(&self, port: u64, slot: u64, fis: [u8; 16], packet: [u8; 16], len: u32, piece: u32) {
        let table = TABLE + slot * 0x1000;
        self.put(table, &fis);
        self.put(table + 0x40, &packet);
        let (mut at, mut entries) = (0, 0u16);
        while at < len {
            let now = piece.min(len - at);
            let place = table + 0x80 + u64::from(entries) * 16;
            self.put(place, &(DATA + u64::from(at)).to_le_bytes());
            self.put(place + 12, &(now - 1).to_le_bytes());
            (at, entries) = (at + now, entries + 1);
        }
        let header = u32::from(entries) << 16 | 5;
        let list = LIST + port * 0x400 + slot * 32;
        self.put(list, &[u64::from(header).to_le_bytes(), table.to_le_bytes()].concat());
    }

    /// Waits until the slot is done or the port has an error; says the task file.
    fn settle(&mut self, port: u64, slot: u32) -> u32 {
        let start = Instant::now();
        loop {
            let (ci, is) = (self.port(port, reg::CI), self.port(port, reg::IS));
            if ci >> slot & 1 == 0 || is & (event::TFES | event::HBFS) != 0 {
                return self.port(port, reg::TFD);
            }
            assert!(start.elapsed() < PATIENCE, "no end of the command");
            std::thread::yield_now();
        }
    }

    fn run(&mut self, port: u64, command: Ata, len: u32) -> u32 {
        self.prepare(port, 0, command.fis(), command.packet, len, 1 << 20);
        self.set_port(port, reg::CI, 1);
        self.settle(port, 0)
    }

    fn packet(&mut self, packet: [u8; 16], len: u32) -> u32 {
        self.run(1, Ata { packet, features: 1, ..Ata::new(0xa0, 0, 0) }, len)
    }

    /// What a driver does after an error.
    fn restart(&mut self, port: u64) {
        self.set_port(port, reg::CMD, cmd::FRE);
        let start = Instant::now();
        while self.port(port, reg::CMD) & cmd::CR != 0 {
            assert!(start.elapsed() < PATIENCE, "the list does not stop");
        }
        self.set_port(port, reg::IS, u32::MAX);
        self.set_port(port, reg::CMD, cmd::FRE | cmd::ST);
    }
}

#[derive(Clone, Copy)]
struct Ata {
    command: u8,
    lba: u64,
    count: u16,
    features: u16,
    packet: [u8; 16],
}

impl Ata {
    fn new(command: u8, lba: u64, count: u16) -> Self {
        Self { command, lba, count, features: 0, packet: [0; 16] }
    }

    fn queued(command: u8, lba: u64, count: u16, tag: u16) -> Self {
        Self { features: count, ..Self::new(command, lba, tag << 3) }
    }

    fn fis(self) -> [u8; 16] {
        let l = self.lba.to_le_bytes();
        let ([f0, f1], [c0, c1]) = (self.features.to_le_bytes(), self.count.to_le_bytes());
        [0x27, 0x80, self.command, f0, l[0], l[1], l[2], 0x40, l[3], l[4], l[5], f1, c0, c1, 0, 0]
    }
}

fn words(bytes: &[u8]) -> Vec<u16> {
    bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
}

#[test]
fn identify_says_size_and_ends_with_an_interrupt() {
    let mut rig = rig(false);
    assert_eq!((rig.get(global::PI), rig.port(0, reg::SIG), rig.port(1, reg::SIG)), (3, 0x101, 0xeb14_0101));
    assert_eq!(rig.run(0, Ata::new(0xec, 0, 0), 512), u32::from(status::GOOD));
    let words = words(&rig.data(512));
    assert_eq!(usize::from(words[100]) | usize::from(words[101]) << 16, DISK_BYTES / 512);
    assert_eq!(rig.data(512).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
    assert_eq!(rig.port(0, reg::IS), event::PSS);
    assert!(rig.get(global::IS) == 1 && rig.ahci.function().intx().level());
    rig.set_port(0, reg::IS, event::PSS);
    rig.set(global::IS, 1);
    assert!(rig.get(global::IS) == 0 && !rig.ahci.function().intx().level());
    assert_eq!(rig.run(1, Ata::new(0xec, 0, 0), 512) & 1, 1, "a CD-ROM is no disk");
}

#[test]
fn written_data_is_read_back_by_every_kind_of_command() {
    for synchronous in [false, true] {
        let mut rig = rig(synchronous);
        let mut rng = SplitMix64::new(7);
        for (write, read) in [(0x35u8, 0x25u8), (0xca, 0xc8), (0x30, 0x24), (0x3d, 0x25), (0x61, 0x60)] {
            let bytes: Vec<u8> = (0..300 * 512 / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
            let count = if matches!(write, 0xca | 0x30) { 200 } else { 300u16 };
            let len = u32::from(count) * 512;
            for (command, is_read) in [(write, false), (read, true)] {
                rig.put(DATA, if is_read { &[0x55; 300 * 512] } else { &bytes });
                let ata = if matches!(write, 0x61) {
                    Ata::queued(command, 100, count, 4)
                } else {
                    Ata::new(command, 100, count)
                };
                // Pieces that end within sectors.
                rig.prepare(0, 4, ata.fis(), ata.packet, len, 3002);
                rig.set_port(0, reg::SACT, if matches!(write, 0x61) { 1 << 4 } else { 0 });
                rig.set_port(0, reg::CI, 1 << 4);
                assert_eq!(rig.settle(0, 4), u32::from(status::GOOD), "{command:#x}");
                assert_eq!(rig.port(0, reg::SACT), 0);
            }
            let len = usize::try_from(len).unwrap();
            assert!(rig.data(len) == bytes[..len], "{write:#x}");
        }
        let mut moved = [0; 4];
        rig.memory.read(Gpa(LIST + 4 * 32 + 4), &mut moved).unwrap();
        assert_eq!(u32::from_le_bytes(moved), 300 * 512, "PRDBC");
    }
}

#[test]
fn failed_command_halts_the_list_and_the_log_tells_the_tag() {
    let mut rig = rig(false);
    let beyond = Ata::queued(0x60, (DISK_BYTES / 512) as u64, 1, 9);
    rig.prepare(0, 9, beyond.fis(), [0; 16], 512, 512);
    rig.set_port(0, reg::SACT, 1 << 9);
    rig.set_port(0, reg::CI, 1 << 9);
    assert_eq!(rig.settle(0, 9) & 1, 1);
    let good = Ata::new(0x25, 0, 1);
    rig.prepare(0, 0, good.fis(), [0; 16], 512, 512);
    rig.set_port(0, reg::CI, 1);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(rig.port(0, reg::CI) & 1, 1, "nothing is executed until the list starts again");
    rig.restart(0);
    assert_eq!(rig.run(0, Ata::new(0x2f, 0x10, 1), 512) & 1, 0);
    assert_eq!(rig.data(3), [9, 0, status::GOOD | 1]);
    for (ata, len, why) in [
        (Ata::new(0x25, 0, 2), 512, "a table that is too short"),
        (Ata::new(0x42, 1 << 40, 1), 0, "an address beyond the end"),
        (Ata::new(0x99, 0, 0), 0, "no such command"),
    ] {
        assert_eq!(rig.run(0, ata, len) & 1, 1, "{why}");
        rig.restart(0);
    }
    rig.set_port(0, reg::CLB, 0xffff_fc00);
    rig.set_port(0, reg::CI, 1);
    rig.settle(0, 0);
    assert_ne!(rig.port(0, reg::IS) & event::HBFS, 0, "a list that is no memory");
}

#[test]
fn trim_zeroes_and_flush_and_features_are_known() {
    let mut rig = rig(false);
    rig.put(DATA, &[7; 512 * 64]);
    assert_eq!(rig.run(0, Ata::new(0x35, 0, 64), 512 * 64) & 1, 0);
    let range = (64u64 << 48).to_le_bytes();
    rig.put(DATA, &[&range[..], &[0; 504]].concat());
    assert_eq!(rig.run(0, Ata { features: 1, ..Ata::new(0x06, 0, 1) }, 512) & 1, 0);
    assert_eq!(rig.run(0, Ata::new(0x25, 0, 64), 512 * 64) & 1, 0);
    assert!(rig.data(512 * 64).iter().all(|&byte| byte == 0));
    for ata in [Ata::new(0xea, 0, 0), Ata { features: 0x82, ..Ata::new(0xef, 0, 0) }, Ata::new(0xe5, 0, 0)] {
        assert_eq!(rig.run(0, ata, 0) & 1, 0, "{:#x}", ata.command);
    }
}

#[test]
fn cdrom_has_contents_and_says_why_not() {
    let mut rig = rig(false);
    let mut cdb = [0; 16];
    cdb[0] = 0x25;
    assert_eq!(rig.packet(cdb, 8) & 1, 0);
    assert_eq!(rig.data(8), [0, 0, 0, 99, 0, 0, 8, 0]);
    (cdb[0], cdb[5], cdb[8]) = (0x28, 42, 3);
    assert_eq!(rig.packet(cdb, 3 * 2048) & 1, 0);
    let blocks = rig.data(3 * 2048);
    assert_eq!((blocks[0], blocks[2048], blocks[4096]), (42, 43, 44));
    (cdb[0], cdb[5], cdb[8], cdb[7]) = (0x43, 0, 12, 0);
    assert_eq!(rig.packet(cdb, 12) & 1, 0);
    assert_eq!(rig.data(12), [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    (cdb[0], cdb[5], cdb[8]) = (0x28, 99, 2);
    assert_eq!(rig.packet(cdb, 4096) >> 12, 5, "the sense key of an address beyond the end");
    rig.restart(1);
    cdb = [0; 16];
    (cdb[0], cdb[4]) = (0x03, 18);
    assert_eq!(rig.packet(cdb, 18) & 1, 0);
    assert_eq!((rig.data(18)[2], rig.data(18)[12]), (5, 0x21));
    cdb[0] = 0x2a;
    assert_eq!(rig.packet(cdb, 2048) & 1, 1, "nothing writes to it");
}

#[test]
fn resets_bring_the_signature_back() {
    let mut rig = rig(false);
    for (control, slot) in [(4u8, 0), (0, 1)] {
        let mut fis = Ata::new(0, 0, 0).fis();
        (fis[1], fis[15]) = (0, control);
        rig.prepare(1, slot, fis, [0; 16], 0, 1);
        rig.set_port(1, reg::CI, 1 << slot);
        rig.settle(1, u32::try_from(slot).unwrap());
    }
    assert_eq!(rig.port(1, reg::SIG), 0xeb14_0101);
    rig.set_port(0, reg::SCTL, 1);
    rig.set_port(0, reg::SCTL, 0x300);
    assert_eq!((rig.port(0, reg::SIG), rig.port(0, reg::SSTS)), (0x101, 0x113));
    rig.set(global::GHC, global::GHC_HR);
    assert_eq!((rig.get(global::GHC), rig.port(0, reg::CLB)), (global::GHC_AE, 0));
}

#[test]
fn saved_state_goes_on_where_it_was() {
    let mut one = rig(false);
    one.put(DATA, &[9; 512]);
    assert_eq!(one.run(0, Ata::new(0x35, 5, 1), 512) & 1, 0);
    let blob = one.ahci.save();
    let mut other = rig(false);
    other.ahci.restore(&blob).unwrap();
    assert_eq!(other.port(0, reg::IS), event::DHRS);
    assert_eq!(other.get(global::IS), 1);
    assert_eq!(other.run(0, Ata::new(0xec, 0, 0), 512) & 1, 0, "addresses and command bits are there");
    let mut damaged = blob;
    damaged.data["ports"][0]["last"] = 200.into();
    assert!(other.ahci.restore(&damaged).is_err());
    damaged.data["ports"] = serde_json::json!([]);
    assert!(other.ahci.restore(&damaged).is_err());
}

/// Chance in the sizes that registers and commands have.
struct Chance(SplitMix64);

impl Chance {
    fn below(&mut self, most: u32) -> u32 {
        u32::try_from(self.0.next() % u64::from(most)).unwrap()
    }

    fn word(&mut self) -> u32 {
        u32::try_from(self.0.next() >> 32).unwrap()
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.0.next() >> 56).unwrap()
    }

    fn once_in(&mut self, times: u32) -> bool {
        self.below(times) == 0
    }

    fn one_of(&mut self, bytes: &[u8]) -> u8 {
        bytes[usize::try_from(self.0.next()).unwrap() % bytes.len()]
    }
}

/// Random registers, lists and tables, changing under the controller's feet. Nothing may panic, hang, or leave the disk.
#[test]
fn hostile_lists_and_registers_are_survived() {
    const ATA: [u8; 12] = [0xec, 0xa1, 0xa0, 0x25, 0x35, 0x60, 0x61, 0x06, 0x2f, 0xef, 0xea, 0xc8];
    const PACKETS: [u8; 8] = [0x28, 0xa8, 0x43, 0x46, 0x4a, 0x5a, 0x12, 0x03];
    for seed in 0..24 {
        let mut rig = rig(seed % 2 == 1);
        let mut chance = Chance(SplitMix64::new(seed));
        for _ in 0..400 {
            let (port, slot) = (u64::from(chance.below(2)), u64::from(chance.below(4)));
            let count = u16::try_from(chance.below(512)).unwrap();
            let mut fis = Ata::new(chance.byte(), chance.below(4000).into(), count).fis();
            if chance.once_in(3) {
                fis[2] = chance.one_of(&ATA);
            }
            let mut packet: [u8; 16] = std::array::from_fn(|_| chance.byte());
            if chance.once_in(2) {
                packet[0] = chance.one_of(&PACKETS);
                packet[2..6].copy_from_slice(&chance.below(128).to_be_bytes());
            }
            rig.prepare(port, slot, fis, packet, chance.below(70_000), 16 + chance.below(9000));
            for _ in 0..chance.below(4) {
                // Into tables and lists, whatever they are doing.
                let at = LIST + u64::from(chance.below(0x1000)) * 8;
                rig.put(at, &chance.0.next().to_le_bytes());
            }
            match chance.below(6) {
                0 => {
                    let at = u64::from(chance.below(0x800)) * 4;
                    rig.set(at, chance.word());
                }
                1 => rig.restart(port),
                2 => rig.start(port),
                _ => {}
            }
            rig.set_port(port, reg::SACT, chance.word());
            rig.set_port(port, reg::CI, 1 << slot | chance.below(16));
        }
        rig.set(global::GHC, global::GHC_HR);
        rig.start(0);
        rig.set(global::GHC, global::GHC_IE);
        assert_eq!(rig.run(0, Ata::new(0xec, 0, 0), 512) & 1, 0, "seed {seed}: it works after a reset");
        let len = rig.files[0].as_file().metadata().unwrap().len();
        assert_eq!(len, DISK_BYTES as u64, "seed {seed}: the disk has not grown");
    }
}
