//! Behaviour of the interrupt wiring, with real controllers.

use super::*;
use crate::chipset::BytePorts;
use crate::chipset::lapic::tests::{Board, write as lapic_write};

struct Wired {
    board: Board,
    pic: Arc<Mutex<Pic>>,
    ioapic: Arc<IoApic>,
    router: Arc<IrqRouter>,
}

fn wired() -> Wired {
    let board = Board::enabled(1);
    let ioapic = IoApic::new(Arc::clone(&board.apics));
    let pic = Pic::new(Arc::new(PicWire::new(Arc::clone(&ioapic), Arc::clone(&board.apics))));
    lock(&pic).firmware_init();
    let intr: Arc<dyn Intr8259> = Arc::<Mutex<Pic>>::clone(&pic);
    let router = IrqRouter::new(intr, Arc::clone(&ioapic), Arc::clone(&board.apics));
    Wired { board, pic, ioapic, router }
}

fn entry(ioapic: &IoApic, pin: u8, low: u32) {
    ioapic.mmio_write(0, &[0x10 + 2 * pin]);
    ioapic.mmio_write(0x10, &low.to_le_bytes());
}

fn unmask_all(w: &Wired, elcr: u8) {
    let mut pic = lock(&w.pic);
    pic.write8(0x21, 0);
    pic.write8(0xa1, 0);
    pic.write8(0x4d1, elcr);
}

#[test]
fn gsi_2_reaches_8259_line_0_and_ioapic_pin_2() {
    let w = wired();
    w.board.cpu(0).set_virtual_wire();
    w.router.set_gsi(2, true);
    assert!(w.board.cpu(0).has_interrupt());
    assert_eq!(w.router.ack(0), Some(0x08));
    assert_eq!(w.router.ack(0), None);
    w.router.set_gsi(2, false);
    lock(&w.pic).write8(0x20, 0x20);
    lock(&w.pic).write8(0x21, 0xff);
    entry(&w.ioapic, 2, 0x30);
    w.router.set_gsi(2, true);
    assert_eq!(w.router.ack(0), Some(0x30));
}

#[test]
fn extint_through_ioapic_pin_0_serves_every_8259_interrupt() {
    let w = wired();
    unmask_all(&w, 0);
    entry(&w.ioapic, 0, 0x700);
    w.router.set_gsi(4, true);
    w.router.set_gsi(3, true);
    assert_eq!(w.router.ack(0), Some(0x08 + 3));
    assert_eq!(w.router.ack(0), None);
    lock(&w.pic).write8(0x20, 0x20);
    assert_eq!(w.router.ack(0), Some(0x08 + 4));
}

#[test]
fn pci_link_shared_by_two_functions_is_high_until_both_let_go() {
    let w = wired();
    entry(&w.ioapic, 17, 0x8050);
    w.router.pull(1, true);
    w.router.pull(1, true);
    assert_eq!(w.router.ack(0), Some(0x50));
    w.router.pull(1, false);
    lapic_write(w.board.cpu(0), 0xb0, 0);
    assert_eq!(w.router.ack(0), Some(0x50));
    w.router.pull(1, false);
    lapic_write(w.board.cpu(0), 0xb0, 0);
    assert_eq!(w.router.ack(0), None);
}

#[test]
fn pirq_route_brings_pci_link_to_8259_and_follows_changes() {
    let w = wired();
    w.board.cpu(0).set_virtual_wire();
    unmask_all(&w, 0x0c); // IRQ 10 and 11 are level-triggered
    w.router.route(0, Some(10));
    w.router.pull(4, true); // link 4 is PIRQ A too
    assert_eq!(w.router.ack(0), Some(0x72));
    lock(&w.pic).write8(0xa0, 0x20);
    lock(&w.pic).write8(0x20, 0x20);
    assert_eq!(w.router.ack(0), Some(0x72), "still pulled");
    lock(&w.pic).write8(0xa0, 0x20);
    lock(&w.pic).write8(0x20, 0x20);
    w.router.route(0, Some(11));
    assert_eq!(w.router.ack(0), Some(0x73));
    lock(&w.pic).write8(0xa0, 0x20);
    lock(&w.pic).write8(0x20, 0x20);
    w.router.route(0, None);
    assert!(!w.board.cpu(0).has_interrupt());
}

#[test]
fn line_state_tells_free_pending_and_masked() {
    let w = wired();
    lock(&w.pic).write8(0x21, 0xff);
    assert_eq!(w.router.line_state(2), LineState::Masked);
    entry(&w.ioapic, 2, 0x30);
    assert_eq!(w.router.line_state(2), LineState::Free);
    w.router.set_gsi(2, true);
    w.router.set_gsi(2, false);
    assert_eq!(w.router.line_state(2), LineState::Pending);
    assert_eq!(w.router.ack(0), Some(0x30));
    assert_eq!(w.router.line_state(2), LineState::Free);
    lock(&w.pic).write8(0x21, 0);
    entry(&w.ioapic, 2, 0x1_0030);
    assert_eq!(w.router.line_state(2), LineState::Pending, "the 8259 latched the edge while masked");
    assert_eq!(w.router.line_state(u32::MAX), LineState::Masked);
}

#[test]
fn threads_that_send_end_and_pull_do_not_deadlock_or_lose_levels() {
    let board = Board::enabled(2);
    let ioapic = IoApic::new(Arc::clone(&board.apics));
    let pic = Pic::new(Arc::new(PicWire::new(Arc::clone(&ioapic), Arc::clone(&board.apics))));
    let router = IrqRouter::new(pic, Arc::clone(&ioapic), Arc::clone(&board.apics));
    for pin in 16..24 {
        ioapic.mmio_write(0, &[0x11 + 2 * pin]);
        ioapic.mmio_write(0x10, &(u32::from(pin & 1) << 24).to_le_bytes());
        entry(&ioapic, pin, 0x8040 + 0x10 * u32::from(pin - 16));
    }
    std::thread::scope(|s| {
        for link in 0..2u8 {
            let router = &router;
            s.spawn(move || {
                for i in 0..20_000u32 {
                    router.pull(link + u8::from(i & 2 != 0) * 2, i & 1 == 0);
                }
            });
        }
        for cpu in 0..2usize {
            let (router, board) = (&router, &board);
            s.spawn(move || {
                for i in 0..20_000u32 {
                    lapic_write(board.cpu(cpu), 0x310, u32::from(cpu == 0) << 24);
                    lapic_write(board.cpu(cpu), 0x300, 0xc0 + (i & 7));
                    while router.ack(cpu).is_some() {
                        lapic_write(board.cpu(cpu), 0xb0, 0);
                    }
                }
            });
        }
    });
    // All links are low again; what is left drains.
    for cpu in 0..2 {
        while router.ack(cpu).is_some() {
            lapic_write(board.cpu(cpu), 0xb0, 0);
        }
    }
    router.pull(0, true);
    assert_eq!(router.ack(0), Some(0x40));
}

#[test]
fn nonsense_lines_are_ignored() {
    let w = wired();
    for gsi in [0, 24, 255, u32::MAX] {
        w.router.set_gsi(gsi, true);
        w.router.set_gsi(gsi, false);
    }
    w.router.pull(255, false);
    w.router.route(200, Some(255));
    w.router.route(0, Some(255));
    w.router.msi(u64::MAX, u32::MAX);
    assert_eq!(w.router.ack(99), None);
    let blob = w.router.save_state();
    w.router.restore_state(&blob).unwrap();
}
