//! The same guest on the interpreter and on the translator.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "each test file uses a part"
)]

#[path = "../../../x86_interp/tests/common/mod.rs"]
pub mod common;

use std::sync::Arc;

use engine::{CpuIo, Report, Signals, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::CpuState;
use x86::cpuid::CpuModel;
use x86_interp::{Interp, Parts};

pub const START: u64 = 0x10000;
pub const STACK: u64 = 0x20000;
pub const MEMORY: u64 = 5 << 20;

/// Assembles guest code.
macro_rules! guest_code {
    ($name:ident, $start:literal, $end:literal, $($line:literal),* $(,)?) => {
        global_asm!(
            concat!(".globl ", $start, "\n", $start, ":"),
            $($line,)*
            concat!(".globl ", $end, "\n", $end, ":")
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static FIRST: u8;
                #[link_name = $end]
                static BEHIND: u8;
            }
            // SAFETY: both name places of the code just above, in this order.
            unsafe {
                let len = (&raw const BEHIND).offset_from(&raw const FIRST);
                std::slice::from_raw_parts(&raw const FIRST, usize::try_from(len).unwrap())
            }
        }
    };
}

/// What became of a guest.
pub struct End {
    pub exit: VcpuExit,
    pub state: CpuState,
    pub memory: Vec<u8>,
    pub report: Option<Report>,
}

fn parts(mem: &Arc<GuestMemory>, io: Arc<dyn CpuIo>) -> Parts {
    Parts {
        index: 0,
        vcpus: 1,
        mem: Arc::clone(mem),
        io,
        signals: Arc::new(Signals::default()),
        model: Arc::new(CpuModel::parse("max").unwrap()),
    }
}

/// Runs the same guest on the interpreter, and on the translator under some knobs.
pub fn run_both(lay: &dyn Fn(&GuestMemory) -> CpuState, knobs: &str) -> [End; 2] {
    let devices = || Arc::new(common::NoDevices::default()) as Arc<dyn CpuIo>;
    run_both_with(lay, knobs, [devices(), devices()])
}

/// The same with devices for each.
pub fn run_both_with(
    lay: &dyn Fn(&GuestMemory) -> CpuState,
    knobs: &str,
    devices: [Arc<dyn CpuIo>; 2],
) -> [End; 2] {
    let [first, second] = devices;
    let run = |translated: bool, io: Arc<dyn CpuIo>| {
        let mem = GuestMemory::new(MEMORY).unwrap();
        let state = lay(&mem);
        let knobs = Knobs::parse(&format!("warm=0,{knobs}"));
        let mut vcpu: Box<dyn Vcpu> = if translated {
            Box::new(BtVcpu::with_knobs(parts(&mem, io), knobs).unwrap())
        } else {
            Box::new(Interp::new(parts(&mem, io)))
        };
        vcpu.restore(&state);
        let exit = vcpu.run(u64::MAX);
        let mut memory = vec![0; MEMORY as usize];
        // Below it there is a hole.
        mem.read(Gpa(0x10_0000), &mut memory[0x10_0000..]).unwrap();
        End { exit, state: vcpu.save(), memory, report: translated.then(|| vcpu.report()) }
    };
    [run(false, first), run(true, second)]
}

pub fn done_in_cache(end: &End, what: &str) -> u64 {
    end.report.as_ref().unwrap().get(what)
}

pub fn assert_same_registers(a: &End, b: &End, what: &str) {
    assert_eq!(a.exit, b.exit, "{what}");
    assert_eq!(
        (a.state.gpr, a.state.rip, a.state.rflags),
        (b.state.gpr, b.state.rip, b.state.rflags),
        "{what}"
    );
    assert_eq!(a.state.seg, b.state.seg, "{what}");
    assert_eq!((a.state.cr3, a.state.cr4), (b.state.cr3, b.state.cr4), "{what}");
}
