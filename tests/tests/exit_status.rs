//! How runs end: each way has its status. The guests are a few instructions long.

use std::time::Duration;

use machine_tests::guest::{SPIN, STOP, multiboot, out, power_off};
use machine_tests::{Ended, run, text};

const PATIENCE: Duration = Duration::from_secs(60);

/// Boots `code` as a kernel of 16 MiB.
fn boot(code: &[u8], options: &[&str]) -> Ended {
    let directory = tempfile::tempdir().expect("a directory");
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, multiboot(code)).expect("a file");
    run(&[&["boot", "--memory", "16M", "--kernel", text(&kernel)], options].concat(), PATIENCE)
}

fn assert_status(code: &[u8], options: &[&str], status: i32) {
    let ended = boot(code, options);
    assert_eq!(ended.status, Some(status), "{options:?}: {}{}", ended.output, ended.errors);
}

fn followed_by_stop(mut code: Vec<u8>) -> Vec<u8> {
    code.extend_from_slice(STOP);
    code
}

#[test]
fn power_off_ends_with_0() {
    assert_status(&power_off(), &[], 0);
}

#[test]
fn every_kind_of_reset_ends_with_0_under_no_reboot() {
    for (port, value) in [(0xcf9, 0x06), (0x64, 0xfe), (0x92, 0x01)] {
        assert_status(&followed_by_stop(out(port, 1, value)), &["--no-reboot"], 0);
    }
}

#[test]
fn reset_without_no_reboot_starts_again() {
    // Prints a letter and resets itself, for ever.
    let code = [out(0x3f8, 1, u32::from(b'R')), out(0xcf9, 1, 0x06), STOP.to_vec()].concat();
    let ended = boot(&code, &["--timeout", "3"]);
    assert_eq!(ended.status, Some(124), "{}", ended.errors);
    assert!(ended.output.matches('R').count() >= 2, "{:?}", ended.output);
}

#[test]
fn debug_exit_ends_with_twice_the_value_plus_1() {
    for (value, status) in [(0, 1), (0x10, 33), (0x11, 35)] {
        assert_status(&followed_by_stop(out(0xf4, 4, value)), &["--isa-debug-exit"], status);
    }
    // Nobody asked for it: the guest halts for good.
    assert_status(&followed_by_stop(out(0xf4, 4, 0x10)), &["--timeout", "2"], 124);
}

#[test]
fn triple_fault_ends_with_3() {
    // lidt [esp] of zeros is not at hand without a stack: UD2 with the loader's empty IDT.
    assert_status(&[0x0f, 0x0b], &["--no-reboot"], 3);
}

#[test]
fn time_out_ends_with_124_while_the_guest_spins_or_sleeps() {
    for code in [SPIN, STOP] {
        let ended = boot(code, &["--timeout", "2"]);
        assert_eq!(ended.status, Some(124), "{}", ended.errors);
        assert!(ended.took < Duration::from_secs(10), "{:?}", ended.took);
    }
}

#[test]
fn usage_ends_with_2_and_failure_with_1() {
    assert_eq!(run(&["boot", "--memroy", "1G"], PATIENCE).status, Some(2));
    assert_eq!(run(&["boot", "--kernel", "/nonexistent"], PATIENCE).status, Some(1));
}

#[test]
fn files_that_are_no_kernel_end_with_1_and_one_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    let kernel = machine_tests::image_file("debian-cloud-amd64", "vmlinuz");
    let whole = std::fs::read(kernel).expect("the kernel can be read");
    let cases: &[&[u8]] = &[b"", b"\x7fELF", &[0; 4096], b"#!/bin/sh\n", &whole[..0x300], &whole[..1 << 20]];
    for content in cases {
        std::fs::write(&path, content).expect("a file");
        let ended = run(&["boot", "--kernel", text(&path), "--timeout", "20"], PATIENCE);
        let lines = ended.errors.lines().count();
        assert_eq!((ended.status, lines), (Some(1), 1), "{} bytes: {}", content.len(), ended.errors);
    }
}

#[test]
fn initrd_larger_than_memory_ends_with_1() {
    let directory = tempfile::tempdir().expect("a directory");
    let initrd = directory.path().join("initrd");
    std::fs::File::create(&initrd).and_then(|file| file.set_len(80 << 20)).expect("a file");
    let kernel = machine_tests::image_file("debian-cloud-amd64", "vmlinuz");
    let arguments = ["boot", "--memory", "64M", "--kernel", text(&kernel), "--initrd", text(&initrd)];
    let ended = run(&arguments, PATIENCE);
    assert_eq!((ended.status, ended.errors.lines().count()), (Some(1), 1), "{}", ended.errors);
}

#[test]
fn nonsense_to_every_port_is_survived() {
    // Ports at which nonsense rightly ends or restarts the machine: keyboard controller, fast reset, power management,
    // reset register.
    let ends = [0x64..=0x64u32, 0x92..=0x92, 0x600..=0x60f, 0xcf8..=0xcff];
    let mut code = Vec::new();
    for port in 0..=0xfffcu16 {
        let touched = u32::from(port)..=u32::from(port) + 3;
        if ends.iter().any(|range| touched.start() <= range.end() && range.start() <= touched.end()) {
            continue;
        }
        let nonsense = u32::from(port).wrapping_mul(0x9e37_79b9).rotate_left(7);
        for size in [4, 2, 1] {
            code.extend(out(port, size, nonsense.rotate_left(u32::from(size))));
        }
        code.extend([0xed, 0x66, 0xed, 0xec]); // in eax, dx; in ax, dx; in al, dx
    }
    let ended = boot(&[code, power_off()].concat(), &["--timeout", "50"]);
    assert_eq!(ended.status, Some(0), "{}", ended.errors);
}

#[test]
fn nonsense_to_device_memory_is_survived() {
    // Walks from 0xe0000000 to 4 GiB in steps of 0xd0c bytes, writing and reading 4 bytes; then powers off.
    let code: &[u8] = &[
        0xbf, 0x00, 0x00, 0x00, 0xe0, // mov edi, 0xe0000000
        0x69, 0xc7, 0xb9, 0x79, 0x37, 0x9e, // again: imul eax, edi, 0x9e3779b9
        0x89, 0x07, // mov [edi], eax
        0x8b, 0x0f, // mov ecx, [edi]
        0x81, 0xc7, 0x0c, 0x0d, 0x00, 0x00, // add edi, 0xd0c
        0x73, 0xee, // jnc again
    ];
    let ended = boot(&[code, &power_off()].concat(), &["--timeout", "50"]);
    assert_eq!(ended.status, Some(0), "{}", ended.errors);
}
