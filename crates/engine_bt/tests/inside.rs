//! Looking inside a running vCPU: what its report, its traces and its perf map say of a small guest.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;

use std::sync::{Arc, Mutex};

use engine::{CpuIo, Report, Signals, Vcpu, VcpuExit};
use engine_bt::perf_map::Profile;
use engine_bt::trace::{AddressRange, Levels, Trace};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::CpuState;
use x86::cpuid::CpuModel;
use x86_interp::Parts;

const START: u64 = 0x10000;
/// A loop that calls a function in the next page.
const LOOP: &[u8] = &[
    0xb9, 100, 0, 0, 0, // mov ecx, 100
    0x48, 0x01, 0xcb, // l: add rbx, rcx
    0xe8, 0xf3, 0x0f, 0, 0, // call f
    0xff, 0xc9, // dec ecx
    0x75, 0xf4, // jne l
    0xf4, // hlt
];
/// push rcx; xor eax, eax; push rbx; cpuid; pop rbx; pop rcx; ret
const FUNCTION: &[u8] = &[0x51, 0x31, 0xc0, 0x53, 0x0f, 0xa2, 0x5b, 0x59, 0xc3];

struct Guest {
    vcpu: BtVcpu,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Guest {
    fn new(levels: Levels, range: AddressRange, profile: Option<Profile>) -> Self {
        let mem = GuestMemory::new(16 << 20).unwrap();
        mem.write(Gpa(START), LOOP).unwrap();
        mem.write(Gpa(START + 0x1000), FUNCTION).unwrap();
        let state = common::long_mode(&mem, START, 0x20000);
        let parts = Parts {
            index: 0,
            vcpus: 1,
            mem,
            io: Arc::new(common::NoDevices::default()) as Arc<dyn CpuIo>,
            signals: Arc::new(Signals::default()),
            model: Arc::new(CpuModel::parse("max").unwrap()),
        };
        let mut vcpu =
            BtVcpu::with_knobs(parts, Knobs { warm: 0, helpers: false, ..Knobs::default() }).unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let write =
            Box::new(move |event: std::fmt::Arguments<'_>| kept.lock().unwrap().push(event.to_string()));
        vcpu.observe(Some(Trace { levels, range, write }), profile.map(|p| Arc::new(Mutex::new(p))));
        vcpu.restore(&state);
        Self { vcpu, lines }
    }

    fn run(&mut self) -> CpuState {
        assert_eq!(self.vcpu.run(u64::MAX), VcpuExit::Halted);
        let state = self.vcpu.save();
        assert_eq!((state.gpr[3], state.gpr[1]), (5050, 0));
        state
    }

    fn lines(&self, kind: &str) -> Vec<String> {
        self.lines.lock().unwrap().iter().filter(|line| line.starts_with(kind)).cloned().collect()
    }
}

fn levels(set: impl FnOnce(&mut Levels)) -> Levels {
    let mut levels = Levels::default();
    set(&mut levels);
    levels
}

fn rows(report: &Report, name: &str) -> std::collections::BTreeMap<String, u64> {
    report.breakdowns.iter().find(|b| b.name == name).unwrap().rows.clone()
}

#[test]
fn report_counts_what_the_translator_did() {
    let mut guest = Guest::new(Levels::default(), AddressRange::default(), None);
    guest.run();
    let report = guest.vcpu.report();
    assert!(report.interpreted_only);
    assert_eq!(rows(&report, "callouts by instruction").get("CPUID"), Some(&100));
    assert_eq!(report.get("callouts"), rows(&report, "callouts by instruction").values().sum::<u64>());
    assert_eq!(report.get("TC entries"), rows(&report, "leaves of the cache").values().sum::<u64>());
    let instructions = report.get("guest instructions translated");
    assert!((6..100).contains(&instructions), "{instructions}");
    assert!(report.get("host code made") > report.get("guest code translated"));
    assert_eq!(report.get("fragments made"), report.get("fragments in the TC"));
    assert!(report.get("code memory used") >= report.get("host code made"));
    assert!(report.get("TC hits") < 100, "the loop is linked, it does not come back for every turn");
    assert!(report.get("links made") > 0 && report.get("translation time") > 0);
    assert!(guest.lines("").is_empty(), "nothing is traced that was not asked for");
}

#[test]
fn fragments_exits_and_code_are_traced_within_the_range() {
    let all = |l: &mut Levels| (l.fragments, l.exits, l.code) = (true, true, true);
    let mut guest = Guest::new(levels(all), AddressRange::default(), None);
    guest.run();
    let made = guest.vcpu.report().get("fragments made");
    assert_eq!(guest.lines("fragment ").len() as u64, made);
    assert_eq!(guest.lines("code ").len() as u64, made);
    assert_eq!(guest.lines("exit ").len() as u64, guest.vcpu.report().get("TC entries"));
    assert!(
        guest
            .lines("fragment ")
            .iter()
            .any(|l| l.starts_with("fragment 0000000000011000-0000000000011009 supervisor"))
    );
    assert!(guest.lines("code ").iter().any(|l| l.contains("0000000000011004  cpuid")));

    let mut narrow = Guest::new(levels(all), AddressRange { start: 0x11000, last: 0x11fff }, None);
    narrow.run();
    let starts: Vec<String> = narrow.lines("fragment ").iter().map(|l| l[9..25].to_owned()).collect();
    assert!(!starts.is_empty() && starts.iter().all(|at| at.starts_with("0000000000011")), "{starts:?}");
}

#[test]
fn every_instruction_of_the_range_is_traced_once_with_what_it_changes() {
    let stepped = levels(|l| l.instructions = true);
    let whole = Guest::new(stepped, AddressRange::default(), None);
    let mut whole = whole;
    let traced = whole.run();
    let lines = whole.lines("instruction ");
    assert_eq!(lines.len(), 1 + 100 * (4 + 7) + 1);
    assert_eq!(lines[0], format!("instruction 0000000000010000 {:<40} rcx=0x64", "mov ecx, 0x64"));
    assert!(lines[2].contains("call") && lines[2].ends_with("rsp=0x1fff8 rip=0x11000"), "{}", lines[2]);
    assert_eq!(whole.vcpu.report().get("fragments made"), 0);

    // Only the function's CPUID: the rest of its page is interpreted, the loop is translated.
    let mut one = Guest::new(stepped, AddressRange { start: 0x11004, last: 0x11004 }, None);
    let state = one.run();
    let lines = one.lines("instruction ");
    assert_eq!(lines.len(), 100);
    assert!(lines.iter().all(|l| l.contains("0000000000011004 cpuid")));
    assert!(one.vcpu.report().get("fragments made") > 0);
    assert_eq!(state.gpr, traced.gpr);

    let mut plain = Guest::new(Levels::default(), AddressRange::default(), None);
    assert_eq!(plain.run().gpr, traced.gpr);
}

#[test]
fn perf_map_names_every_fragment_by_its_guest_address() {
    let mut guest =
        Guest::new(Levels::default(), AddressRange::default(), Some(Profile::open(true, None).unwrap()));
    guest.run();
    let path = format!("/tmp/perf-{}.map", std::process::id());
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count() as u64, guest.vcpu.report().get("fragments made"));
    let line = text.lines().find(|l| l.ends_with(" guest:k:11000")).unwrap();
    let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapping = maps.lines().find(|l| {
        let (start, end) = l.split(' ').next().unwrap().split_once('-').unwrap();
        (u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap()).contains(&address)
    });
    // perf takes a mapping for anonymous, and looks it up in the map, by this name.
    let mapping = mapping.unwrap();
    assert!(mapping.contains(" r-xs ") && mapping.contains("/dev/zero"), "{mapping}");
    // Code memory that is used anew takes the old lines with it.
    let state = guest.vcpu.save();
    guest.vcpu.restore(&state);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    std::fs::remove_file(&path).unwrap();
}
