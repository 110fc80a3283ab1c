//! Entering and leaving translated code.
//!
//! `trellis_bt_enter` loads the guest's registers from the frame and jumps; fragments leave through `trellis_bt_leave`, which stores
//! them. What a fragment calls finds the number of its site or exit behind the call. `trellis_bt_slow` and `trellis_bt_callout` store the registers, call Rust, and load them again. Guest x87 and vector registers are
//! stored on the way to Rust if they are in the host's, and loaded again when code wants them (`fp`): Rust and libc may
//! use every vector register, and guest MXCSR and control words are never in force while Rust runs.
//!
//! Two lookups need no Rust, and so no stores: `trellis_bt_refill_*` fill the frame's TLB from the interpreter's, `trellis_bt_lookup_*` the
//! jump cache from the second-level table (`tables`). The frame is what GS points at (`bt::frame`).

#![expect(clippy::cast_possible_truncation, reason = "offsets in the frame")]
#![expect(unsafe_code, reason = "assembly that switches between Rust and translated code")]

use std::arch::{asm, global_asm};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bt::frame;
use rustix::mm::munmap;
use x86_interp::tlb::SETS;

use crate::huge;

/// Bytes of the host's stack that pairs of calls take at most, but for the last. The host's predictor has some 32; more would not be predicted.
const PAIRS_BYTES: usize = 4096;

macro_rules! save_registers {
    () => {
        "mov gs:[0], rax\nmov gs:[8], rcx\nmov gs:[16], rdx\nmov gs:[24], rbx\nmov gs:[32], r13\nmov gs:[40], rbp\n\
         mov gs:[48], rsi\nmov gs:[56], rdi\nmov gs:[64], r8\nmov gs:[72], r9\nmov gs:[80], r10\nmov gs:[88], r11\n\
         mov gs:[96], r12\n\
         cmp dword ptr gs:[{loaded}], 0\nje 9f\ncall trellis_bt_fp_store\n9:"
    };
}
macro_rules! load_registers {
    () => {
        "mov rax, gs:[0]\nmov rcx, gs:[8]\nmov rdx, gs:[16]\nmov rbx, gs:[24]\nmov r13, gs:[32]\nmov rbp, gs:[40]\n\
         mov rsi, gs:[48]\nmov rdi, gs:[56]\nmov r8, gs:[64]\nmov r9, gs:[72]\nmov r10, gs:[80]\nmov r11, gs:[88]\n\
         mov r12, gs:[96]"
    };
}

global_asm!(
    ".globl trellis_bt_enter",
    "trellis_bt_enter:",
    "push rbx\npush rbp\npush r12\npush r13\npush r14\npush r15\nsub rsp, 8",
    // INV-PAIR-2: the pair below all others (`bt::lower::pair`).
    "push 0\nlea rax, [rip + trellis_bt_unpaired]\npush rax",
    "mov gs:[{pairs}], rsp\nlea rax, [rsp - {pairs_bytes}]\nmov gs:[{pairs_end}], rax",
    "mov r15, rdi\nmov r14, rsi",
    load_registers!(),
    "jmp r15",
    // The guest returned to address 0, which lies below every call.
    "trellis_bt_unpaired:",
    "mov gs:[{rip}], r14\njmp trellis_bt_leave_all",
    ".globl trellis_bt_take_exit",
    "trellis_bt_take_exit:",
    "pop r15\nmov r15d, [r15]\ninc r15d\nmov gs:[{exit}], r15d",
    ".globl trellis_bt_leave",
    "trellis_bt_leave:",
    "trellis_bt_leave_all:",
    "mov rsp, gs:[{pairs}]",
    save_registers!(),
    "trellis_bt_left:",
    "mov rsp, gs:[{pairs}]\nadd rsp, 24\npop r15\npop r14\npop r13\npop r12\npop rbp\npop rbx",
    "ret",
    // Behind the call that came here stand a jump of five bytes, to try again, and the number of the site.
    ".globl trellis_bt_slow",
    "trellis_bt_slow:",
    "mov r15, [rsp]\nmov r15d, [r15 + 5]\nmov gs:[{site}], r15d",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {slow}",
    "add rsp, 8",
    "test al, {leave} | {elsewhere}\njne 6f",
    "mov r15, rax",
    "test r15b, {fp}\nje 5f\ncall trellis_bt_fp_load\n5:",
    load_registers!(),
    "test r15b, {done}\njne 4f",
    "ret",
    "4:\nadd rsp, 8",
    "test r15b, {flags}\nje 3f",
    "push rax\nmovzx eax, word ptr gs:[{status}]\nadd al, 0x7f\nsahf\npop rax",
    "3:\njmp gs:[{behind}]",
    // Out of the cache, or at the outer entry of another fragment: something has changed (INV-PAIR-1).
    "6:\nmov rsp, gs:[{pairs}]\ntest al, {leave}\njne trellis_bt_left",
    load_registers!(),
    "mov r14, gs:[{rip}]\njmp gs:[{behind}]",
    // Behind the call that came here stands the number of the site.
    ".globl trellis_bt_callout",
    "trellis_bt_callout:",
    "mov r15, [rsp]\nmov r15d, [r15]\nmov gs:[{site}], r15d",
    "sub rsp, 8",
    save_registers!(),
    "mov rdi, gs:[{engine}]",
    "call {callout}",
    "add rsp, 8",
    "test al, {leave} | {elsewhere}\njne 6b",
    "mov r15, rax",
    "test r15b, {fp}\nje 5f\ncall trellis_bt_fp_load\n5:",
    load_registers!(),
    "add qword ptr [rsp], 4",
    "test r15b, {flags}\nje 3f",
    "push rax\nmovzx eax, word ptr gs:[{status}]\nadd al, 0x7f\nsahf\npop rax",
    "3:\nret",
    engine = const frame::ENGINE,
    loaded = const frame::FP_LOADED,
    exit = const frame::EXIT,
    site = const frame::SITE,
    status = const frame::FLAGS,
    behind = const frame::DONE,
    rip = const frame::RIP,
    pairs = const frame::PAIRS,
    pairs_end = const frame::PAIRS_END,
    pairs_bytes = const PAIRS_BYTES,
    leave = const action::LEAVE,
    elsewhere = const action::ELSEWHERE,
    done = const action::DONE,
    flags = const action::FLAGS,
    fp = const action::FP,
    slow = sym slow_entry,
    callout = sym callout_entry,
);

/// What translated code does when Rust comes back to it; bits.
pub mod action {
    /// Leave: the frame is up to date.
    pub const LEAVE: u64 = 1;
    /// Of a missed access: go on at [`bt::frame::DONE`] instead of trying again.
    pub const DONE: u64 = 2;
    /// The guest's flags go into the host's.
    pub const FLAGS: u64 = 4;
    /// The guest's x87 and vector registers go into the host's.
    pub const FP: u64 = 8;
    /// Go on at the outer entry of another fragment: at [`bt::frame::DONE`], whose guest address is [`bt::frame::RIP`].
    pub const ELSEWHERE: u64 = 16;
}

/// Fills the TLB entry of the address in R14 (XORed with the tag of the entry at R15) from the second level; R15 is 0 then, to try again. What is not there, or there already (the
/// access crosses a page or is misaligned), is for Rust; a group that crosses goes on behind the number of its site. Called by fragments; flags are
/// free.
macro_rules! refill {
    ($name:literal, $variant:literal, $write:literal, $known:literal, $traced:ident) => {
        global_asm!(
            concat!(".globl ", $name),
            concat!($name, ":"),
            "xor r14, gs:[r15 + {table} + {tag}]",
            "mov gs:[{address}], r14",
            "push rax\npush rcx",
            "mov rax, r14\nmov r15, r14\nmov rcx, r14",
            "shr rax, 12\nshr rcx, 63",
            "mov rcx, gs:[rcx*8 + {context}]",
            "and r15, -4096\nor rcx, r15",
            "mov r14d, eax\nand eax, {sets} - 1\nshl rax, 5",
            "add rax, gs:[{second}]",
            "cmp [rax + {base} + {tag}], rcx\njne 7f",
            "and r14d, {entries} - 1\nshl r14d, 5",
            "cmp gs:[r14 + {table} + {tag}], r15\nje 5f",
            "push rdx\npush rbx",
            "mov rdx, r15\nshr rdx, 63",
            "mov rbx, gs:[rdx*8 + {log}]",
            "cmp rbx, gs:[rdx*8 + {log_end}]\njae 6f",
            "add qword ptr gs:[rdx*8 + {log}], 4",
            "lea edx, [r14 + {table}]\nmov [rbx], edx",
            "6:\nmov gs:[r14 + {table}], r15",
            "mov rdx, r15\nnot rdx\ncmp [rax + {base} + 8], rcx\ncmove rdx, r15",
            "mov gs:[r14 + {table} + 8], rdx",
            "mov rdx, [rax + {base} + 16]\nadd rdx, gs:[{memory}]",
            "mov gs:[r14 + {table} + 24], rdx",
            "add rdx, r15",
            "mov gs:[r14 + {table} + 16], rdx",
            "mov rdx, [rax + {base} + 24]\nbtr rdx, 63\nshr r14d, 2",
            "mov gs:[r14 + {frames}], rdx",
            "inc qword ptr gs:[{count}]",
            "pop rbx\npop rdx\npop rcx\npop rax",
            "xor r15d, r15d",
            "ret",
            "7:",
            // Uses of names, for the variants that have none.
            "/* {traces} {shared} {lines} {pass} {passed} {alarm} */",
            $traced!(),
            "8:\npop rcx\npop rax",
            "jmp trellis_bt_slow",
            concat!("5:\npop rcx\npop rax\n", $known),
            address = const frame::ADDRESS,
            context = const frame::CONTEXT,
            second = const frame::SECOND_TLB,
            sets = const SETS,
            base = const $variant * 32 * SETS,
            tag = const 8 * $write,
            entries = const frame::TLB_ENTRIES,
            table = const frame::TLB + $variant * frame::TLB_STRIDE,
            log = const frame::TLB_LOG,
            log_end = const frame::TLB_LOG_END,
            memory = const frame::MEMORY,
            frames = const frame::frame_of(frame::TLB + $variant * frame::TLB_STRIDE),
            count = const frame::COUNT_REFILLS,
            traces = const frame::TRACES,
            shared = const guestmem::trace::TRACE_SHARED,
            alarm = const frame::ALARM,
            lines = const guestmem::trace::TRACE_LINES,
            pass = const frame::PASS,
            passed = const frame::COUNT_PASSED,
        );
    };
}

/// A read misses for good.
macro_rules! nothing {
    () => {
        ""
    };
}

/// A write that the second level does not allow: RCX becomes the mask of the page's traced lines, if it lacks the right only because the page is
/// traced, and other lines may be written (`guestmem::trace`, INV-TR-2). RAX points at its entry.
macro_rules! traced {
    () => {
        "cmp [rax + {base}], rcx\njne 8f\nmov rcx, [rax + {base} + 24]\nbtr rcx, 63\njnc 8f\n\
         lea rcx, [rcx + rcx*2]\nshl rcx, 3\nadd rcx, gs:[{traces}]\n\
         cmp dword ptr [rcx + {shared}], 0\nje 8f\nmov rcx, [rcx + {lines}]\ntest rcx, rcx\njz 8f\n\
         cmp dword ptr gs:[{alarm}], 0\njne 8f\n"
    };
}
const _: () = assert!(guestmem::trace::TRACE_STRIDE == 24, "the stride that `traced` multiplies with");

/// The write goes on behind its check if it touches no such line. Its size stands 10 bytes behind the return address, and a jump behind that.
macro_rules! pass {
    () => {
        concat!(
            traced!(),
            "mov r14, [rsp + 16]\nmovzx r14d, byte ptr [r14 + 10]\ntest r14d, r14d\njz 8f\n\
             mov r15, gs:[{address}]\nand r15d, 0xfff\nadd r14d, r15d\ndec r14d\ncmp r14d, 0xfff\nja 8f\n\
             shr r14d, 6\nbt rcx, r14\njc 8f\nmov r14d, r15d\nshr r14d, 6\nbt rcx, r14\njc 8f\n\
             mov rcx, [rsp + 16]\nadd rcx, 11\nmov gs:[{pass}], rcx\n\
             mov r14d, r15d\nmov r15, gs:[{address}]\nand r15, -4096\n\
             add r15, [rax + {base} + 16]\nadd r15, gs:[{memory}]\ninc qword ptr gs:[{passed}]\n\
             pop rcx\npop rax\nlea rsp, [rsp + 8]\njmp gs:[{pass}]\n"
        )
    };
}
/// Groups do not pass: they go on in code without groups.
macro_rules! pass_group {
    () => {
        concat!(traced!(), "pop rcx\npop rax\nadd qword ptr [rsp], 9\nret\n")
    };
}
refill!("trellis_bt_refill_0r", 0, 0, "jmp trellis_bt_slow", nothing);
refill!("trellis_bt_refill_0w", 0, 1, "jmp trellis_bt_slow", pass);
refill!("trellis_bt_refill_1r", 1, 0, "jmp trellis_bt_slow", nothing);
refill!("trellis_bt_refill_1w", 1, 1, "jmp trellis_bt_slow", pass);
refill!("trellis_bt_refill_2r", 2, 0, "jmp trellis_bt_slow", nothing);
refill!("trellis_bt_refill_2w", 2, 1, "jmp trellis_bt_slow", pass);
refill!("trellis_bt_refill_group_0r", 0, 0, "jmp trellis_bt_elsewhere", nothing);
refill!("trellis_bt_refill_group_0w", 0, 1, "jmp trellis_bt_elsewhere", pass_group);
refill!("trellis_bt_refill_group_1r", 1, 0, "jmp trellis_bt_elsewhere", nothing);
refill!("trellis_bt_refill_group_1w", 1, 1, "jmp trellis_bt_elsewhere", pass_group);
refill!("trellis_bt_refill_group_2r", 2, 0, "jmp trellis_bt_elsewhere", nothing);
refill!("trellis_bt_refill_group_2w", 2, 1, "jmp trellis_bt_elsewhere", pass_group);

global_asm!(
    // A group, or the first form of an access, that crosses a page: goes on behind the number of its site; one of some comes to Rust.
    "trellis_bt_elsewhere:",
    "dec dword ptr gs:[{sample}]\njs 7f",
    "add qword ptr [rsp], 9\nret",
    "7: jmp trellis_bt_slow",
    // The copy of an access that crossed a page goes back to the pages. Uses R14 and R15; flags stay.
    ".globl trellis_bt_join",
    "trellis_bt_join:",
    "mov r14, rcx\nmov r15, rsi\npush rdi",
    "mov rsi, gs:[{bounce}]\nmov rdi, gs:[{hosts}]\nmov ecx, gs:[{counts}]\nrep movsb",
    "mov rdi, gs:[{hosts} + 8]\nmov ecx, gs:[{counts} + 4]\nrep movsb",
    "pop rdi\nmov rsi, r15\nmov rcx, r14",
    "ret",
    sample = const frame::SAMPLE,
    bounce = const frame::BOUNCE_ADDRESS,
    hosts = const frame::SPLIT_HOSTS,
    counts = const frame::SPLIT_COUNTS,
);

/// Copies the bytes of an access that crosses pages to [`frame::BOUNCE`]: linear address in R14, size in R15; afterwards R14 is the
/// address of the copy and R15 is 0. If an entry of the two is not there, or the access does not cross, Rust is asked, which has the instruction
/// done. Flags are free.
macro_rules! split {
    ($name:literal, $variant:literal, $write:literal) => {
        global_asm!(
            concat!(".globl ", $name),
            concat!($name, ":"),
            "mov gs:[{address}], r14",
            "push rax\npush rcx\npush rsi\npush rdi",
            "mov rcx, r14\nand rcx, -4096",
            "mov eax, ecx\nshr eax, 7\nand eax, ({entries} - 1) << 5",
            "cmp gs:[rax + {table} + {tag}], rcx\njne 7f",
            "mov rsi, gs:[rax + {table} + 24]\nadd rsi, r14",
            "add rcx, 4096",
            "mov eax, ecx\nshr eax, 7\nand eax, ({entries} - 1) << 5",
            "cmp gs:[rax + {table} + {tag}], rcx\njne 7f",
            "mov rax, gs:[rax + {table} + 16]",
            // Bytes on the first page, and on the second.
            "sub rcx, r14\nsub r15, rcx\njbe 7f",
            "mov gs:[{hosts}], rsi\nmov gs:[{hosts} + 8], rax",
            "mov gs:[{counts}], ecx\nmov gs:[{counts} + 4], r15d",
            "mov rdi, gs:[{bounce}]\nmov r14, rdi",
            "rep movsb",
            "mov rsi, rax\nmov ecx, r15d\nrep movsb",
            "xor r15d, r15d",
            "inc qword ptr gs:[{count}]",
            "pop rdi\npop rsi\npop rcx\npop rax",
            "add qword ptr [rsp], 9\nret",
            "7:\npop rdi\npop rsi\npop rcx\npop rax\njmp trellis_bt_slow",
            address = const frame::ADDRESS,
            entries = const frame::TLB_ENTRIES,
            table = const frame::TLB + $variant * frame::TLB_STRIDE,
            tag = const 8 * $write,
            hosts = const frame::SPLIT_HOSTS,
            counts = const frame::SPLIT_COUNTS,
            bounce = const frame::BOUNCE_ADDRESS,
            count = const frame::COUNT_SPLITS,
        );
    };
}
split!("trellis_bt_split_0r", 0, 0);
split!("trellis_bt_split_0w", 0, 1);
split!("trellis_bt_split_1r", 1, 0);
split!("trellis_bt_split_1w", 1, 1);
split!("trellis_bt_split_2r", 2, 0);
split!("trellis_bt_split_2w", 2, 1);

/// Instead of a refill: Rust alone fills (the knob `tlb=one`). Called by fragments, as refills are.
macro_rules! miss {
    ($name:literal, $variant:literal, $write:literal) => {
        global_asm!(
            concat!(".globl ", $name),
            concat!($name, ":"),
            "xor r14, gs:[r15 + {table} + {tag}]",
            "mov gs:[{address}], r14",
            "jmp trellis_bt_slow",
            address = const frame::ADDRESS,
            tag = const 8 * $write,
            table = const frame::TLB + $variant * frame::TLB_STRIDE,
        );
    };
}
miss!("trellis_bt_miss_0r", 0, 0);
miss!("trellis_bt_miss_0w", 0, 1);
miss!("trellis_bt_miss_1r", 1, 0);
miss!("trellis_bt_miss_1w", 1, 1);
miss!("trellis_bt_miss_2r", 2, 0);
miss!("trellis_bt_miss_2w", 2, 1);

/// Goes on at the guest address in R14 if a second-level table knows it, and tells the jump cache; else leaves with RIP there. Fragments
/// call this, with the number of the site behind the call; flags and R15 are free. `$before` may jump to 5 with what it found in R15.
macro_rules! lookup {
    ($name:literal, $variant:literal, $class:literal, $environment:literal, $before:literal) => {
        global_asm!(
            concat!(".globl ", $name),
            concat!($name, ":"),
            "pop r15\nmov r15d, [r15]\nmov gs:[{site}], r15d",
            concat!(".globl ", $name, "_at"),
            concat!($name, "_at:"),
            "cmp dword ptr gs:[{alarm}], 0\njne 6f",
            // The second level is asked for canonical addresses only (`bt::frame::second_tag`).
            "mov r15, r14\nshl r15, 16\nsar r15, 16\ncmp r15, r14\njne 6f",
            "push rax\npush rcx",
            $before,
            "mov rcx, r14\nshr rcx, 63",
            "mov rax, gs:[rcx*8 + {context}]",
            "mov rcx, r14\nshr rcx, 15\nxor rcx, r14\nmov r15d, eax\nshl r15d, 6\nxor ecx, r15d\nand ecx, {sets} - 1",
            "or rax, {class} << 12\nshl rax, 48\nxor rax, r14",
            $environment,
            "shl rcx, 4\nadd rcx, gs:[{second}]",
            "cmp [rcx], rax\njne 7f",
            "mov r15, [rcx + 8]",
            "5:\ninc qword ptr gs:[{count}]",
            "mov rcx, r14\nror rcx, 10\nxor ecx, r14d\nand ecx, {jumps}",
            "push rdx",
            "mov rdx, r14\nshr rdx, 63",
            "mov rax, gs:[rdx*8 + {log}]",
            "cmp rax, gs:[rdx*8 + {log_end}]\njae 8f",
            "add qword ptr gs:[rdx*8 + {log}], 4",
            "lea edx, [rcx*8 + {table}]\nmov [rax], edx",
            "8:\nmov gs:[rcx*8 + {table} + {hosts}], r15",
            "mov gs:[rcx*8 + {table}], r14",
            "pop rdx\npop rcx\npop rax",
            "jmp r15",
            "7:\npop rcx\npop rax",
            "6:\nmov gs:[{rip}], r14",
            "jmp trellis_bt_leave",
            site = const frame::SITE,
            alarm = const frame::ALARM,
            context = const frame::CONTEXT,
            class = const $class,
            sets = const frame::SECOND_JUMP_ENTRIES,
            second = const frame::SECOND_JUMPS,
            count = const frame::COUNT_LOOKUPS,
            jumps = const frame::JUMP_MASK,
            log = const frame::JUMP_LOG,
            log_end = const frame::JUMP_LOG_END,
            table = const frame::JUMPS + $class * frame::JUMP_STRIDE,
            environments = const frame::ENVIRONMENTS + 8 * $variant,
            hosts = const frame::JUMP_HOSTS,
            rip = const frame::RIP,
        );
    };
}
lookup!("trellis_bt_lookup_0", 0, 0, "/* {environments} */", "");
lookup!("trellis_bt_lookup_1", 1, 1, "/* {environments} */", "");
lookup!(
    "trellis_bt_lookup_2",
    2,
    2,
    "/* {environments} */",
    "call trellis_bt_user_code\ntest r15, r15\njne 5f"
);
// Of 16- and 32-bit code.
lookup!(
    "trellis_bt_lookup_3",
    0,
    3,
    "xor rax, gs:[{environments}]",
    "call trellis_bt_legacy_code_0\ntest r15, r15\njne 5f"
);
lookup!(
    "trellis_bt_lookup_4",
    1,
    4,
    "xor rax, gs:[{environments}]",
    "call trellis_bt_legacy_code_1\ntest r15, r15\njne 5f"
);
lookup!(
    "trellis_bt_lookup_5",
    2,
    5,
    "xor rax, gs:[{environments}]",
    "call trellis_bt_legacy_code_2\ntest r15, r15\njne 5f"
);

/// The fragment of code at the address in R14, by its frame (`user_code`): in R15, or 0. Uses RAX and RCX. `$rights`: what the tag of a code page has for
/// who executes there.
macro_rules! code_by_frame {
    ($name:literal, $rights:literal, $tag:expr) => {
        global_asm!(
            concat!($name, ":"),
            "mov rcx, r14\nshr rcx, 12",
            "mov r15, gs:[{context}]",
            "mov eax, r15d\nshl eax, 5\nxor eax, ecx\nand eax, {pages} - 1\nshl eax, 4",
            "add rax, gs:[{code_pages}]",
            "shl rcx, 12\nor rcx, r15",
            $rights,
            "xor r15d, r15d",
            "cmp [rax], rcx\njne 9f",
            // The frame's address, with the offset in the page: the code's guest physical address.
            "mov rax, [rax + 8]\nmov ecx, r14d\nand ecx, 0xfff\nor rcx, rax",
            "mov rax, rcx\nshr rax, 16\nxor eax, ecx\nimul eax, eax, {hash}\nshr eax, 32 - {bits}\nand eax, -2\nshl eax, 4",
            "add rax, gs:[{fragments}]",
            "or rcx, gs:[{tag}]",
            "cmp [rax], rcx\njne 8f\nmov r15, [rax + 8]\nret",
            "8:\ncmp [rax + 16], rcx\ncmove r15, [rax + 24]",
            "9:\nret",
            context = const frame::CONTEXT,
            pages = const frame::CODE_PAGE_ENTRIES,
            code_pages = const frame::CODE_PAGES,
            hash = const frame::FRAGMENT_HASH.cast_signed() as i32,
            bits = const frame::FRAGMENT_ENTRIES.trailing_zeros(),
            fragments = const frame::FRAGMENTS,
            tag = const $tag,
        );
    };
}
code_by_frame!("trellis_bt_user_code", "", frame::FRAGMENT_TAG);
code_by_frame!("trellis_bt_legacy_code_0", "bts rcx, 62", frame::LEGACY_FRAGMENT_TAGS);
code_by_frame!("trellis_bt_legacy_code_1", "bts rcx, 62", frame::LEGACY_FRAGMENT_TAGS + 8);
code_by_frame!("trellis_bt_legacy_code_2", "", frame::LEGACY_FRAGMENT_TAGS + 16);

unsafe extern "C" {
    fn trellis_bt_enter(code: u64, rip: u64);
    fn trellis_bt_leave();
    fn trellis_bt_take_exit();
    fn trellis_bt_callout();
    fn trellis_bt_refill_0r();
    fn trellis_bt_refill_0w();
    fn trellis_bt_refill_1r();
    fn trellis_bt_refill_1w();
    fn trellis_bt_refill_2r();
    fn trellis_bt_refill_2w();
    fn trellis_bt_refill_group_0r();
    fn trellis_bt_refill_group_0w();
    fn trellis_bt_refill_group_1r();
    fn trellis_bt_refill_group_1w();
    fn trellis_bt_refill_group_2r();
    fn trellis_bt_refill_group_2w();
    fn trellis_bt_split_0r();
    fn trellis_bt_split_0w();
    fn trellis_bt_split_1r();
    fn trellis_bt_split_1w();
    fn trellis_bt_split_2r();
    fn trellis_bt_split_2w();
    fn trellis_bt_join();
    fn trellis_bt_miss_0r();
    fn trellis_bt_miss_0w();
    fn trellis_bt_miss_1r();
    fn trellis_bt_miss_1w();
    fn trellis_bt_miss_2r();
    fn trellis_bt_miss_2w();
    fn trellis_bt_lookup_0();
    fn trellis_bt_lookup_1();
    fn trellis_bt_lookup_2();
    fn trellis_bt_lookup_3();
    fn trellis_bt_lookup_4();
    fn trellis_bt_lookup_5();
}

/// How many instructions [`Frame::without_helpers`] is about.
const HELPERS: usize = 6;

/// Code above, as its address.
type Assembly = unsafe extern "C" fn();

/// What translated code asks of the engine.
pub trait Callouts {
    /// A memory access missed. The [`action`].
    fn slow(&mut self, site: u32) -> u64;
    /// An instruction for the interpreter. The [`action`].
    fn callout(&mut self, site: u32) -> u64;
}

/// What [`frame::ENGINE`] points at while fragments run.
struct Hook<'a> {
    callouts: &'a mut dyn Callouts,
    frame: NonNull<u8>,
}

extern "C" fn slow_entry(hook: *mut Hook<'_>) -> u64 {
    // SAFETY: `Frame::enter` put a live hook there, and nothing else uses it while fragments run.
    let hook = unsafe { &mut *hook };
    // SAFETY: the frame outlives the hook; the field is aligned.
    let site = unsafe { hook.frame.as_ptr().add(frame::SITE as usize).cast::<u32>().read() };
    hook.callouts.slow(site)
}

extern "C" fn callout_entry(hook: *mut Hook<'_>) -> u64 {
    // SAFETY: as in `slow_entry`.
    let hook = unsafe { &mut *hook };
    // SAFETY: as in `slow_entry`.
    let site = unsafe { hook.frame.as_ptr().add(frame::SITE as usize).cast::<u32>().read() };
    hook.callouts.callout(site)
}

/// The memory of a frame.
struct Memory(NonNull<u8>);

// SAFETY: plain memory; other threads reach only the alarm, an atomic.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the last owner is gone.
        let _unmapped = unsafe { munmap(self.0.as_ptr().cast(), frame::SIZE) };
    }
}

impl Memory {
    fn alarm(&self) -> &AtomicU32 {
        // SAFETY: the field is aligned and lies in the mapping, which lives as long as `self`; everybody but translated code, which
        // uses single aligned accesses, reaches it through this atomic.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(frame::ALARM as usize).cast()) }
    }
}

impl engine::signals::Alarm for Memory {
    fn ring(&self) {
        self.alarm().store(1, Ordering::SeqCst);
    }
}

/// The frame: what translated code reaches through GS.
#[derive(Clone)]
pub struct Frame(Arc<Memory>);

impl Frame {
    /// A zeroed frame with the addresses that fragments jump through.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new() -> rustix::io::Result<Self> {
        let f = Self(Arc::new(Memory(huge::zeroed(frame::SIZE, frame::BUSY)?)));
        f.set_code(
            frame::REFILL,
            &[
                trellis_bt_refill_0r,
                trellis_bt_refill_0w,
                trellis_bt_refill_1r,
                trellis_bt_refill_1w,
                trellis_bt_refill_2r,
                trellis_bt_refill_2w,
            ],
        );
        f.set_code(
            frame::REFILL_GROUP,
            &[
                trellis_bt_refill_group_0r,
                trellis_bt_refill_group_0w,
                trellis_bt_refill_group_1r,
                trellis_bt_refill_group_1w,
                trellis_bt_refill_group_2r,
                trellis_bt_refill_group_2w,
            ],
        );
        f.set_code(
            frame::SPLIT,
            &[
                trellis_bt_split_0r,
                trellis_bt_split_0w,
                trellis_bt_split_1r,
                trellis_bt_split_1w,
                trellis_bt_split_2r,
                trellis_bt_split_2w,
            ],
        );
        f.set_code(frame::JOIN, &[trellis_bt_join]);
        f.set(frame::BOUNCE_ADDRESS, f.address(frame::BOUNCE));
        f.set_code(frame::LOOKUP, &[trellis_bt_lookup_0, trellis_bt_lookup_1, trellis_bt_lookup_2]);
        f.set_code(frame::LOOKUP_LEGACY, &[trellis_bt_lookup_3, trellis_bt_lookup_4, trellis_bt_lookup_5]);
        f.set_code(frame::TAKE_EXIT, &[trellis_bt_take_exit]);
        f.set_code(frame::LEAVE, &[trellis_bt_leave]);
        f.set_code(frame::CALLOUT, &[trellis_bt_callout]);
        f.set_helpers();
        f.set(frame::FP_LOAD, crate::fp::load_address());
        Ok(f)
    }

    /// Puts the addresses of code that fragments jump through, from a place on.
    fn set_code(&self, from: i32, code: &[Assembly]) {
        for (at, code) in (from..).step_by(8).zip(code) {
            self.set(at, *code as *const () as u64);
        }
    }

    /// Instructions that are done without Rust.
    fn set_helpers(&self) {
        self.set(frame::XSTATE_ADDRESS, self.address(frame::XSTATE));
        self.set(frame::IRET, crate::iret::address());
        self.set(frame::DO_CPUID, crate::cpuid::address());
        self.set(frame::DO_XSAVE, crate::xstate::save_address());
        self.set(frame::DO_XRSTOR, crate::xstate::restore_address());
        self.set(frame::DO_SWITCH, crate::switch::address());
        self.set(frame::DO_INVLPG, crate::invlpg::address());
    }

    /// From now on the interpreter does every instruction that is not done in fragments.
    pub fn without_helpers(&self) {
        let helpers = frame::HELPERS.step_by(8).take(HELPERS);
        helpers.for_each(|at| self.set_code(at, &[trellis_bt_callout]));
    }

    /// From now on every miss comes to Rust.
    pub fn refill_in_rust(&self) {
        let misses: [Assembly; 6] = [
            trellis_bt_miss_0r,
            trellis_bt_miss_0w,
            trellis_bt_miss_1r,
            trellis_bt_miss_1w,
            trellis_bt_miss_2r,
            trellis_bt_miss_2w,
        ];
        self.set_code(frame::REFILL, &misses);
        self.set_code(frame::REFILL_GROUP, &misses);
    }

    /// What others ring.
    pub fn alarm(&self) -> Arc<dyn engine::signals::Alarm> {
        Arc::clone(&self.0) as _
    }

    /// Has translated code leave at its next poll.
    pub fn ring(&self) {
        engine::signals::Alarm::ring(&*self.0);
    }

    /// Switches the alarm off; who calls this looks at the signals afterwards.
    pub fn silence(&self) {
        self.0.alarm().store(0, Ordering::SeqCst);
    }

    /// Whether somebody rang.
    pub fn is_alarmed(&self) -> bool {
        self.0.alarm().load(Ordering::Relaxed) != 0
    }

    /// The host address of a place in the frame.
    pub fn address(&self, at: i32) -> u64 {
        debug_assert!((0..=frame::SIZE as i32).contains(&at));
        // SAFETY: within the mapping, or just behind it.
        unsafe { self.0.0.as_ptr().add(at as usize) as u64 }
    }

    /// Reads a field of eight bytes.
    #[inline(always)]
    pub fn get(&self, at: i32) -> u64 {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: fields lie within the frame.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u64>().read() }
    }

    /// Writes a field of eight bytes.
    #[inline(always)]
    pub fn set(&self, at: i32, value: u64) {
        debug_assert!((0..=frame::SIZE as i32 - 8).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u64>().write(value) }
    }

    /// Reads a field of four bytes.
    #[inline(always)]
    pub fn get32(&self, at: i32) -> u32 {
        debug_assert!((0..=frame::SIZE as i32 - 4).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u32>().read() }
    }

    /// Writes a field of four bytes.
    #[inline(always)]
    pub fn set32(&self, at: i32, value: u32) {
        debug_assert!((0..=frame::SIZE as i32 - 4).contains(&at));
        // SAFETY: as above.
        unsafe { self.0.0.as_ptr().add(at as usize).cast::<u32>().write(value) }
    }

    /// Runs translated code until it leaves. `rip` is the guest address that the code begins with.
    ///
    /// # Safety
    /// `code` is the outer entry of a fragment that `bt` made, in code memory that changes only by links and stale entries; the frame's
    /// pointers (tables, logs, area) are valid.
    pub unsafe fn enter(&self, code: u64, rip: u64, callouts: &mut dyn Callouts) {
        let mut hook = Hook { callouts, frame: self.0.0 };
        self.set(frame::ENGINE, &raw mut hook as u64);
        // SAFETY: GS is unused by Rust and libc on x86-64 Linux; the frame stays mapped while fragments run. The
        // assembly keeps the C calling convention, and fragments touch only the registers it saves; vector registers are the caller's
        // to save in that convention, MXCSR and the x87 control word are restored when fragments are left.
        unsafe {
            asm!("wrgsbase {0}", in(reg) self.0.0.as_ptr(), options(nostack, preserves_flags));
            trellis_bt_enter(code, rip);
        }
    }
}

/// Where the engine's assembly is, and what it does.
pub fn assembly() -> Vec<(u64, &'static str)> {
    let refills: [Assembly; 12] = [
        trellis_bt_refill_0r,
        trellis_bt_refill_0w,
        trellis_bt_refill_1r,
        trellis_bt_refill_1w,
        trellis_bt_refill_2r,
        trellis_bt_refill_2w,
        trellis_bt_refill_group_0r,
        trellis_bt_refill_group_0w,
        trellis_bt_refill_group_1r,
        trellis_bt_refill_group_1w,
        trellis_bt_refill_group_2r,
        trellis_bt_refill_group_2w,
    ];
    let splits: [Assembly; 7] = [
        trellis_bt_split_0r,
        trellis_bt_split_0w,
        trellis_bt_split_1r,
        trellis_bt_split_1w,
        trellis_bt_split_2r,
        trellis_bt_split_2w,
        trellis_bt_join,
    ];
    let lookups: [Assembly; 6] = [
        trellis_bt_lookup_0,
        trellis_bt_lookup_1,
        trellis_bt_lookup_2,
        trellis_bt_lookup_3,
        trellis_bt_lookup_4,
        trellis_bt_lookup_5,
    ];
    let switches: [Assembly; 3] = [trellis_bt_take_exit, trellis_bt_leave, trellis_bt_callout];
    let named =
        |code: &[Assembly], name| code.iter().map(|c| (*c as *const () as u64, name)).collect::<Vec<_>>();
    let mut all = named(&refills, "TLB refills");
    all.extend(named(&splits, "accesses on two pages"));
    all.extend(named(&lookups, "jump-cache refills"));
    all.extend(named(&switches, "switches"));
    all.push((trellis_bt_enter as *const () as u64, "switches"));
    all.push((crate::fp::load_address(), "vector registers"));
    all.push((crate::fp::store_address(), "vector registers"));
    all.push((crate::iret::address(), "IRET"));
    all.push((crate::cpuid::address(), "CPUID"));
    all.push((crate::xstate::save_address(), "XSAVEC"));
    all.push((crate::xstate::restore_address(), "XRSTOR"));
    all.push((crate::switch::address(), "MOV to CR3"));
    all.push((crate::invlpg::address(), "INVLPG"));
    all
}
