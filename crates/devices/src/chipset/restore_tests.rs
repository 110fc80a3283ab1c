//! Damaged snapshots: each device refuses them or lives on with them, whatever number they hold.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::testing::{Bench, Noise, Wishes, hammer_ports};
use super::{BytePorts, PortWindow, acpi_pm, hpet, i8042, pic, pit, rtc, serial};
use crate::bus::{MmioDevice, PortDevice, lock};
use crate::snapshot::Snapshot;

/// Replaces about one number in `rarity` by an odd one.
fn damage(value: &mut Value, rarity: u64, noise: &mut Noise) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| damage(item, rarity, noise)),
        Value::Object(items) => items.values_mut().for_each(|item| damage(item, rarity, noise)),
        Value::Number(_) | Value::Null if noise.next().is_multiple_of(rarity) => {
            let word = noise.next();
            *value = match word % 6 {
                0 => Value::from(u64::MAX),
                1 => Value::from(i64::MIN),
                2 => Value::from(u64::MAX >> 3),
                3 => Value::from(word >> 56),
                4 => Value::from(word >> 40),
                _ => Value::from(word >> 3),
            };
        }
        Value::Bool(flag) => *flag ^= noise.next().is_multiple_of(rarity),
        _ => {}
    }
}

/// Restores damaged states of `device` and uses it by `work` after each. Returns how many it took on.
fn restore_damaged<D: Snapshot>(bench: &Bench, device: &Mutex<D>, mut work: impl FnMut()) -> u32 {
    let good = lock(device).save();
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let mut taken = 0;
    for round in 0..2000 {
        let mut blob = good.clone();
        damage(&mut blob.data, [4, 16, 64, 256][round % 4], &mut noise);
        if lock(device).restore(&blob).is_ok() {
            taken += 1;
            bench.stall(noise.next() & 0xffff_ffff);
            work();
            lock(device).restore(&good).unwrap();
        }
    }
    taken
}

fn check_ports<D: Snapshot + BytePorts>(bench: &Bench, device: &Arc<Mutex<D>>, ports: &[u16]) {
    let taken = restore_damaged(bench, device, || hammer_ports(bench, device, ports, 20));
    assert!(taken > 0, "some damage cannot be told from a good state");
    // The window that the bus holds is no other way in.
    PortWindow { base: ports[0], device: Arc::clone(device) }.port_read(0, 4);
}

#[test]
fn restore_damaged_state_is_refused_or_survived() {
    struct Nowhere;
    impl pic::PicOutput for Nowhere {
        fn intr(&self, _level: bool) {}
    }
    let bench = Bench::new();
    bench.stall(5_000_000_000);
    let wishes = Arc::new(Wishes::default());
    let legacy = Arc::default();
    let config = rtc::CmosConfig { ram_below_4g: 1 << 30, ram_above_4g: 0, cpus: 1 };
    check_ports(&bench, &pic::Pic::new(Arc::new(Nowhere)), &[0x20, 0x21, 0xa0, 0xa1]);
    check_ports(
        &bench,
        &pit::Pit::new(bench.time.clone(), bench.line(2), Arc::clone(&legacy)),
        &[0x40, 0x42, 0x43, 0x61],
    );
    check_ports(&bench, &rtc::Rtc::new(bench.time.clone(), bench.line(8), legacy, config), &[0x70, 0x71]);
    let sink = Box::new(std::io::sink());
    check_ports(
        &bench,
        &serial::Serial::new("com1", bench.time.clone(), bench.line(4), sink),
        &[0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff],
    );
    let keyboard = i8042::I8042::new(bench.line(1), bench.line(12), Arc::default(), wishes);
    check_ports(&bench, &keyboard, &[0x60, 0x64]);
}

#[test]
fn restore_damaged_wide_registers_are_refused_or_survived() {
    let bench = Bench::new();
    bench.stall(5_000_000_000);
    let hpet = hpet::Hpet::new(bench.time.clone(), Arc::clone(&bench.lines) as _, Arc::default());
    let mut noise = Noise(99);
    let taken = restore_damaged(&bench, &hpet, || {
        for offset in [0x10, 0xf0, 0x100, 0x108, 0x120, 0x128] {
            lock(&hpet).mmio_write(offset, &noise.next().to_le_bytes());
            lock(&hpet).mmio_read(offset, &mut [0; 8]);
        }
        bench.stall(1_000_000);
    });
    assert!(taken > 0);
    let wishes = Arc::new(Wishes::default());
    let pm = acpi_pm::AcpiPm::new(bench.time.clone(), bench.line(9), wishes, true);
    let taken = restore_damaged(&bench, &pm, || {
        for offset in 0..12 {
            lock(&pm).port_write(offset, 1, 0xff);
            lock(&pm).port_read(offset, 4);
        }
        bench.stall(10_000_000_000);
    });
    assert!(taken > 0);
}
