//! Debian's cloud kernel: boots, sees its processors, keeps time, reads and writes disks, is typed at.

use std::time::{Duration, Instant};

use machine_tests::{Ended, Machine, image_file, run, text};

/// A boot takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(240);

const IMAGE: &str = "debian-cloud-amd64";

/// Runs shell commands in the guest; they may not contain double quotes.
fn run_in_guest(commands: &str, options: &[&str]) -> Ended {
    assert!(!commands.contains('"') && commands.len() < 1500, "does not fit a command line");
    let append = format!("console=ttyS0 quiet trellis.run=\"{commands}\"");
    run(&[&["boot", IMAGE, "--append", &append], options].concat(), PATIENCE)
}

fn assert_contains(ended: &Ended, parts: &[&str]) {
    assert_eq!(ended.status, Some(0), "{}{}", ended.output, ended.errors);
    for part in parts {
        assert!(ended.output.contains(part), "no {part:?} in:\n{}", ended.output);
    }
}

#[test]
fn minimal_init_is_reached_with_a_stable_clock_on_one_cpu() {
    let (kernel, initrd) = (image_file(IMAGE, "vmlinuz"), image_file(IMAGE, "initrd-min"));
    let (kernel, initrd) = (text(&kernel), text(&initrd));
    let ended = run(
        &["boot", "--kernel", kernel, "--initrd", initrd, "--append", "console=ttyS0", "--stats"],
        PATIENCE,
    );
    println!("end of the run after {:.1} s", ended.took.as_secs_f64());
    assert_contains(&ended, &["REACHED-INIT", "clocksource: Switched to clocksource"]);
    for bad in [
        "Unable to calibrate",
        "calibration failed",
        "TSC unstable",
        "Marking TSC",
        "BUG:",
        "WARNING:",
        "Call Trace",
    ] {
        assert!(!ended.output.contains(bad), "{bad:?} in:\n{}", ended.output);
    }
    for cause in ["port-write", "miss fill", "interrupt"] {
        assert!(ended.errors.contains(cause), "no {cause} in --stats:\n{}", ended.errors);
    }
}

#[test]
fn two_cpus_and_disks_work_and_the_end_of_input_does_not_end_the_guest() {
    let directory = tempfile::tempdir().expect("a directory");
    let (writable, fixed) = (directory.path().join("w.img"), directory.path().join("r.img"));
    let content: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(&fixed, &content).expect("a file");
    std::fs::File::create(&writable).and_then(|file| file.set_len(8 << 20)).expect("a file");
    let read_only = format!("{},ro", text(&fixed));
    let ended = run_in_guest(
        "echo cpus=$(nproc); echo online=$(cat /sys/devices/system/cpu/online); \
         echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource); \
         echo ro=$(cat /sys/block/vda/ro)$(cat /sys/block/vdb/ro); \
         dd if=/dev/vdb of=/dev/vda bs=64k seek=16 2>/dev/null; sync; \
         dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null || echo write-refused; \
         dd if=/dev/vda bs=64k skip=16 count=16 2>/dev/null | cmp - /dev/vdb && echo same; \
         ls /dev/hwrng && head -c 16 /dev/hwrng | wc -c",
        &["--cpus", "2", "--disk", text(&writable), "--disk", &read_only],
    );
    assert_contains(&ended, &["cpus=2", "online=0-1", "ro=01", "write-refused", "same"]);
    assert!(
        ended.output.contains("clock=tsc") || ended.output.contains("clock=kvm-clock"),
        "{}",
        ended.output
    );
    assert!(std::fs::read(&fixed).expect("the file is there") == content, "a read-only disk was written");
    let written = std::fs::read(&writable).expect("the file is there");
    assert!(written[1 << 20..2 << 20] == content, "what the guest wrote is not on the disk");
    assert!(written[..1 << 20].iter().all(|&byte| byte == 0), "the guest wrote elsewhere");
}

#[test]
fn disk_in_use_is_refused_to_a_second_machine() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.img");
    std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a file");
    let first = Machine::start(&["boot", IMAGE, "--disk", text(&path), "--timeout", "20"]);
    std::thread::sleep(Duration::from_secs(2));
    let second = run(&["boot", IMAGE, "--disk", text(&path), "--timeout", "20"], PATIENCE);
    drop(first);
    assert_eq!(second.status, Some(1), "{}", second.errors);
    assert!(second.errors.contains("in use") && second.errors.lines().count() == 1, "{}", second.errors);
}

#[test]
fn guest_time_keeps_to_host_time_under_load() {
    // The guest reads its clock and says so without starting a program, while another shell keeps a processor busy.
    let append = "console=ttyS0 quiet trellis.run=\"while :; do :; done & \
                  read a b < /proc/uptime; echo A=$a; sleep 30; read a b < /proc/uptime; echo B=$a; kill %1\"";
    let mut machine = Machine::start(&["boot", IMAGE, "--append", append]);
    let first = machine.expect("A=", PATIENCE);
    let second = machine.expect("B=", PATIENCE);
    let ended = machine.finish(PATIENCE);
    let guest = |mark: &str| -> f64 {
        let rest = ended.output.split(mark).nth(1).expect("it was there");
        rest.split_whitespace().next().and_then(|word| word.parse().ok()).expect("seconds")
    };
    let (guest, host) = (guest("B=") - guest("A="), (second - first).as_secs_f64());
    println!("guest {guest:.3} s, host {host:.3} s");
    assert!(guest >= 20.0, "{}", ended.output);
    // 0.1 % of the interval, and what cannot be read better: /proc/uptime counts hundredths, and the marks themselves
    // arrive some milliseconds late on a busy host.
    assert!((guest - host).abs() < host * 0.001 + 0.02, "guest {guest:.3} s, host {host:.3} s");
}

#[test]
fn shell_on_a_terminal_can_be_typed_at_and_powers_off() {
    let start = Instant::now();
    let mut machine = Machine::start_on_terminal(&["boot", IMAGE, "--memory", "256M"]);
    machine.expect("# ", PATIENCE);
    println!("prompt after {:.1} s", start.elapsed().as_secs_f64());
    machine.send("echo answer=$((6*7))\r");
    machine.expect("answer=42", PATIENCE);
    // Ctrl-C reaches the guest's program, not ours.
    machine.send("sleep 1000\r");
    std::thread::sleep(Duration::from_secs(2));
    machine.send("\x03");
    machine.send("stty size\r");
    machine.expect("25 100", PATIENCE);
    machine.send("poweroff -f\r");
    let ended = machine.finish(PATIENCE);
    assert_eq!(ended.status, Some(0), "{}", ended.output);
}

#[test]
fn escape_x_quits() {
    let mut machine = Machine::start_on_terminal(&["boot", IMAGE, "--memory", "256M"]);
    machine.expect("Linux version", PATIENCE);
    machine.send("\x01x");
    let ended = machine.finish(Duration::from_secs(20));
    assert_eq!(ended.status, Some(0), "{}", ended.output);
}

#[test]
#[ignore = "long: a kernel for all machines"]
fn generic_kernel_reaches_init() {
    assert_reaches_init("debian-generic-amd64");
}

#[test]
#[ignore = "long: a 32-bit kernel"]
fn kernel_686_pae_reaches_init() {
    assert_reaches_init("debian-686-pae-i386");
}

fn assert_reaches_init(image: &str) {
    let (kernel, initrd) = (image_file(image, "vmlinuz"), image_file(image, "initrd-min"));
    let arguments = [
        "boot",
        "--kernel",
        text(&kernel),
        "--initrd",
        text(&initrd),
        "--append",
        "console=ttyS0",
        "--cpus",
        "2",
    ];
    let ended = run(&arguments, Duration::from_secs(900));
    println!("end of the run after {:.1} s", ended.took.as_secs_f64());
    assert_contains(&ended, &["REACHED-INIT"]);
}

/// Boots to a shell that starts programs, on two processors, under each stress knob of the translator that a kernel can bear.
#[test]
#[ignore = "long: boots under stress knobs"]
fn programs_run_under_every_stress_knob() {
    const COMMANDS: &str =
        "for i in 1 2 3 4 5 6 7 8; do echo $i | cat | wc -c & done; wait; echo sum=$((6*7))";
    for knobs in [
        "warm=0",
        "warm=0,unit=1",
        "chain=off",
        "fp=off",
        "code=256K",
        "tlb=off",
        "tlb=one",
        "forget=1000",
        "again=2",
        "log=1",
        "context=off",
    ] {
        let append = format!("console=ttyS0 quiet trellis.run=\"{COMMANDS}\"");
        let arguments = ["boot", IMAGE, "--engine", "bt", "--cpus", "2", "--append", &append];
        let ended = Machine::start_stressed(&arguments, knobs).finish(Duration::from_secs(600));
        println!("{knobs}: {:.1} s", ended.took.as_secs_f64());
        assert_contains(&ended, &["sum=42"]);
        for bad in ["BUG:", "WARNING:", "Call Trace", "soft lockup"] {
            assert!(!ended.output.contains(bad), "{knobs}: {bad:?} in:\n{}", ended.output);
        }
    }
}
