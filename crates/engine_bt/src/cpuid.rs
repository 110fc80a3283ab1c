//! CPUID in the cache: what the interpreter said last time is in the frame, by leaf and subleaf, until something changes that CPUID looks at
//! (`Cpu::cpuid_changed`).
//!
//! CPUID serialises (SDM 3A 8.3): if the alarm is set it is the interpreter's, so that code that another vCPU has changed is acted on before what follows is executed.

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]
#![expect(clippy::cast_possible_truncation, reason = "leaves have 32 bits")]

use std::arch::global_asm;

use bt::frame;
use x86::cpuid::ignores_subleaf;
use x86_interp::cpu::Cpu;

use crate::exec::Frame;

global_asm!(
    // Behind the call that came here stands the number of the site. R14, R15 and flags are free.
    ".globl trellis_bt_cpuid",
    "trellis_bt_cpuid:",
    "cmp dword ptr gs:[{alarm}], 0\njne trellis_bt_callout",
    "push rbx",
    // Leaves that have no subleaves are there under the last of all.
    "mov r14d, eax\nmov rbx, 0xffffffff00000000\nor r14, rbx",
    "movabs r15, {hash}\nimul r15, r14\nshr r15, 64 - {bits}\nshl r15d, 5",
    "cmp gs:[r15 + {table}], r14\nje 8f",
    "mov r14d, eax\nmov ebx, ecx\nshl rbx, 32\nor r14, rbx",
    "movabs r15, {hash}\nimul r15, r14\nshr r15, 64 - {bits}\nshl r15d, 5",
    "cmp gs:[r15 + {table}], r14\njne 9f",
    "8:\nadd rsp, 8",
    "mov eax, gs:[r15 + {table} + 8]\nmov ebx, gs:[r15 + {table} + 12]",
    "mov ecx, gs:[r15 + {table} + 16]\nmov edx, gs:[r15 + {table} + 20]",
    "inc qword ptr gs:[{count}]",
    "add qword ptr [rsp], 4\nret",
    "9:\npop rbx\njmp trellis_bt_callout",
    alarm = const frame::ALARM,
    hash = const frame::CPUID_HASH,
    bits = const frame::CPUID_ENTRIES.trailing_zeros(),
    table = const frame::CPUID,
    count = const frame::COUNT_HELPED,
);

unsafe extern "C" {
    fn trellis_bt_cpuid();
}

/// Address of the code that fragments call for CPUID.
pub fn address() -> u64 {
    trellis_bt_cpuid as *const () as u64
}

/// In a key: the leaf has no subleaves.
const NO_SUBLEAF: u64 = 0xffff_ffff << 32;

/// What CPUID is about to be asked for: the leaf, and the subleaf if it has any.
pub fn key(frame: &Frame) -> u64 {
    let leaf = frame.get(frame::GPR) & 0xffff_ffff;
    if ignores_subleaf(leaf as u32) { leaf | NO_SUBLEAF } else { leaf | frame.get(frame::GPR + 8) << 32 }
}

/// Remembers what the interpreter has just said to a [`key`].
pub fn remember(cpu: &Cpu, frame: &Frame, key: u64) {
    if key & NO_SUBLEAF == NO_SUBLEAF && !ignores_subleaf(key as u32) {
        return;
    }
    let at = frame::cpuid_entry(key);
    frame.set(at, key);
    let [eax, ecx, edx, ebx] = [0, 1, 2, 3].map(|n| cpu.gpr[n] & 0xffff_ffff);
    frame.set(at + 8, eax | ebx << 32);
    frame.set(at + 16, ecx | edx << 32);
}

/// Forgets everything if something has changed that CPUID looks at.
pub fn forget_if_changed(cpu: &mut Cpu, frame: &Frame) {
    if std::mem::take(&mut cpu.cpuid_changed) {
        (frame::CPUID..frame::XSTATE).step_by(32).for_each(|at| frame.set(at, frame::no_leaf(at)));
    }
}
