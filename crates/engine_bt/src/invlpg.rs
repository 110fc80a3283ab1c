//! INVLPG in the cache: the page's entries go from the frame's TLB and from the interpreter's, whose table behind [`frame::SECOND_TLB`] refills come from.
//!
//! What the interpreter knows of code by linear address only Rust looks at: such pages are remembered in [`frame::INVALIDATED`] for [`adopt`]. Whatever is unusual goes to
//! `trellis_bt_callout`: a place from which a large page was filled, a page that code may have been found in by address, and a full list.
//!
//! INV-PG-1: behind `trellis_bt_invlpg` no table that translated code reads has the page under a context that is in force, and who enters Rust calls
//! [`adopt`] before anything else looks at translations. The fragment that called ends there (`bt::unit`), so no difference of a group outlives it (INV-GROUP-1).

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]

use std::arch::global_asm;

use bt::frame;
use x86_interp::cpu::Cpu;
use x86_interp::tlb::SETS;

use crate::exec::Frame;
use crate::page_filter::PageFilter;

/// Whether the page of the address in RAX may be one of the filter at a field: then to 9. Uses RCX, RDX and R15.
macro_rules! not_in_filter {
    ($filter:literal) => {
        concat!(
            "mov rcx, rax\nmov rdx, rax\nshr rcx, 12\nshr rdx, 28\nxor rcx, rdx\n\
             mov edx, ecx\nshr edx, 6\nand edx, {words} - 1\n\
             mov r15, gs:[",
            $filter,
            "]\nmov rdx, [r15 + rdx*8]\nbt rdx, rcx\njc 9f\n"
        )
    };
}

/// The entries of one kind of rights. The page is in R14, its tag in RDX; RCX is where its place is in the interpreter's first table, EAX in the frame's.
macro_rules! drop_entries {
    ($variant:literal) => {
        concat!(
            "cmp [rcx + 32*{sets}*",
            $variant,
            "], rdx\nje 3f\ncmp [rcx + 32*{sets}*",
            $variant,
            " + 8], rdx\njne 4f\n\
             3: mov qword ptr [rcx + 32*{sets}*",
            $variant,
            "], 0\nmov qword ptr [rcx + 32*{sets}*",
            $variant,
            " + 8], 0\n\
             4: cmp gs:[rax + {table} + {stride}*",
            $variant,
            "], r14\njne 5f\n\
             mov gs:[rax + {table} + {stride}*",
            $variant,
            "], r15\nmov gs:[rax + {table} + {stride}*",
            $variant,
            " + 8], r15\n5:\n"
        )
    };
}

global_asm!(
    // Linear address in R14; behind the call that came here stands the number of the site. R15 and flags are free. INVLPG serialises, so code that
    // another vCPU changed is acted on first.
    ".globl trellis_bt_invlpg",
    "trellis_bt_invlpg:",
    "cmp dword ptr gs:[{alarm}], 0\njne trellis_bt_callout",
    "mov r15, r14\nshl r15, 16\nsar r15, 16\ncmp r15, r14\njne trellis_bt_callout",
    "cmp dword ptr gs:[{list}], {room}\njae trellis_bt_callout",
    "push rax\npush rcx\npush rdx",
    "mov rcx, r14\nmov rdx, r14\nshr rcx, 30\nshr rdx, 36\nxor ecx, edx",
    "mov rdx, r14\nshr rdx, 63\nmov rax, gs:[rdx*8 + {large}]\nbt rax, rcx\njc 9f",
    "and r14, -4096",
    // Jumps into the page, and into the one before, from which an instruction may reach into it.
    "mov rax, r14",
    not_in_filter!("{filters}"),
    not_in_filter!("{filters} + 8"),
    "sub rax, 4096",
    not_in_filter!("{filters}"),
    not_in_filter!("{filters} + 8"),
    "mov edx, gs:[{list}]\nmov gs:[{list} + 8 + rdx*8], r14\ninc dword ptr gs:[{list}]",
    "mov rdx, r14\nshr rdx, 63\nmov rdx, gs:[rdx*8 + {context}]\nor rdx, r14",
    "mov eax, r14d\nshr eax, 12\nmov ecx, eax\nand ecx, {sets} - 1\nshl rcx, 5\nadd rcx, gs:[{second}]",
    "and eax, {entries} - 1\nmov r15d, eax\nshl r15d, 12\nnot r15\nshl eax, 5",
    drop_entries!("0"),
    drop_entries!("1"),
    drop_entries!("2"),
    "inc qword ptr gs:[{count}]",
    "pop rdx\npop rcx\npop rax",
    // INV-PAIR-1.
    "pop r15\nadd r15, 4\nmov rsp, gs:[{pairs}]\njmp r15",
    "9:\npop rdx\npop rcx\npop rax\njmp trellis_bt_callout",
    alarm = const frame::ALARM,
    pairs = const frame::PAIRS,
    list = const frame::INVALIDATED,
    room = const frame::INVALIDATED_ROOM,
    large = const frame::LARGE,
    filters = const frame::PAGE_FILTERS,
    words = const PageFilter::WORDS,
    context = const frame::CONTEXT,
    sets = const SETS,
    second = const frame::SECOND_TLB,
    entries = const frame::TLB_ENTRIES,
    table = const frame::TLB,
    stride = const frame::TLB_STRIDE,
    count = const frame::COUNT_HELPED + 32,
);

unsafe extern "C" {
    fn trellis_bt_invlpg();
}

/// Address of the code that fragments call for INVLPG.
pub fn address() -> u64 {
    trellis_bt_invlpg as *const () as u64
}

/// The interpreter learns which pages translated code has invalidated.
pub fn adopt(cpu: &mut Cpu, frame: &Frame) {
    let count = frame.get32(frame::INVALIDATED);
    if count == 0 {
        return;
    }
    let pages = (frame::INVALIDATED + 8..).step_by(8).take(count as usize);
    pages.for_each(|at| cpu.tlb.forget_code_at(frame.get(at)));
    frame.set32(frame::INVALIDATED, 0);
}
