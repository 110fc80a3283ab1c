//! Adaptation per site, seen by its counters: small guests whose instructions are guilty, and become innocent again.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;
mod devices;

use std::sync::Arc;

use devices::Devices;
use engine::{CpuIo, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::CpuState;

const START: u64 = 0x10000;
/// No memory is there.
const DEVICE: u64 = 0x3000_0000;
const RAM: u64 = 0x40_0000;
/// Callouts that end a guest.
const HLT: u64 = 1;

struct Guest {
    vcpu: BtVcpu,
    mem: Arc<GuestMemory>,
    io: Arc<Devices>,
}

impl Guest {
    fn new(code: &[u8], knobs: &str) -> Self {
        let mem = GuestMemory::new(16 << 20).unwrap();
        mem.write(Gpa(START), code).unwrap();
        let state = common::long_mode(&mem, START, 0x20000);
        let io = Arc::new(Devices::default());
        let parts = devices::parts(&mem, &io);
        let mut vcpu = BtVcpu::with_knobs(parts, Knobs::parse(&format!("warm=0,{knobs}"))).unwrap();
        vcpu.restore(&state);
        Self { vcpu, mem, io }
    }

    /// Runs to HLT from the start with RDI and RCX given.
    fn run(&mut self, rdi: u64, rcx: u64) -> CpuState {
        let mut state = common::long_mode(&self.mem, START, 0x20000);
        (state.gpr[7], state.gpr[1]) = (rdi, rcx);
        self.vcpu.restore(&state);
        assert_eq!(self.vcpu.run(u64::MAX), VcpuExit::Halted);
        self.vcpu.save()
    }

    fn rows(&self, name: &str, row: &str) -> u64 {
        let report = self.vcpu.report();
        let breakdown = report.breakdowns.iter().find(|b| b.name == name).unwrap();
        breakdown.rows.get(row).copied().unwrap_or(0)
    }

    fn adapted(&self, cause: &str) -> u64 {
        self.rows("adaptations by cause", cause)
    }

    fn visits(&self, cause: &str) -> u64 {
        self.rows("visits to the slow path", cause)
    }
}

/// l: mov [rdi], ecx; dec ecx; jne l; hlt
const STORES: &[u8] = &[0x89, 0x0f, 0xff, 0xc9, 0x75, 0xfa, 0xf4];

#[test]
fn device_access_becomes_a_direct_call() {
    let mut g = Guest::new(STORES, "adapt=10");
    g.run(DEVICE, 1000);
    assert_eq!((g.adapted("device"), g.visits("device")), (1, 10));
    assert_eq!(g.rows("visits by adapted sites", "device"), 990);
    let expected: Vec<_> = (1..=1000u32).rev().map(|n| (DEVICE, n.to_le_bytes().to_vec())).collect();
    assert_eq!(*g.io.writes.lock().unwrap(), expected);
    assert_eq!(g.vcpu.report().get("callouts"), 1000 + HLT);
    assert_eq!(g.rows("returns to innocence", "device"), 0);
}

#[test]
fn without_adaptation_every_visit_takes_the_slow_path() {
    let mut g = Guest::new(STORES, "adapt=off");
    g.run(DEVICE, 1000);
    assert_eq!((g.adapted("device"), g.visits("device")), (0, 1000));
    assert_eq!(g.io.writes.lock().unwrap().len(), 1000);
    assert_eq!(g.vcpu.report().get("sites watched"), 0);
}

/// Stores to where RDI points, and to RAM when ECX has come down to 2000.
const TURNING: &[u8] = &[
    0xbb, 0, 0, 0x40, 0, // mov ebx, 0x400000
    0xba, 0xd0, 7, 0, 0, // mov edx, 2000
    0x89, 0x0f, // l: mov [rdi], ecx
    0x39, 0xd1, // cmp ecx, edx
    0x48, 0x0f, 0x44, 0xfb, // cmove rdi, rbx
    0xff, 0xc9, // dec ecx
    0x75, 0xf4, // jne l
    0xf4,
];

#[test]
fn direct_call_goes_back_when_the_address_becomes_ram() {
    let mut g = Guest::new(TURNING, "adapt=10");
    g.run(DEVICE, 4000);
    assert_eq!((g.adapted("device"), g.rows("returns to innocence", "device")), (1, 1));
    // Ten visits, direct calls up to the turn, and then as long as eight samples of sixteen last.
    let direct = g.rows("visits by adapted sites", "device");
    assert!((1991 + 112..=1991 + 144).contains(&direct), "{direct}");
    let callouts = g.vcpu.report().get("callouts");
    assert!(callouts <= 2001 + 160, "{callouts}");
    let mut last = [0; 4];
    g.mem.read(Gpa(RAM), &mut last).unwrap();
    assert_eq!(u32::from_le_bytes(last), 1);
    assert_eq!(g.io.writes.lock().unwrap().len(), 2001);
}

#[test]
fn other_fragments_with_the_instruction_get_the_hint() {
    // Two ways to the same store: from the start, and over a jump to the middle of the unit.
    let code = &[
        0x90, // nop
        0x89, 0x0f, // m: mov [rdi], ecx
        0xff, 0xc9, // dec ecx
        0x74, 0x09, // je out
        0xf6, 0xc1, 0x01, // test cl, 1
        0x74, 0xf4, // je start
        0xeb, 0xf3, // jmp m
        0x90, 0x90, 0xf4,
    ];
    let mut g = Guest::new(code, "adapt=10");
    g.run(DEVICE, 1000);
    assert_eq!(g.adapted("device"), 1);
    // One fragment's ten visits; the other's one, for the first that comes after the hint.
    assert!(g.visits("device") <= 12, "{}", g.visits("device"));
    assert_eq!(g.io.writes.lock().unwrap().len(), 1000);
}

/// Counts at [rdi].
const CROSSING: &[u8] = &[
    0x48, 0x8b, 0x1f, // l: mov rbx, [rdi]
    0x48, 0xff, 0xc3, // inc rbx
    0x48, 0x89, 0x1f, // mov [rdi], rbx
    0xff, 0xc9, // dec ecx
    0x75, 0xf3, // jne l
    0xf4,
];

#[test]
fn crossing_accesses_work_on_both_pages_without_rust() {
    for (at, size) in [(RAM + 0xffd, 8), (RAM + 0x1ff9, 8), (RAM + 0xfff, 8)] {
        let mut g = Guest::new(CROSSING, "adapt=1");
        g.mem.write(Gpa(at), &u64::MAX.to_le_bytes()).unwrap();
        g.mem.write(Gpa(at - 8), &[0x5a; 8]).unwrap();
        g.mem.write(Gpa(at + size), &[0xa5; 8]).unwrap();
        g.run(at, 3000);
        let mut bytes = [0; 24];
        g.mem.read(Gpa(at - 8), &mut bytes).unwrap();
        assert_eq!(bytes[..8], [0x5a; 8]);
        assert_eq!(u64::from_le_bytes(bytes[8..16].try_into().unwrap()), 2999);
        assert_eq!(bytes[16..], [0xa5; 8]);
        assert!(g.adapted("page crossing") >= 2);
        let together = g.rows("visits by adapted sites", "page crossing");
        assert!(together > 5900, "{together}");
        assert!(g.vcpu.report().get("callouts") < 50, "{}", g.vcpu.report().get("callouts"));
    }
}

#[test]
fn group_that_crosses_is_disbanded() {
    let mut g = Guest::new(CROSSING, "adapt=1");
    g.run(RAM + 0xffc, 3000);
    assert_eq!(g.adapted("group"), 1);
    let mut none = Guest::new(CROSSING, "adapt=off");
    none.run(RAM + 0xffc, 3000);
    assert_eq!((none.adapted("group"), none.adapted("page crossing")), (0, 0));
    assert!(none.vcpu.report().get("callouts") > 5900);
}

#[test]
fn crossing_into_a_device_and_into_nothing_is_right() {
    // The last page of RAM, then a hole.
    let end = 16 << 20;
    for knobs in ["adapt=1", "adapt=off", "adapt=all"] {
        let mut g = Guest::new(CROSSING, knobs);
        g.run(end - 3, 50);
        let writes = g.io.writes.lock().unwrap();
        assert_eq!(writes.len(), 50, "{knobs}");
        assert!(writes.iter().all(|(at, bytes)| *at == end && bytes.len() == 5));
    }
}

#[test]
fn vector_and_stack_accesses_cross() {
    let code = &[
        0xf3, 0x0f, 0x6f, 0x07, // l: movdqu xmm0, [rdi]
        0xf3, 0x0f, 0x7f, 0x47, 0x20, // movdqu [rdi+32], xmm0
        0x48, 0x89, 0xfc, // mov rsp, rdi
        0x51, // push rcx
        0x5b, // pop rbx
        0xff, 0xc9, // dec ecx
        0x75, 0xee, // jne l
        0xf4,
    ];
    for at in [RAM + 0xff5, RAM + 0x1000 - 0x25, RAM + 0x1004] {
        let mut results = Vec::new();
        for knobs in
            ["adapt=1", "adapt=off", "adapt=1,unit=1", "adapt=1,chain=off", "adapt=1,tlb=off", "adapt=all"]
        {
            let mut g = Guest::new(code, knobs);
            let pattern: Vec<u8> = (0..96).collect();
            g.mem.write(Gpa(at - 16), &pattern).unwrap();
            let state = g.run(at, 200);
            let mut bytes = [0; 96];
            g.mem.read(Gpa(at - 16), &mut bytes).unwrap();
            results.push((bytes.to_vec(), state.gpr[3], state.gpr[4]));
        }
        assert!(results.windows(2).all(|w| w[0] == w[1]), "{at:#x}");
        assert_eq!(results[0].1, 1);
    }
}

#[test]
fn writes_beside_code_pass_and_need_no_other_form() {
    // The loop stores behind itself in its own page, then elsewhere.
    for knobs in ["adapt=10", "adapt=1", "adapt=all"] {
        let mut g = Guest::new(TURNING, knobs);
        g.run(START + 0x800, 4000);
        assert_eq!(g.adapted("code") + g.adapted("beside code"), 0, "{knobs}");
        assert!(g.visits("beside code") < 100, "{knobs}: {}", g.visits("beside code"));
        let mut last = [0; 4];
        g.mem.read(Gpa(START + 0x800), &mut last).unwrap();
        assert_eq!(u32::from_le_bytes(last), 2000, "{knobs}");
    }
}

#[test]
fn sites_that_change_their_minds_cost_ever_less() {
    // Turns over and over: device for 300 stores, RAM for 300.
    let code = &[
        0x89, 0x0f, // l: mov [rdi], ecx
        0xff, 0xce, // dec esi
        0x75, 0x08, // jne n
        0x48, 0x87, 0xfb, // xchg rbx, rdi
        0xbe, 0x2c, 1, 0, 0, // mov esi, 300
        0xff, 0xc9, // n: dec ecx
        0x75, 0xee, // jne l
        0xf4,
    ];
    let mut g = Guest::new(code, "adapt=2");
    let mut state = common::long_mode(&g.mem, START, 0x20000);
    (state.gpr[7], state.gpr[3], state.gpr[6], state.gpr[1]) = (DEVICE, RAM, 300, 200_000);
    g.vcpu.restore(&state);
    assert_eq!(g.vcpu.run(u64::MAX), VcpuExit::Halted);
    assert_eq!(g.io.writes.lock().unwrap().len(), 100_100);
    // 333 turns, but the threshold doubles with every return.
    let adaptations = g.adapted("device");
    assert!((2..=26).contains(&adaptations), "{adaptations}");
    assert!(g.vcpu.report().get("fragments made") < 100);
}

#[test]
fn memory_is_bounded_under_ever_new_guilty_sites() {
    // A page of stores to a device, each an instruction of its own, on many pages; each runs once with adapt=1.
    let mut page = Vec::new();
    while page.len() < 4090 {
        page.extend_from_slice(&[0x88, 0x0f]); // mov [rdi], cl
    }
    page.extend_from_slice(&[0x90; 6]);
    let mut g = Guest::new(&[], "adapt=1");
    let pages = 8;
    for n in 0..pages {
        g.mem.write(Gpa(START + 0x1000 * n), &page).unwrap();
    }
    g.mem.write(Gpa(START + 0x1000 * pages), &[0xf4]).unwrap();
    g.run(DEVICE, 1);
    assert_eq!(g.visits("device") + g.rows("visits by adapted sites", "device"), 2045 * pages);
    assert!(g.adapted("device") > 10_000);
    let watched = g.vcpu.report().get("sites watched");
    assert!(watched > 0 && watched <= 2048, "{watched}");
}

/// Reads the counter until it goes back, or ECX is 0.
const CLOCK: &[u8] = &[
    0x0f, 0x31, // l: rdtsc
    0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
    0x48, 0x8d, 0x34, 0x10, // lea rsi, [rax+rdx]
    0x48, 0x39, 0xde, // cmp rsi, rbx
    0x48, 0x89, 0xf3, // mov rbx, rsi
    0x72, 0x04, // jb out
    0xff, 0xc9, // dec ecx
    0x75, 0xea, // jne l
    0xf4,
];

#[test]
fn time_stamp_is_the_same_by_every_way() {
    for (knobs, callouts) in [("rdtsc=tc", 0), ("rdtsc=callout", 300), ("rdtsc=trap", 300)] {
        let mut g = Guest::new(CLOCK, knobs);
        let before = g.io.tsc();
        let state = g.run(0, 300);
        assert_eq!(state.gpr[1], 0, "{knobs}: time goes forward");
        assert!(state.gpr[3] > before && state.gpr[3] < g.io.tsc(), "{knobs}");
        assert_eq!(g.vcpu.report().get("callouts"), callouts + HLT, "{knobs}");
    }
}
