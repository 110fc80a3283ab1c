//! A full host disk in the middle of a guest's writes: the guest sees an I/O error, and can write when there is room again.
//!
//! The disk's home is a small file system in memory, in a namespace of the machine's own; where the host allows none, that is
//! said and the test left out.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use machine_tests::qcow2::empty_qcow2;
use machine_tests::{Machine, text, trellis};

const PATIENCE: Duration = Duration::from_secs(240);
/// The guest's disk: more than there is room for.
const DISK_BYTES: u64 = 64 << 20;

/// Writes 16 MiB until it works, and reads them back.
const GUEST: &str = "head -c 16777216 /dev/urandom > /tmp/r; \
    dd if=/tmp/r of=/dev/vda bs=1M conv=fsync 2> /tmp/e && echo NO-ERROR; echo HOST-FULL; \
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
    dd if=/tmp/r of=/dev/vda bs=1M conv=fsync 2> /tmp/e && echo WROTE-ALL && break; sleep 1; done; \
    echo 3 > /proc/sys/vm/drop_caches; head -c 16777216 /dev/vda | cmp - /tmp/r && echo SAME";

/// Whether a file system can be mounted in a namespace.
fn may_mount(directory: &Path) -> bool {
    let script = format!("mount -t tmpfs -o size=1m none {}", text(directory));
    Command::new("unshare").args(["-rm", "sh", "-c", &script]).output().is_ok_and(|o| o.status.success())
}

fn fill_and_go_on(disk: &str) {
    let directory = tempfile::tempdir().expect("a directory");
    let (home, room) = (directory.path().join("home"), directory.path().join("room"));
    std::fs::create_dir(&home).expect("a directory");
    if !may_mount(&home) {
        println!("left out: this host lets nobody mount a file system in a namespace (unshare -rm)");
        return;
    }
    let empty = directory.path().join("empty");
    std::fs::write(&empty, if disk.ends_with("qcow2") { empty_qcow2(DISK_BYTES) } else { Vec::new() })
        .expect("a file");
    let size =
        if disk.ends_with("qcow2") { String::new() } else { format!("truncate -s {DISK_BYTES} {disk};") };
    let script = format!(
        "mount -t tmpfs -o size=26m none {home} || exit; cd {home}; cp {empty} {disk}; {size} \
         head -c 18874368 /dev/zero > ballast; \
         (while [ ! -e {room} ]; do sleep 0.2; done; rm ballast) & \
         exec {trellis} boot debian-cloud-amd64 --engine bt --disk {disk} \
         --append 'console=ttyS0 quiet trellis.run=\"{GUEST}\"' < /dev/null",
        home = text(&home),
        room = text(&room),
        empty = text(&empty),
        trellis = text(&trellis()),
    );
    let mut machine = Machine::start_program(Path::new("unshare"), &["-rm", "sh", "-c", &script]);
    machine.expect("HOST-FULL", PATIENCE);
    assert!(!machine.text().contains("NO-ERROR"), "{}", machine.text());
    std::fs::write(&room, b"").expect("a file");
    machine.expect("WROTE-ALL", PATIENCE);
    machine.expect("SAME", PATIENCE);
    let ended = machine.finish(PATIENCE);
    assert_eq!(ended.status, Some(0), "{}{}", ended.output, ended.errors);
}

#[test]
fn raw_disk_goes_on_when_there_is_room_again() {
    fill_and_go_on("disk.img");
}

#[test]
fn qcow2_disk_goes_on_when_there_is_room_again() {
    fill_and_go_on("disk.qcow2");
}
