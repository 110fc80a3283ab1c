//! Disks and shared directories measured with fio in a Debian guest, on this program and on QEMU's TCG in turn: the same kernel,
//! the same images, two processors. No test: it says what it finds, as a table for docs/performance.md.
//!
//! `cargo xtask disks` builds the guest and runs it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use machine_tests::qcow2::empty_qcow2;
use machine_tests::shell::Shell;
use machine_tests::{Machine, image_file, text};
use trellis::image::cpio::Archive;

const IMAGE: &str = "debian-rootfs-amd64";
const DISK_BYTES: u64 = 512 << 20;
const APPEND: &str = "console=ttyS0 root=LABEL=trellis-root";
const INIT: &[u8] = include_bytes!("../../crates/trellis/src/image/rootfs/init.sh");

/// What is measured: name, and fio's options.
const JOBS: &[(&str, &str)] = &[
    ("sequential write, 1 MiB, depth 4", "--rw=write --bs=1M --iodepth=4"),
    ("sequential read, 1 MiB, depth 4", "--rw=read --bs=1M --iodepth=4"),
    ("sequential write, 64 KiB, depth 1", "--rw=write --bs=64k --iodepth=1"),
    ("sequential read, 64 KiB, depth 1", "--rw=read --bs=64k --iodepth=1"),
    ("random read and write, 4 KiB, depth 1", "--rw=randrw --bs=4k --iodepth=1"),
    ("random read and write, 4 KiB, depth 16", "--rw=randrw --bs=4k --iodepth=16"),
    ("random read, 4 KiB, depth 16", "--rw=randread --bs=4k --iodepth=16"),
];
/// The one that reads back what it wrote, and compares.
const VERIFIED: (&str, &str) = (
    "random read and write with verify, 4 KiB, depth 8",
    "--rw=randrw --bs=4k --iodepth=8 --size=32M --verify=crc32c --verify_fatal=1",
);

/// The initramfs that mounts the root disk, for whoever takes one file.
fn initrd(directory: &Path) -> PathBuf {
    let mut bytes = std::fs::read(image_file(IMAGE, "initrd")).expect("it is there");
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::new();
    archive.file("init", 0o755, INIT);
    bytes.extend(archive.finish());
    let path = directory.join("initrd");
    std::fs::write(&path, bytes).expect("a file");
    path
}

/// KiB a second, read and written, of fio's terse output (version 3).
fn rate(terse: &str) -> u64 {
    let line =
        terse.lines().find(|line| line.starts_with("3;")).unwrap_or_else(|| panic!("fio says:\n{terse}"));
    let fields: Vec<&str> = line.trim().split(';').collect();
    assert_eq!(fields[4], "0", "fio found an error:\n{terse}");
    [6, 47].iter().filter_map(|&at| fields[at].parse::<u64>().ok()).sum()
}

/// Everything on `/dev/vdb`, in KiB a second.
fn measure(machine: Machine) -> BTreeMap<&'static str, u64> {
    let mut shell = Shell::login(machine);
    let common = "--name=x --filename=/dev/vdb --direct=1 --ioengine=libaio --group_reporting --output-format=terse --terse-version=3";
    // What is written first makes the image's clusters, which is not what is asked here.
    shell.must("dd if=/dev/zero of=/dev/vdb bs=1M count=400 oflag=direct 2>&1");
    let mut results = BTreeMap::new();
    for (name, options) in JOBS {
        let said = shell.must(&format!("fio {common} --time_based --runtime=6 --size=400M {options}"));
        results.insert(*name, rate(&said));
    }
    results.insert(VERIFIED.0, rate(&shell.must(&format!("fio {common} {}", VERIFIED.1))));
    shell.machine.send("poweroff\n");
    let _ended = shell.machine.finish(std::time::Duration::from_secs(120));
    results
}

fn ours(initrd: &Path, disk: &Path) -> Machine {
    let (kernel, root) = (image_file(IMAGE, "vmlinuz"), image_file(IMAGE, "disk.img"));
    let root = format!("{},snapshot=on", text(&root));
    let guest = ["--kernel", text(&kernel), "--initrd", text(initrd), "--append", APPEND];
    let machine =
        ["boot", "--engine", "bt", "--cpus", "2", "--memory", "1G", "--disk", &root, "--disk", text(disk)];
    Machine::start_on_terminal(&[&machine[..], &guest].concat())
}

fn qemu(initrd: &Path, disk: &Path, format: &str) -> Machine {
    let (kernel, root) = (image_file(IMAGE, "vmlinuz"), image_file(IMAGE, "disk.img"));
    let root = format!("if=none,id=a,snapshot=on,format=raw,file={}", text(&root));
    let disk = format!("if=none,id=b,format={format},file={}", text(disk));
    let machine = ["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "1G", "-nographic", "-nic", "none"];
    let guest = ["-kernel", text(&kernel), "-initrd", text(initrd), "-append", APPEND];
    let disks = [
        "-drive",
        &root,
        "-device",
        "virtio-blk-pci,drive=a",
        "-drive",
        &disk,
        "-device",
        "virtio-blk-pci,drive=b",
    ];
    Machine::start_program_on_terminal(
        Path::new("qemu-system-x86_64"),
        &[&machine[..], &guest, &disks].concat(),
    )
}

#[test]
#[ignore = "a measurement: cargo xtask disks"]
fn disks_beside_qemu() {
    let directory = tempfile::tempdir().expect("a directory");
    let initrd = initrd(directory.path());
    println!("| disk | job | MiB/s | TCG | ratio |\n|---|---|---|---|---|");
    for format in ["raw", "qcow2"] {
        let disk = directory.path().join(format!("disk.{format}"));
        if format == "raw" {
            std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).expect("a file");
        } else {
            std::fs::write(&disk, empty_qcow2(DISK_BYTES)).expect("a file");
        }
        let mine = measure(ours(&initrd, &disk));
        let other = measure(qemu(&initrd, &disk, format));
        for name in JOBS.iter().map(|(name, _)| *name).chain([VERIFIED.0]) {
            let (a, b) = (mine[name], other[name]);
            let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
            println!("| {format} | {name} | {} | {} | {:.1} |", mib(a), mib(b), a as f64 / b.max(1) as f64);
        }
    }
}
