//! Behaviour of the IO-APIC.

use super::*;
use crate::chipset::lapic::{Ack, tests::Board, tests::write as lapic_write};
use crate::chipset::testing::Noise;

const EOI: u64 = 0xb0;

fn board(cpus: usize) -> (Board, Arc<IoApic>) {
    let board = Board::enabled(cpus);
    let ioapic = IoApic::new(Arc::clone(&board.apics));
    (board, ioapic)
}

fn put(ioapic: &IoApic, register: u8, value: u32) {
    ioapic.mmio_write(0, &u32::from(register).to_le_bytes());
    ioapic.mmio_write(0x10, &value.to_le_bytes());
}

fn get(ioapic: &IoApic, register: u8) -> u32 {
    ioapic.mmio_write(0, &u32::from(register).to_le_bytes());
    let mut data = [0; 4];
    ioapic.mmio_read(0x10, &mut data);
    u32::from_le_bytes(data)
}

fn entry(ioapic: &IoApic, pin: u8, low: u32, dest: u32) {
    put(ioapic, 0x11 + 2 * pin, dest << 24);
    put(ioapic, 0x10 + 2 * pin, low);
}

#[test]
fn registers_after_reset_show_version_and_masked_entries() {
    let (_b, io) = board(1);
    assert_eq!(get(&io, 1), 0x0017_0020);
    put(&io, 0, 0xffff_ffff);
    assert_eq!(get(&io, 0), 0x0f00_0000);
    for pin in 0..24 {
        assert_eq!(get(&io, 0x10 + 2 * pin), 0x1_0000);
    }
    put(&io, 0x10, 0xffff_ffff);
    put(&io, 0x11, 0xffff_ffff);
    assert_eq!((get(&io, 0x10), get(&io, 0x11)), (0x1_afff, 0xff00_0000));
    assert_eq!(get(&io, 0x40), 0);
}

#[test]
fn edge_line_interrupts_once_per_rise_and_is_lost_while_masked() {
    let (b, io) = board(2);
    entry(&io, 4, 0x1_0034, 1);
    io.set_line(4, true);
    entry(&io, 4, 0x34, 1);
    assert!(!b.cpu(1).has_interrupt());
    io.set_line(4, true);
    assert!(!b.cpu(1).has_interrupt());
    io.set_line(4, false);
    io.set_line(4, true);
    assert_eq!(b.cpu(1).ack(), Some(Ack::Vector(0x34)));
    lapic_write(b.cpu(1), EOI, 0);
    assert!(!b.cpu(1).has_interrupt());
}

#[test]
fn level_line_still_high_at_eoi_is_delivered_again() {
    let (b, io) = board(1);
    entry(&io, 20, 0x8045, 0);
    io.set_line(20, true);
    assert_eq!(get(&io, 0x10 + 40), 0xc045);
    assert_eq!(b.cpu(0).ack(), Some(Ack::Vector(0x45)));
    io.set_line(20, false);
    io.set_line(20, true);
    assert!(!b.cpu(0).has_interrupt(), "in service");
    lapic_write(b.cpu(0), EOI, 0);
    assert_eq!(b.cpu(0).ack(), Some(Ack::Vector(0x45)));
    io.set_line(20, false);
    lapic_write(b.cpu(0), EOI, 0);
    assert_eq!(get(&io, 0x10 + 40), 0x8045);
    assert!(!b.cpu(0).has_interrupt());
}

#[test]
fn level_line_high_while_masked_is_delivered_on_unmask() {
    let (b, io) = board(1);
    entry(&io, 20, 0x1_8045, 0);
    io.set_line(20, true);
    assert!(!b.cpu(0).has_interrupt());
    entry(&io, 20, 0x8045, 0);
    assert!(b.cpu(0).has_interrupt());
}

#[test]
fn level_line_refused_by_disabled_apic_leaves_remote_irr_clear() {
    let (b, io) = board(1);
    lapic_write(b.cpu(0), 0xf0, 0xff);
    entry(&io, 20, 0x8045, 0);
    io.set_line(20, true);
    assert_eq!(get(&io, 0x10 + 40), 0x8045);
}

#[test]
fn eoi_register_and_mode_switch_clear_remote_irr() {
    let (b, io) = board(1);
    entry(&io, 20, 0x8045, 0);
    io.set_line(20, true);
    io.set_line(20, false);
    io.mmio_write(0x40, &0x44u32.to_le_bytes());
    assert_eq!(get(&io, 0x10 + 40), 0xc045);
    io.mmio_write(0x40, &0x45u32.to_le_bytes());
    assert_eq!(get(&io, 0x10 + 40), 0x8045);
    io.set_line(20, true);
    io.set_line(20, false);
    put(&io, 0x10 + 40, 0x1_0045);
    put(&io, 0x10 + 40, 0x8045);
    assert_eq!(get(&io, 0x10 + 40), 0x8045);
    assert!(b.cpu(0).has_interrupt());
}

#[test]
fn extint_and_nmi_entries_reach_the_core() {
    let (b, io) = board(1);
    entry(&io, 0, 0x700, 0);
    io.set_line(0, true);
    assert_eq!(b.cpu(0).ack(), Some(Ack::ExtInt));
    assert!(!b.cpu(0).has_interrupt());
    entry(&io, 1, 0x8400, 0);
    io.set_line(1, true);
    assert!(lock(&b.cores[0].0).contains(&"nmi".to_owned()));
}

#[test]
fn snapshot_round_trip_keeps_entries_and_lines() {
    let (b, io) = board(1);
    entry(&io, 20, 0x8045, 0);
    io.set_line(20, true);
    let (lapic, blob) = (b.cpu(0).save_state(), io.save_state());
    let (b2, io2) = board(1);
    b2.cpu(0).restore_state(&lapic).unwrap();
    io2.restore_state(&blob).unwrap();
    assert_eq!(io2.save_state(), blob);
    assert_eq!(b2.cpu(0).ack(), Some(Ack::Vector(0x45)));
    lapic_write(b2.cpu(0), EOI, 0);
    assert!(b2.cpu(0).has_interrupt(), "the line is still high");
    let mut bad = blob;
    bad.data["entries"] = serde_json::json!([1, 2]);
    assert!(io2.restore_state(&bad).is_err());
}

#[test]
fn nonsense_accesses_are_survived() {
    let (b, io) = board(2);
    let mut noise = Noise(0x0bad_cafe_0bad_cafe);
    for _ in 0..200_000 {
        let (a, v) = (noise.next(), noise.next());
        let len = usize::try_from(a >> 12 & 7).unwrap() + 1;
        let offset = if a & 1 != 0 { a >> 16 & 0x10 } else { a >> 16 & 0xfff };
        match a >> 1 & 3 {
            0 => io.mmio_write(offset, &v.to_le_bytes()[..len]),
            1 => io.mmio_read(offset, &mut [0; 64][..len * 8]),
            2 => io.set_line(usize::try_from(v & 31).unwrap(), v & 32 != 0),
            _ => {
                let _ = b.cpu(usize::from(v & 1 != 0)).ack();
                lapic_write(b.cpu(usize::from(v & 1 != 0)), EOI, 0);
            }
        }
    }
}
