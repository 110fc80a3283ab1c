//! A profile of a small guest: samples are where it spends its time, at the addresses of its instructions.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../../x86_interp/tests/common/mod.rs"]
mod common;

use std::sync::Arc;

use engine::{CpuIo, Signals, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86_interp::Parts;

const START: u64 = 0x10000;
/// mov ecx, 200000000; l: mov rax, [rsp - 8]; add rax, rcx; mov [rsp - 8], rax; dec ecx; jne l; hlt
const LOOP: &[u8] = &[
    0xb9, 0x00, 0xc2, 0xeb, 0x0b, 0x48, 0x8b, 0x44, 0x24, 0xf8, 0x48, 0x01, 0xc8, 0x48, 0x89, 0x44, 0x24,
    0xf8, 0xff, 0xc9, 0x75, 0xef, 0xf4,
];

#[test]
fn samples_are_at_the_loop_that_takes_the_time() {
    let mem = GuestMemory::new(16 << 20).unwrap();
    mem.write(Gpa(START), LOOP).unwrap();
    let state = common::long_mode(&mem, START, 0x20000);
    let parts = Parts {
        index: 0,
        vcpus: 1,
        mem,
        io: Arc::new(common::NoDevices::default()) as Arc<dyn CpuIo>,
        signals: Arc::new(Signals::default()),
        model: Arc::new(CpuModel::parse("max").unwrap()),
    };
    // One CPU of a loaded host may be too little for so many samples in one go; the loop runs until there are enough.
    let mut vcpu = BtVcpu::with_knobs(parts, Knobs { warm: 0, ..Knobs::default() }).unwrap();
    assert!(vcpu.profile(2000));
    let mut profile = None;
    for _ in 0..20 {
        vcpu.restore(&state);
        assert_eq!(vcpu.run(u64::MAX), VcpuExit::Halted);
        assert_eq!(vcpu.save().gpr[1], 0, "samples change nothing");
        profile = vcpu.report().profile;
        if profile.as_ref().is_some_and(|p| p.samples >= 100) {
            break;
        }
    }
    let p = profile.unwrap();
    assert!(p.samples >= 100 && p.lost == 0, "{p:?}");
    assert!(p.places["translated"] * 10 >= p.samples * 8, "{p:?}");
    let inside = p.sites.iter().filter(|(s, _)| !s.user && s.cr3 == 0 && (0x10005..0x10016).contains(&s.rip));
    let inside: u64 = inside.map(|(_, n)| n).sum();
    assert!(inside * 10 >= p.places["translated"] * 9, "{p:?}");
    assert_eq!(p.categories.values().sum::<u64>(), p.places["translated"]);
    assert_eq!(p.categories.get("unknown"), None, "{p:?}");
    assert!(p.categories.contains_key("guest"), "{p:?}");
    let lengthening = p.lengthening().unwrap();
    assert!((1.0..20.0).contains(&lengthening), "{lengthening}");
}
