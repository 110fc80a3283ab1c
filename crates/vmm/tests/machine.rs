//! Whole machines with tiny guests: how runs end, and what outlives what.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use vmm::boot::{BootSource, Protocol};
use vmm::{ClockMode, Outcome, Snapshot, Vm, VmConfig, VmError};

use common::Capture;

const BASE: u32 = 0x10_0000;

/// A multiboot image whose code (32-bit, flat, at [`BASE`] + 0x20) is `code`.
fn guest(code: &[u8]) -> BootSource {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum, BASE, BASE, 0, 0, BASE + 0x20];
    let mut kernel: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    kernel.extend(code);
    BootSource { kernel, kernel_name: "tiny".to_owned(), ..BootSource::default() }
}

fn config(code: &[u8]) -> VmConfig {
    VmConfig { memory_bytes: 8 << 20, timeout: Some(Duration::from_secs(60)), ..VmConfig::new(guest(code)) }
}

fn run(config: VmConfig) -> Outcome {
    Vm::new(config).unwrap().run().unwrap()
}

/// `mov dx, port; mov eax, value; out dx, eax` (or ax, al by size).
fn out(port: u16, size: u8, value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba];
    code.extend(port.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    match size {
        1 => code.push(0xee),
        2 => code.extend([0x66, 0xef]),
        _ => code.push(0xef),
    }
    code
}

const SPIN: [u8; 2] = [0xeb, 0xfe];
const CLI_HLT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

fn then(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn power_off_by_acpi_ends_the_run() {
    assert_eq!(run(config(&then(&[&out(0x604, 2, 0x2000), &SPIN]))), Outcome::PoweredOff);
}

#[test]
fn debug_exit_carries_32_bits() {
    let mut c = config(&then(&[&out(0xf4, 4, 0x1234_5678), &SPIN]));
    c.isa_debug_exit = true;
    assert_eq!(run(c), Outcome::DebugExit(0x1234_5678));
}

#[test]
fn every_way_to_reset_resets() {
    for code in [out(0xcf9, 1, 6), out(0x64, 1, 0xfe), out(0x92, 1, 1)] {
        let mut c = config(&then(&[&code, &SPIN]));
        c.no_reboot = true;
        assert_eq!(run(c), Outcome::Reset);
    }
}

#[test]
fn reset_boots_again_with_memory_and_cmos_kept() {
    // Counts its boots in CMOS byte 0x40: writes '0' + count to COM1, resets until it was the third.
    let code = then(&[
        &out(0x70, 1, 0x40),
        &[0xe4, 0x71, 0xfe, 0xc0, 0xe6, 0x71], // in al, 0x71; inc al; out 0x71, al
        &[0x88, 0xc3, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee], // mov bl, al; add al, '0'; out 0x3f8, al
        &[0x80, 0xfb, 3, 0x72, 13],            // cmp bl, 3; jb over the power-off
        &out(0x604, 2, 0x2000),
        &[0xeb, 0xfe],
        &out(0xcf9, 1, 6),
        &SPIN,
    ]);
    let output = Capture::default();
    let mut vm = Vm::new(VmConfig { serial: output.sink(), ..config(&code) }).unwrap();
    assert_eq!(vm.run().unwrap(), Outcome::PoweredOff);
    assert_eq!(output.text(), "123");
    assert_eq!(vm.stats().resets, 2);
    assert!(vm.stats().instructions() > 20);
}

#[test]
fn triple_fault_is_told() {
    // lidt of an empty table, then int3.
    let code = [0x0f, 0x01, 0x1d, 0x2a, 0x00, 0x10, 0x00, 0xcc, 0xeb, 0xfe, 0, 0, 0, 0, 0, 0];
    assert!(matches!(run(config(&code)), Outcome::TripleFault { vcpu: 0, .. }));
}

#[test]
fn spin_with_interrupts_off_ends_by_time_out() {
    for clock in [ClockMode::Host, ClockMode::Icount] {
        let mut c = config(&then(&[&[0xfa], &SPIN]));
        c.timeout = Some(Duration::from_millis(300));
        c.clock = clock;
        let mut vm = Vm::new(c).unwrap();
        assert_eq!(vm.run().unwrap(), Outcome::Timeout);
        assert!(vm.stats().instructions() > 1000);
    }
}

#[test]
fn halt_with_interrupts_off_sleeps_on_host_time_and_is_stuck_with_icount() {
    let mut c = config(&CLI_HLT);
    c.timeout = Some(Duration::from_millis(300));
    let mut vm = Vm::new(c).unwrap();
    assert_eq!(vm.run().unwrap(), Outcome::Timeout);
    assert!(vm.stats().instructions() < 100, "{}", vm.stats());
    let mut c = config(&CLI_HLT);
    c.clock = ClockMode::Icount;
    assert!(matches!(run(c), Outcome::Stuck { .. }));
}

#[test]
fn quit_from_another_thread_ends_the_run() {
    let mut vm = Vm::new(config(&SPIN)).unwrap();
    let handle = vm.handle();
    let quitter = std::thread::spawn(move || {
        // A busy host may not have come to the guest at once.
        let runs = (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            handle.stats().unwrap().instructions() > 1000
        });
        drop(handle.pause().unwrap());
        handle.quit();
        runs
    });
    assert_eq!(vm.run().unwrap(), Outcome::Quit);
    assert!(quitter.join().unwrap(), "the guest ran");
    assert!(vm.handle().stats().is_none(), "nobody answers after the end");
}

#[test]
fn nonsense_on_every_port_is_survived() {
    // From a port on, for every port: writes and reads of 1, 2 and 4 bytes of a changing value. Some ports end the run, so
    // the next run starts behind them.
    for start in [0u32, 0x65, 0x93, 0xf8, 0x605, 0xcfa, 0xc000] {
        #[rustfmt::skip]
        let sweep = [
            0xb9, 0x67, 0x45, 0x23, 0x01,       // mov ecx, 0x1234567
            // next:
            0x69, 0xc9, 0x0d, 0x66, 0x19, 0x00, // imul ecx, ecx, 0x19660d
            0x81, 0xc1, 0x5f, 0xf3, 0x6e, 0x3c, // add ecx, 0x3c6ef35f
            0x89, 0xc8, 0xc1, 0xc8, 0x10,       // mov eax, ecx; ror eax, 16
            0xee, 0x66, 0xef, 0xef,             // out dx, al; out dx, ax; out dx, eax
            0xec, 0x66, 0xed, 0xed,             // in al, dx; in ax, dx; in eax, dx
            0xff, 0xc2,                         // inc edx
            0x81, 0xfa, 0x00, 0x00, 0x01, 0x00, // cmp edx, 0x10000
            0x72, 0xdd,                         // jb next
        ];
        let mut code = vec![0xba]; // mov edx, start
        code.extend(start.to_le_bytes());
        code.extend(then(&[&sweep, &out(0xf4, 4, 0x77), &SPIN]));
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let mut c = config(&code);
        c.disks = vec![vmm::DiskConfig::open(&vmm::ImageOptions::new(disk.path())).unwrap()];
        c.save_at_marker = true;
        c.isa_debug_exit = true;
        c.no_reboot = true;
        let outcome = run(c);
        assert!(
            matches!(outcome, Outcome::PoweredOff | Outcome::Reset | Outcome::DebugExit(_)),
            "{start:#x}: {outcome:?}"
        );
        assert!(start < 0xcfa || outcome == Outcome::DebugExit(0x77), "{start:#x}: {outcome:?}");
    }
}

/// Counts up in a loop, showing progress on COM1 every 65536 rounds, for ever.
fn counter() -> Vec<u8> {
    #[rustfmt::skip]
    let code = [
        0x31, 0xdb,                         // xor ebx, ebx
        // next:
        0xff, 0xc3,                         // inc ebx
        0x89, 0x1d, 0x00, 0x00, 0x20, 0x00, // mov [0x200000], ebx
        0x66, 0x85, 0xdb,                   // test bx, bx
        0x75, 0xf3,                         // jne next
        0x89, 0xd8, 0xc1, 0xe8, 0x10,       // mov eax, ebx; shr eax, 16
        0x04, 0x60,                         // add al, 0x60
        0x66, 0xba, 0xf8, 0x03, 0xee,       // mov dx, 0x3f8; out dx, al
        0x3c, b'z', 0x75, 0xe3,             // cmp al, 'z'; jne next
        0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, // power off
        0xeb, 0xfe,
    ];
    code.to_vec()
}

#[test]
fn snapshot_taken_on_the_run_goes_on_in_another_machine() {
    let output = Capture::default();
    let mut vm = Vm::new(VmConfig { serial: output.sink(), ..config(&counter()) }).unwrap();
    let handle = vm.handle();
    let saver = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        let snapshot = handle.save().unwrap();
        handle.quit();
        snapshot
    });
    let first = vm.run().unwrap();
    let snapshot = saver.join().unwrap();
    drop(vm);
    let bytes = snapshot.to_vec();
    let again = Snapshot::from_slice(&bytes).unwrap();
    let rest = Capture::default();
    let mut vm = Vm::restore(VmConfig { serial: rest.sink(), ..config(&counter()) }, &again).unwrap();
    assert_eq!(vm.run().unwrap(), Outcome::PoweredOff);
    assert_eq!(first, Outcome::Quit);
    // What came between the snapshot and the quit came twice.
    assert!(rest.text().ends_with("xyz"), "{}", rest.text());
    assert!("abcdefghijklmnopqrstuvwxyz".ends_with(&rest.text()));
    let all: Vec<u8> = (b'a'..=b'z').collect();
    assert!(output.text().len() + rest.text().len() >= all.len());
}

#[test]
fn snapshot_for_another_machine_is_refused() {
    let snapshot = Vm::new(config(&SPIN)).unwrap().save().unwrap();
    let other = VmConfig { memory_bytes: 16 << 20, ..config(&SPIN) };
    assert!(matches!(Vm::restore(other, &snapshot), Err(VmError::Snapshot(_))));
    let other = VmConfig { cpus: 2, ..config(&SPIN) };
    assert!(matches!(Vm::restore(other, &snapshot), Err(VmError::Snapshot(_))));
}

#[test]
fn save_marker_saves_restores_and_continues() {
    // Writes 'a', the marker, 'b', then what stands in EBX and in memory, then powers off.
    let code = then(&[
        &[0xbb, b'c', 0, 0, 0, 0xc6, 0x05, 0, 0, 0x20, 0, b'd'], // mov ebx, 'c'; mov byte [0x200000], 'd'
        &out(0x3f8, 1, u32::from(b'a')),
        &out(0xf5, 1, vmm::SAVE_MARKER),
        &out(0x3f8, 1, u32::from(b'b')),
        &[0x88, 0xd8, 0xee, 0xa0, 0, 0, 0x20, 0, 0xee], // mov al, bl; out; mov al, [0x200000]; out
        &out(0x604, 2, 0x2000),
        &SPIN,
    ]);
    for clock in [ClockMode::Host, ClockMode::Icount] {
        let output = Capture::default();
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let mut c = VmConfig { serial: output.sink(), clock, save_at_marker: true, ..config(&code) };
        c.disks = vec![vmm::DiskConfig::open(&vmm::ImageOptions::new(disk.path())).unwrap()];
        let mut vm = Vm::new(c).unwrap();
        assert_eq!(vm.run().unwrap(), Outcome::PoweredOff);
        assert_eq!(output.text(), "abcd");
        assert_eq!(vm.stats().restores, 1);
    }
}

#[test]
fn trace_has_a_line_per_access() {
    let trace = Capture::default();
    let code = then(&[&out(0x80, 1, 0x55), &[0xa1, 0, 0, 0xc0, 0xfe], &out(0x604, 2, 0x2000), &SPIN]);
    let mut vm = Vm::new(VmConfig { trace: trace.sink(), ..config(&code) }).unwrap();
    assert_eq!(vm.run().unwrap(), Outcome::PoweredOff);
    let text = trace.text();
    assert!(text.contains("cpu0 out 0x80 1 0x55\n") && text.contains("cpu0 read 0xfec00000 4 0x"), "{text}");
}

#[test]
fn bad_configurations_are_errors() {
    let error = |c: VmConfig| Vm::new(c).err().unwrap().to_string();
    assert!(error(VmConfig { cpus: 0, ..config(&SPIN) }).contains("1 to 16"));
    assert!(error(VmConfig { cpus: 1000, ..config(&SPIN) }).contains("1 to 16"));
    assert!(error(VmConfig { cpus: 2, clock: ClockMode::Icount, ..config(&SPIN) }).contains("icount"));
    assert!(error(VmConfig { memory_bytes: 12345, ..config(&SPIN) }).contains("4096"));
    assert!(error(VmConfig { memory_bytes: 4096, ..config(&SPIN) }).contains("too small"));
    assert!(error(VmConfig { cpu: "nonsense".to_owned(), ..config(&SPIN) }).contains("nonsense"));
    assert!(error(VmConfig::new(BootSource::default())).contains("empty"));
    let mut c = config(&SPIN);
    c.source.protocol = Some(Protocol::Linux64);
    assert!(error(c).contains("multiboot"));
}
