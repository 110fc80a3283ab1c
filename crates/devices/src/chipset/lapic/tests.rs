//! Behaviour of the local APICs, as a guest and a vCPU see it.

use std::sync::Mutex;

use super::*;
use crate::chipset::testing::Noise;
use crate::clock::ManualClock;

const SVR: u64 = 0xf0;
const EOI: u64 = 0xb0;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR2: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

#[derive(Default)]
pub(in crate::chipset) struct Core(pub Mutex<Vec<String>>);

impl CpuSignal for Core {
    fn interrupt_pending(&self, pending: bool) {
        lock(&self.0).push(format!("pending {pending}"));
    }
    fn nmi(&self) {
        lock(&self.0).push("nmi".to_owned());
    }
    fn init(&self) {
        lock(&self.0).push("init".to_owned());
    }
    fn sipi(&self, vector: u8) {
        lock(&self.0).push(format!("sipi {vector:#x}"));
    }
}

pub(in crate::chipset) struct Board {
    pub clock: Arc<ManualClock>,
    pub timers: Arc<TimerQueue>,
    pub cores: Vec<Arc<Core>>,
    pub apics: Arc<Apics>,
}

impl Board {
    pub fn new(cpus: usize) -> Self {
        Self::with_model(cpus, ApicModel::default())
    }

    pub fn with_model(cpus: usize, model: ApicModel) -> Self {
        let clock = Arc::new(ManualClock::new(1_000));
        let timers = Arc::<TimerQueue>::default();
        let cores: Vec<Arc<Core>> = (0..cpus).map(|_| Arc::default()).collect();
        let signals = cores.iter().map(|c| Arc::<Core>::clone(c) as Arc<dyn CpuSignal>).collect();
        let apics = Apics::new(model, &(Arc::clone(&clock) as Arc<dyn Clock>), &timers, signals);
        Self { clock, timers, cores, apics }
    }

    /// All APICs software-enabled.
    pub fn enabled(cpus: usize) -> Self {
        let board = Self::new(cpus);
        (0..cpus).for_each(|i| write(board.cpu(i), SVR, 0x1ff));
        board
    }

    pub fn cpu(&self, i: usize) -> &Arc<Lapic> {
        &self.apics.lapics()[i]
    }

    fn pass(&self, ns: u64) {
        let end = self.clock.now().0 + ns;
        while let Some(at) = self.timers.next_deadline().filter(|at| at.0 <= end) {
            self.clock.advance(at.0.saturating_sub(self.clock.now().0));
            self.timers.run_due(self.clock.now());
        }
        self.clock.advance(end - self.clock.now().0);
    }

    fn heard(&self, i: usize) -> Vec<String> {
        std::mem::take(&mut *lock(&self.cores[i].0))
    }
}

pub(in crate::chipset) fn write(lapic: &Lapic, offset: u64, value: u32) {
    lapic.mmio_write(offset, &value.to_le_bytes());
}

fn read(lapic: &Lapic, offset: u64) -> u32 {
    let mut data = [0; 4];
    lapic.mmio_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn fixed(dest: u32, vector: u8) -> Msg {
    Msg { dest, vector, ..Msg::default() }
}

fn x2apic(lapic: &Lapic) {
    lapic.set_apic_base(lapic.apic_base() | BASE_X2APIC).unwrap();
}

#[test]
fn ack_several_pending_takes_highest_first() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    for v in [0x31, 0x80, 0x45] {
        assert!(b.apics.deliver(&fixed(0, v)));
    }
    assert_eq!(l.ack(), Some(Ack::Vector(0x80)));
    assert_eq!(read(l, PPR), 0x80);
    // Lower and equal classes wait for the EOI.
    b.apics.deliver(&fixed(0, 0x8f));
    assert!(!l.has_interrupt());
    assert_eq!(l.ack(), None);
    b.apics.deliver(&fixed(0, 0x90));
    assert_eq!(l.ack(), Some(Ack::Vector(0x90)));
    write(l, EOI, 0);
    write(l, EOI, 0);
    assert_eq!(l.ack(), Some(Ack::Vector(0x8f)));
    write(l, EOI, 0);
    assert_eq!(l.ack(), Some(Ack::Vector(0x45)));
    write(l, EOI, 0);
    assert_eq!(l.ack(), Some(Ack::Vector(0x31)));
    assert!(!l.has_interrupt());
}

#[test]
fn tpr_masks_class_until_lowered_and_signals_core() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    l.set_cr8(5);
    assert_eq!((l.cr8(), read(l, TPR), read(l, PPR)), (5, 0x50, 0x50));
    b.apics.deliver(&fixed(0, 0x5f));
    assert!(!l.has_interrupt());
    assert!(b.heard(0).is_empty());
    write(l, TPR, 0x4f);
    assert!(l.has_interrupt());
    assert_eq!(b.heard(0), ["pending true"]);
    l.set_cr8(0xf);
    assert!(!l.has_interrupt());
    assert_eq!(b.heard(0), ["pending false"]);
    write(l, TPR, 0x45);
    assert_eq!(l.ack(), Some(Ack::Vector(0x5f)));
    assert_eq!(read(l, PPR), 0x50);
    assert_eq!(b.heard(0), ["pending true", "pending false"]);
}

#[test]
fn software_disable_masks_lvts_and_refuses_fixed_but_takes_nmi() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, LVT_LINT0, 0x700);
    b.apics.deliver(&fixed(0, 0x40));
    write(l, SVR, 0xff);
    assert_eq!(read(l, LVT_LINT0), 0x1_0700);
    write(l, LVT_LINT0, 0x700);
    assert_eq!(read(l, LVT_LINT0), 0x1_0700);
    assert!(!b.apics.deliver(&fixed(0, 0x41)));
    // What was taken before is kept (SDM 3A 11.4.7.2).
    assert_eq!(l.ack(), Some(Ack::Vector(0x40)));
    assert_eq!(l.ack(), None);
    b.heard(0);
    assert!(b.apics.deliver(&Msg { delivery: Delivery::Nmi, ..fixed(0, 0) }));
    assert_eq!(b.heard(0), ["nmi"]);
}

#[test]
fn extint_through_lint0_follows_level_and_goes_first() {
    let b = Board::new(2);
    let l = b.cpu(0);
    l.set_virtual_wire();
    b.apics.deliver(&fixed(0, 0xf0));
    b.apics.set_lint(0, true);
    assert!(l.has_interrupt() && !b.cpu(1).has_interrupt());
    assert_eq!(l.ack(), Some(Ack::ExtInt));
    assert_eq!(l.ack(), Some(Ack::ExtInt));
    b.apics.set_lint(0, false);
    assert_eq!(l.ack(), Some(Ack::Vector(0xf0)));
    // TPR does not hold ExtINT back.
    l.set_cr8(15);
    b.apics.set_lint(0, true);
    assert!(l.has_interrupt());
    write(l, LVT_LINT0, 0x1_0700);
    assert!(!l.has_interrupt());
    // A globally disabled APIC: LINT0 is INTR, LINT1 is NMI.
    l.set_apic_base(DEFAULT_BASE).unwrap();
    assert_eq!(l.ack(), Some(Ack::ExtInt));
    b.heard(0);
    b.apics.set_lint(1, true);
    assert!(b.heard(0).contains(&"nmi".to_owned()));
}

#[test]
fn lint_level_fixed_sets_remote_irr_and_redelivers_on_eoi() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, LVT_LINT1, 0x8044);
    b.apics.set_lint(1, true);
    assert_eq!(read(l, LVT_LINT1), 0xc044);
    assert_eq!(l.ack(), Some(Ack::Vector(0x44)));
    write(l, EOI, 0);
    assert_eq!(l.ack(), Some(Ack::Vector(0x44)));
    b.apics.set_lint(1, false);
    write(l, EOI, 0);
    assert_eq!(read(l, LVT_LINT1), 0x8044);
    assert!(!l.has_interrupt());
}

#[test]
fn ipi_shorthands_reach_whom_they_name() {
    let b = Board::enabled(3);
    let l = b.cpu(1);
    write(l, ICR, 0x4_0041); // self
    write(l, ICR, 0x8_0042); // all
    write(l, ICR, 0xc_0043); // others
    let taken = |i: usize| {
        std::iter::from_fn(|| match b.cpu(i).ack() {
            Some(Ack::Vector(v)) => {
                write(b.cpu(i), EOI, 0);
                Some(v)
            }
            _ => None,
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(taken(0), [0x43, 0x42]);
    assert_eq!(taken(1), [0x42, 0x41]);
    assert_eq!(taken(2), [0x43, 0x42]);
    write(l, ICR2, 2 << 24);
    write(l, ICR, 0x50);
    assert_eq!((taken(0), taken(2)), (vec![], vec![0x50]));
    assert_eq!(read(l, ICR) & 0x1000, 0);
    write(l, ICR2, 0xff << 24);
    write(l, ICR, 0x51);
    assert_eq!((taken(0), taken(1), taken(2)), (vec![0x51], vec![0x51], vec![0x51]));
}

#[test]
fn init_and_startup_signal_the_core_and_reset_its_apic() {
    let b = Board::enabled(2);
    b.apics.deliver(&fixed(1, 0x60));
    b.heard(1);
    write(b.cpu(0), ICR2, 1 << 24);
    write(b.cpu(0), ICR, 0xc500); // INIT, level, assert
    assert_eq!(b.heard(1), ["pending false", "init"]);
    assert_eq!((read(b.cpu(1), SVR), read(b.cpu(1), 0x20)), (0xff, 1 << 24));
    write(b.cpu(0), ICR, 0x8500); // de-assert
    assert!(b.heard(1).is_empty());
    write(b.cpu(0), ICR, 0x4608);
    assert_eq!(b.heard(1), ["sipi 0x8"]);
    // Not to oneself.
    write(b.cpu(0), ICR, 0x4_4500);
    assert!(b.heard(0).is_empty());
}

#[test]
fn logical_flat_destination_matches_ldr_bits() {
    let b = Board::enabled(3);
    (0..3).for_each(|i| write(b.cpu(i), 0xd0, 1 << (24 + i)));
    let m = |dest| Msg { dest_mode: DestMode::Logical, ..fixed(dest, 0x40) };
    assert!(b.apics.deliver(&m(0b101)));
    assert_eq!([0, 1, 2].map(|i| b.cpu(i).has_interrupt()), [true, false, true]);
    assert!(!b.apics.deliver(&m(0x80)));
}

#[test]
fn logical_cluster_destination_matches_cluster_and_member() {
    let b = Board::enabled(3);
    for (i, ldr) in [0x11u32, 0x12, 0x21].into_iter().enumerate() {
        write(b.cpu(i), 0xe0, 0x0fff_ffff);
        write(b.cpu(i), 0xd0, ldr << 24);
    }
    assert_eq!(read(b.cpu(0), 0xe0), 0x0fff_ffff);
    let m = |dest| Msg { dest_mode: DestMode::Logical, ..fixed(dest, 0x40) };
    b.apics.deliver(&m(0x13));
    assert_eq!([0, 1, 2].map(|i| b.cpu(i).has_interrupt()), [true, true, false]);
    let b2 = Board::enabled(3);
    for (i, ldr) in [0x11u32, 0x12, 0x21].into_iter().enumerate() {
        write(b2.cpu(i), 0xe0, 0);
        write(b2.cpu(i), 0xd0, ldr << 24);
    }
    b2.apics.deliver(&m(0xf1));
    assert_eq!([0, 1, 2].map(|i| b2.cpu(i).has_interrupt()), [true, false, true]);
}

#[test]
fn logical_x2apic_destination_matches_derived_id() {
    let b = Board::enabled(18);
    (0..18).for_each(|i| x2apic(b.cpu(i)));
    assert_eq!(b.cpu(17).msr_read(0x80d), Ok(0x1_0002));
    b.cpu(0).msr_write(0x830, 0x0001_0003 << 32 | 0x840).unwrap();
    let hit: Vec<_> = (0..18).filter(|&i| b.cpu(i).has_interrupt()).collect();
    assert_eq!(hit, [16, 17]);
    // Physical broadcast needs all 32 bits.
    b.cpu(0).msr_write(0x830, 0xff << 32 | 0x50).unwrap();
    assert!(!b.cpu(1).has_interrupt());
    b.cpu(0).msr_write(0x830, 0xffff_ffff << 32 | 0x50).unwrap();
    assert!((0..18).all(|i| b.cpu(i).has_interrupt()));
}

#[test]
fn lowest_priority_goes_to_least_busy_processor() {
    let b = Board::enabled(3);
    b.cpu(0).set_cr8(4);
    b.cpu(1).set_cr8(2);
    b.cpu(2).set_cr8(9);
    let m = Msg { delivery: Delivery::Lowest, ..fixed(0xff, 0xa0) };
    assert!(b.apics.deliver(&m));
    assert_eq!([0, 1, 2].map(|i| b.cpu(i).has_interrupt()), [false, true, false]);
    write(b.cpu(1), SVR, 0xff);
    assert!(b.apics.deliver(&m));
    assert!(b.cpu(0).has_interrupt());
}

#[test]
fn msi_address_and_data_decode() {
    let m = Msg::from_msi(0xfee0_5000, 0x4041).unwrap();
    assert_eq!((m.dest, m.vector, m.delivery, m.dest_mode), (5, 0x41, Delivery::Fixed, DestMode::Physical));
    let m = Msg::from_msi(0xfeef_f00c, 0x0041).unwrap();
    assert_eq!((m.dest, m.delivery, m.dest_mode), (0xff, Delivery::Lowest, DestMode::Logical));
    assert_eq!(Msg::from_msi(0x1_fee0_0000, 0), None);
    assert_eq!(Msg::from_msi(0x1000, 0), None);
}

#[test]
fn apic_base_transitions_obey_the_manual() {
    let b = Board::new(2);
    let (l, ap) = (b.cpu(0), b.cpu(1));
    assert_eq!((l.apic_base(), ap.apic_base()), (0xfee0_0900, 0xfee0_0800));
    let set = |v| l.set_apic_base(v);
    assert_eq!(set(0xfee0_0400), Err(Gp)); // EXTD without EN
    assert_eq!(set(0xfee0_0901), Err(Gp)); // reserved bits
    assert_eq!(set(1 << 46 | 0x800), Err(Gp)); // beyond MAXPHYADDR
    assert_eq!(set(0x1234_5900), Ok(()));
    assert_eq!(l.mmio_base(), Some(Gpa(0x1234_5000)));
    assert_eq!(set(0xfee0_0d00), Ok(()));
    assert_eq!(l.mmio_base(), None);
    assert_eq!(set(0xfee0_0900), Err(Gp)); // x2APIC → xAPIC
    assert_eq!(set(0xfee0_0100), Ok(()));
    assert_eq!(set(0xfee0_0d00), Err(Gp)); // disabled → x2APIC
    assert_eq!(set(0xfee0_0900), Ok(()));
    let old = Board::with_model(1, ApicModel { x2apic: false, ..ApicModel::default() });
    assert_eq!(old.cpu(0).set_apic_base(0xfee0_0d00), Err(Gp));
}

#[test]
fn x2apic_msrs_fault_as_the_manual_says() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    assert_eq!(l.msr_read(0x802), Err(Gp)); // xAPIC mode
    x2apic(l);
    let mut data = [0; 4];
    l.mmio_read(0x30, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!((l.msr_read(0x802), l.msr_read(0x803)), (Ok(0), Ok(0x5_0014)));
    for msr in [0x800, 0x801, 0x80b, 0x80c, 0x80e, 0x82f, 0x831, 0x83a, 0x83f, 0x8ff] {
        assert_eq!(l.msr_read(msr), Err(Gp), "read {msr:#x}");
    }
    for msr in [0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x818, 0x827, 0x831, 0x839, 0x82f, 0x8ff] {
        assert_eq!(l.msr_write(msr, 0), Err(Gp), "write {msr:#x}");
    }
    let bad = [
        (0x808, 0x100),
        (0x80b, 1),
        (0x828, 1),
        (0x80f, 1 << 12),
        (0x832, 1 << 20),
        (0x837, 0x700),
        (0x83e, 4),
        (0x83f, 0x100),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x838, 1 << 32),
    ];
    for (msr, value) in bad {
        assert_eq!(l.msr_write(msr, value), Err(Gp), "write {msr:#x} {value:#x}");
    }
    l.msr_write(0x83f, 0x77).unwrap();
    assert_eq!(l.msr_read(0x823), Ok(1 << 0x17));
    assert_eq!(l.ack(), Some(Ack::Vector(0x77)));
    assert_eq!(l.msr_read(0x813), Ok(1 << 0x17));
    l.msr_write(0x80b, 0).unwrap();
    assert_eq!(l.msr_read(0x813), Ok(0));
}

#[test]
fn errors_latch_on_write_and_interrupt_once() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, LVT_ERROR, 0x50);
    write(l, ICR, 0x4_0005); // illegal vector sent
    assert_eq!(read(l, ESR), 0);
    assert_eq!(l.ack(), Some(Ack::Vector(0x50)));
    b.apics.deliver(&fixed(0, 3));
    read(l, 0x40);
    write(l, ESR, 0);
    assert_eq!(read(l, ESR), 0xe0);
    write(l, ESR, 0);
    assert_eq!(read(l, ESR), 0);
    write(l, LVT_ERROR, 0x05); // an error entry that is itself an error
    read(l, 0x40);
    write(l, ESR, 0);
    assert_eq!(read(l, ESR), 0xc0);
}

#[test]
fn timer_one_shot_counts_down_and_fires_once() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, DIVIDE, 0x3); // by 16
    write(l, LVT_TIMER, 0x60);
    write(l, INITIAL, 1000);
    assert_eq!(read(l, CURRENT), 1000);
    b.pass(8_000);
    assert_eq!(read(l, CURRENT), 500);
    assert!(!l.has_interrupt());
    b.pass(8_000);
    assert_eq!((read(l, CURRENT), l.ack()), (0, Some(Ack::Vector(0x60))));
    write(l, EOI, 0);
    b.pass(1_000_000);
    assert_eq!(l.ack(), None);
    write(l, INITIAL, 1000);
    write(l, INITIAL, 0);
    b.pass(1_000_000);
    assert!(!l.has_interrupt());
    assert_eq!(b.timers.next_deadline(), None);
}

#[test]
fn timer_periodic_keeps_its_phase_and_merges_missed_ticks() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, DIVIDE, 0xb); // by 1
    write(l, LVT_TIMER, 0x2_0060);
    write(l, INITIAL, 1_000_000);
    for _ in 0..3 {
        b.pass(1_000_000);
        assert_eq!(l.ack(), Some(Ack::Vector(0x60)));
        write(l, EOI, 0);
    }
    b.clock.advance(3_300_000); // a stall: three ticks missed
    assert_eq!(read(l, CURRENT), 700_000);
    b.timers.run_due(b.clock.now());
    assert_eq!(l.ack(), Some(Ack::Vector(0x60)));
    write(l, EOI, 0);
    assert_eq!(read(l, CURRENT), 700_000);
    b.pass(700_000);
    assert_eq!(l.ack(), Some(Ack::Vector(0x60)));
    // Masked: it counts but does not interrupt.
    write(l, EOI, 0);
    write(l, LVT_TIMER, 0x3_0060);
    b.pass(5_000_000);
    assert!(!l.has_interrupt());
    // A new divider goes on from the count.
    write(l, DIVIDE, 0x0);
    assert_eq!(read(l, CURRENT), 1_000_000);
    b.pass(1_000_000);
    assert_eq!(read(l, CURRENT), 500_000);
}

#[test]
fn timer_tiny_period_does_not_spin() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, DIVIDE, 0xb);
    write(l, LVT_TIMER, 0x2_0060);
    write(l, INITIAL, 1);
    let mut fired = 0;
    let end = b.clock.now().0 + 1_000_000;
    while let Some(at) = b.timers.next_deadline().filter(|at| at.0 <= end) {
        b.clock.advance(at.0 - b.clock.now().0);
        fired += b.timers.run_due(b.clock.now());
    }
    assert!(fired <= 101, "{fired}");
}

#[test]
fn tsc_deadline_fires_at_the_guest_tsc_and_clears_itself() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    l.msr_write(0x6e0, 5000).unwrap(); // ignored: not in the mode
    assert_eq!(l.msr_read(0x6e0), Ok(0));
    write(l, LVT_TIMER, 0x4_0061);
    l.msr_write(0x6e0, 5000).unwrap();
    assert_eq!(l.msr_read(0x6e0), Ok(5000));
    write(l, INITIAL, 77);
    assert_eq!(read(l, INITIAL), 0);
    b.pass(3999);
    assert!(!l.has_interrupt());
    b.pass(1);
    assert_eq!(l.ack(), Some(Ack::Vector(0x61)));
    assert_eq!(l.msr_read(0x6e0), Ok(0));
    write(l, EOI, 0);
    // In the past: at once.
    l.msr_write(0x6e0, 1).unwrap();
    assert_eq!(l.ack(), Some(Ack::Vector(0x61)));
    write(l, EOI, 0);
    // The guest's TSC runs 10000 ahead.
    l.set_tsc_offset(10_000);
    l.msr_write(0x6e0, 16_000).unwrap();
    b.pass(999);
    assert!(!l.has_interrupt());
    b.pass(1);
    assert_eq!(l.ack(), Some(Ack::Vector(0x61)));
    write(l, EOI, 0);
    // Leaving the mode disarms; 0 disarms.
    l.msr_write(0x6e0, 1 << 40).unwrap();
    write(l, LVT_TIMER, 0x61);
    assert_eq!(b.timers.next_deadline(), None);
    let old = Board::with_model(1, ApicModel { tsc_deadline: false, ..ApicModel::default() });
    assert_eq!(old.cpu(0).msr_read(0x6e0), Err(Gp));
    write(old.cpu(0), LVT_TIMER, 0x4_0061);
    assert_eq!(read(old.cpu(0), LVT_TIMER), 0x1_0061);
}

#[test]
fn snapshot_round_trip_continues_timer_and_interrupts() {
    let b = Board::enabled(1);
    let l = b.cpu(0);
    write(l, LVT_TIMER, 0x2_0060);
    write(l, INITIAL, 1_000_000);
    b.apics.deliver(&fixed(0, 0x90));
    b.pass(100);
    let blob = l.save_state();

    let other = Board::new(1);
    other.clock.advance(b.clock.now().0 - other.clock.now().0);
    other.cpu(0).restore_state(&blob).unwrap();
    assert_eq!(other.heard(0), ["pending true"]);
    assert_eq!(other.cpu(0).ack(), Some(Ack::Vector(0x90)));
    assert_eq!(read(other.cpu(0), CURRENT), read(l, CURRENT));
    other.pass(2_000_000);
    write(other.cpu(0), EOI, 0);
    assert_eq!(other.cpu(0).ack(), Some(Ack::Vector(0x60)));
}

#[test]
fn restore_damaged_blob_is_refused_and_changes_nothing() {
    let b = Board::enabled(2);
    let before = b.cpu(0).save_state();
    let mut bad = b.cpu(0).save_state();
    bad.data["base"] = serde_json::json!(0xfee0_0400u64);
    assert!(b.cpu(0).restore_state(&bad).is_err());
    bad.data["base"] = serde_json::json!("x");
    assert!(b.cpu(0).restore_state(&bad).is_err());
    assert!(b.cpu(0).restore_state(&b.cpu(1).save_state()).is_err());
    assert_eq!(b.cpu(0).save_state(), before);
    let mut odd = b.cpu(0).save_state();
    odd.data["svr"] = serde_json::json!(u32::MAX);
    odd.data["timer"]["expiry"] = serde_json::json!(u64::MAX);
    odd.data["timer"]["initial"] = serde_json::json!(u32::MAX);
    odd.data["timer"]["divide"] = serde_json::json!(u32::MAX);
    b.cpu(0).restore_state(&odd).unwrap();
    read(b.cpu(0), CURRENT);
    b.pass(1_000);
}

#[test]
fn nonsense_accesses_are_survived() {
    let b = Board::new(2);
    let mut noise = Noise(0x1234_5678_9abc_def1);
    for round in 0..200_000u32 {
        let (a, v) = (noise.next(), noise.next());
        let l = b.cpu(usize::from(a & 1 != 0));
        let low = u32::try_from(v & 0xffff_ffff).unwrap();
        match a >> 1 & 7 {
            0..=2 => write(l, a >> 8 & 0xff0, low),
            3 => l.mmio_write(a >> 8 & 0xfff, &v.to_le_bytes()[..usize::try_from(a >> 4 & 7).unwrap()]),
            4 => {
                let mut data = [0; 64];
                l.mmio_read(a >> 8 & 0xfff, &mut data[..usize::try_from(a >> 20 & 0x3f).unwrap()]);
            }
            5 => {
                let msr = 0x800 + u32::try_from(a >> 8 & 0xff).unwrap();
                let _ = (l.msr_read(msr), l.msr_write(msr, v), l.msr_write(0x6e0, v >> (a >> 32 & 63)));
            }
            6 => {
                let _ = l.set_apic_base(v & 0xfee0_0d00 | a >> 32 & 0x800);
                l.set_cr8(v);
                b.apics.msi(0xfee0_0000 | a >> 8 & 0xf_ffff, low);
            }
            _ => {
                let _ = l.ack();
                l.set_lint(usize::try_from(v & 3).unwrap(), a & 16 != 0);
                l.set_tsc_offset(v);
            }
        }
        if round % 64 == 0 {
            b.clock.advance(v & 0xffff_ffff);
            b.timers.run_due(b.clock.now());
            b.heard(0);
            b.heard(1);
        }
    }
}
