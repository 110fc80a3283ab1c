//! What an instruction costs in its different forms, side by side: RDTSC by trap, by callout and in the translation cache; accesses that take
//! the slow path, innocent and adapted; what kernels and the loader of programs do often, as itself and (`helpers=off`) by the interpreter.
//!
//! `cargo bench -p engine_bt --bench forms`. Cycles of the host's counter for one instruction: a loop of ten less a loop of none, the
//! median and the least of some rounds in which all take turns.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;
#[path = "../tests/devices/mod.rs"]
mod devices;

use std::sync::Arc;

use devices::Devices;
use engine::{CpuIo, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};

const START: u64 = 0x10000;
const HIGH: u64 = 0xffff_8000_0000_0000;
const DEVICE: u64 = 0x3000_0000;
/// Four bytes before a page's end.
const CROSSING: u64 = 0x40_0ffc;
/// Instructions in a turn of the loop.
const EACH: u32 = 10;
const ROUNDS: usize = 9;

struct Case {
    name: &'static str,
    knobs: &'static str,
    /// The instruction, on [RDI].
    code: &'static [u8],
    rdi: u64,
    turns: u32,
}

const RDTSC: &[u8] = &[0x0f, 0x31];
const STORE: &[u8] = &[0x48, 0x89, 0x07];
const LOAD: &[u8] = &[0x48, 0x8b, 0x07];
/// Behind mov rsi, rdi, so that it shares no check with its neighbours.
const LONE_LOAD: &[u8] = &[0x48, 0x89, 0xfe, 0x48, 0x8b, 0x06];
const LONE_STORE: &[u8] = &[0x48, 0x89, 0xfe, 0x48, 0x89, 0x06];

/// mov esi, ecx; mov eax, 7; xor ecx, ecx; cpuid; mov ecx, esi.
const CPUID: &[u8] = &[0x89, 0xce, 0xb8, 7, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0x89, 0xf1];
/// The same behind paddd xmm0, xmm0.
const VECTOR_CPUID: &[u8] =
    &[0x66, 0x0f, 0xfe, 0xc0, 0x89, 0xce, 0xb8, 7, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0x89, 0xf1];
/// paddd xmm0, xmm0; mov eax, 0xee; xor edx, edx; xsavec [rdi]; xrstor [rdi].
const XSAVEC: &[u8] =
    &[0x66, 0x0f, 0xfe, 0xc0, 0xb8, 0xee, 0, 0, 0, 0x31, 0xd2, 0x0f, 0xc7, 0x27, 0x0f, 0xae, 0x2f];
const INVLPG: &[u8] = &[0x0f, 0x01, 0x3f];
/// mov esi, ecx; mov ecx, 0xc0000100; xor eax, eax; xor edx, edx; wrmsr; mov ecx, esi.
const WRMSR: &[u8] = &[0x89, 0xce, 0xb9, 0, 1, 0, 0xc0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, 0x89, 0xf1];
/// mov rax, cr3; bts rax, 63; mov cr3, rax; nothing is flushed.
const CR3: &[u8] = &[0x0f, 0x20, 0xd8, 0x48, 0x0f, 0xba, 0xe8, 0x3f, 0x0f, 0x22, 0xd8];
/// xor eax, eax; mov ds, eax.
const MOV_DS: &[u8] = &[0x31, 0xc0, 0x8e, 0xd8];
const CLTS: &[u8] = &[0x0f, 0x06];
/// lar eax, ax.
const LAR: &[u8] = &[0x0f, 0x02, 0xc0];

const CASES: [Case; 26] = [
    Case { name: "cpuid", knobs: "", code: CPUID, rdi: 0, turns: 20_000 },
    Case { name: "cpuid, callout", knobs: "helpers=off", code: CPUID, rdi: 0, turns: 20_000 },
    Case { name: "paddd, cpuid", knobs: "", code: VECTOR_CPUID, rdi: 0, turns: 20_000 },
    Case { name: "paddd, cpuid, callout", knobs: "helpers=off", code: VECTOR_CPUID, rdi: 0, turns: 20_000 },
    Case { name: "xsavec, xrstor", knobs: "", code: XSAVEC, rdi: 0x40_0e00, turns: 5_000 },
    Case {
        name: "xsavec, xrstor, callout",
        knobs: "helpers=off",
        code: XSAVEC,
        rdi: 0x40_0e00,
        turns: 5_000,
    },
    Case { name: "invlpg", knobs: "", code: INVLPG, rdi: 0x1_0040_0000, turns: 20_000 },
    Case { name: "invlpg, callout", knobs: "helpers=off", code: INVLPG, rdi: 0x1_0040_0000, turns: 20_000 },
    Case { name: "wrmsr FS_BASE", knobs: "", code: WRMSR, rdi: 0, turns: 20_000 },
    Case { name: "wrmsr FS_BASE, callout", knobs: "helpers=off", code: WRMSR, rdi: 0, turns: 20_000 },
    Case { name: "mov cr3", knobs: "", code: CR3, rdi: 0, turns: 5_000 },
    Case { name: "mov cr3, callout", knobs: "helpers=off", code: CR3, rdi: 0, turns: 5_000 },
    Case { name: "mov ds, null", knobs: "", code: MOV_DS, rdi: 0, turns: 20_000 },
    Case { name: "clts", knobs: "", code: CLTS, rdi: 0, turns: 20_000 },
    Case { name: "lar", knobs: "", code: LAR, rdi: 0, turns: 20_000 },
    Case { name: "rdtsc by trap", knobs: "rdtsc=trap", code: RDTSC, rdi: 0, turns: 2_000 },
    Case { name: "rdtsc by callout", knobs: "rdtsc=callout", code: RDTSC, rdi: 0, turns: 20_000 },
    Case { name: "rdtsc in the TC", knobs: "rdtsc=tc", code: RDTSC, rdi: 0, turns: 200_000 },
    Case { name: "device store, innocent", knobs: "adapt=off", code: STORE, rdi: DEVICE, turns: 5_000 },
    Case { name: "device store, direct", knobs: "", code: STORE, rdi: DEVICE, turns: 5_000 },
    Case {
        name: "crossing load, innocent",
        knobs: "adapt=off",
        code: LONE_LOAD,
        rdi: CROSSING,
        turns: 5_000,
    },
    Case { name: "crossing load, halves", knobs: "", code: LONE_LOAD, rdi: CROSSING, turns: 20_000 },
    Case {
        name: "crossing store, innocent",
        knobs: "adapt=off",
        code: LONE_STORE,
        rdi: CROSSING,
        turns: 5_000,
    },
    Case { name: "crossing store, halves", knobs: "", code: LONE_STORE, rdi: CROSSING, turns: 20_000 },
    Case { name: "crossing group, innocent", knobs: "adapt=off", code: LOAD, rdi: CROSSING, turns: 5_000 },
    Case { name: "crossing group, alone", knobs: "", code: LOAD, rdi: CROSSING, turns: 20_000 },
];

/// A loop of the instruction so many times.
fn program(instruction: &[u8], count: u32) -> Vec<u8> {
    let mut code = Vec::new();
    (0..count).for_each(|_| code.extend_from_slice(instruction));
    code.extend_from_slice(&[0xff, 0xc9, 0x74, 0x05]); // dec ecx; je +5
    code.push(0xe9);
    let back = -i32::try_from(code.len() + 4).unwrap();
    code.extend_from_slice(&back.to_le_bytes());
    code.push(0xf4);
    code
}

struct Guest {
    vcpu: BtVcpu,
    mem: Arc<GuestMemory>,
    io: Arc<Devices>,
    rdi: u64,
}

impl Guest {
    fn new(case: &Case, count: u32) -> Self {
        let mem = GuestMemory::new(16 << 20).unwrap();
        mem.write(Gpa(START), &program(case.code, count)).unwrap();
        let io = Arc::new(Devices::default());
        let parts = devices::parts(&mem, &io);
        let vcpu = BtVcpu::with_knobs(parts, Knobs::parse(&format!("warm=0,{}", case.knobs))).unwrap();
        Self { vcpu, mem, io, rdi: case.rdi }
    }

    /// Cycles that so many turns take.
    fn time(&mut self, turns: u32) -> f64 {
        let mut state = common::long_mode(&self.mem, START, 0x20000);
        // Everything once more in the upper half, by global pages, as kernels have themselves.
        self.mem.write(Gpa(0x1000 + 8 * 256), &0x4007u64.to_le_bytes()).unwrap();
        self.mem.write(Gpa(0x4000), &0x5007u64.to_le_bytes()).unwrap();
        for n in 0..512u64 {
            self.mem.write(Gpa(0x5000 + 8 * n), &(n << 21 | 0x1e7).to_le_bytes()).unwrap();
        }
        state.cr4 |= 1 << 17 | 1 << 7;
        state.rip += HIGH;
        state.gpr[4] += HIGH;
        (state.gpr[1], state.gpr[7]) = (u64::from(turns), self.rdi);
        self.vcpu.restore(&state);
        let before = self.io.tsc();
        assert_eq!(self.vcpu.run(u64::MAX), VcpuExit::Halted);
        let after = self.io.tsc();
        assert_eq!(self.vcpu.save().gpr[1], 0);
        self.io.writes.lock().unwrap().clear();
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        let cycles = (after - before) as f64;
        cycles
    }
}

fn main() {
    let mut guests: Vec<_> = CASES.iter().map(|case| (Guest::new(case, EACH), Guest::new(case, 0))).collect();
    let mut costs = vec![Vec::new(); CASES.len()];
    for _ in 0..ROUNDS {
        for ((guest, empty), (case, costs)) in guests.iter_mut().zip(CASES.iter().zip(&mut costs)) {
            let each = f64::from(EACH) * f64::from(case.turns);
            costs.push((guest.time(case.turns) - empty.time(case.turns)) / each);
        }
    }
    println!("{:<26} {:>10} {:>10}", "cycles for one", "median", "least");
    for (case, costs) in CASES.iter().zip(&mut costs) {
        costs.sort_by(f64::total_cmp);
        println!("{:<26} {:>10.0} {:>10.0}", case.name, costs[ROUNDS / 2], costs[0]);
    }
}
