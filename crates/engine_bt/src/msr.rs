//! RDMSR and WRMSR of the bases of FS and GS in the cache (SDM 4 2.1, IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE), as kernels without FSGSBASE execute
//! them at each switch of tasks. Other registers, and addresses that are not canonical, go to `trellis_bt_callout`.
//!
//! WRMSR serialises (SDM 3A 8.3): if the alarm is set it is the interpreter's, as CPUID is.

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]

use std::arch::global_asm;

use bt::frame;
use x86::bits::msr;

global_asm!(
    // Behind the call that came here stands the number of the site. R14, R15 and flags are free.
    ".globl trellis_bt_wrmsr",
    "trellis_bt_wrmsr:",
    "cmp dword ptr gs:[{alarm}], 0\njne trellis_bt_callout",
    "mov r14, rdx\nshl r14, 32\nmov r15d, eax\nor r14, r15",
    "mov r15, r14\nshl r15, 16\nsar r15, 16\ncmp r15, r14\njne trellis_bt_callout",
    "lea r15d, [rcx + {minus_first}]\ncmp r15d, 2\nja trellis_bt_callout",
    "mov gs:[r15*8 + {bases}], r14",
    "inc qword ptr gs:[{count}]",
    "add qword ptr [rsp], 4\nret",
    ".globl trellis_bt_rdmsr",
    "trellis_bt_rdmsr:",
    "lea r15d, [rcx + {minus_first}]\ncmp r15d, 2\nja trellis_bt_callout",
    "mov rdx, gs:[r15*8 + {bases}]\nmov eax, edx\nshr rdx, 32",
    "inc qword ptr gs:[{count}]",
    "add qword ptr [rsp], 4\nret",
    alarm = const frame::ALARM,
    minus_first = const msr::FS_BASE.wrapping_neg(),
    bases = const frame::FS_BASE,
    count = const frame::COUNT_HELPED + 40,
);

const _: () = assert!(
    msr::GS_BASE == msr::FS_BASE + 1
        && msr::KERNEL_GS_BASE == msr::FS_BASE + 2
        && frame::GS_BASE == frame::FS_BASE + 8
        && frame::KERNEL_GS_BASE == frame::FS_BASE + 16,
    "the three are indexed"
);

unsafe extern "C" {
    fn trellis_bt_wrmsr();
    fn trellis_bt_rdmsr();
}

/// Addresses of the code that fragments call for RDMSR and WRMSR.
pub fn addresses() -> [u64; 2] {
    [trellis_bt_rdmsr as *const () as u64, trellis_bt_wrmsr as *const () as u64]
}
