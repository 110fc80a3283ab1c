//! Accesses that miss the frame's TLB, in assembly: it is refilled from the interpreter's, accesses on two pages get a copy of both, and writes beside code
//! pass. What is left comes to Rust (`trellis_bt_slow`).

#![expect(unsafe_code, reason = "assembly that reads and fills the frame's tables")]

use std::arch::global_asm;

use bt::frame;
use x86_interp::tlb::SETS;

use crate::exec::Assembly;

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

unsafe extern "C" {
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
    fn trellis_bt_miss_0r();
    fn trellis_bt_miss_0w();
    fn trellis_bt_miss_1r();
    fn trellis_bt_miss_1w();
    fn trellis_bt_miss_2r();
    fn trellis_bt_miss_2w();
    fn trellis_bt_join();
}

/// For each kind of rights, reads and writes: an access misses.
pub const REFILLS: [Assembly; 6] = [
    trellis_bt_refill_0r,
    trellis_bt_refill_0w,
    trellis_bt_refill_1r,
    trellis_bt_refill_1w,
    trellis_bt_refill_2r,
    trellis_bt_refill_2w,
];
/// The check of a group fails.
pub const GROUP_REFILLS: [Assembly; 6] = [
    trellis_bt_refill_group_0r,
    trellis_bt_refill_group_0w,
    trellis_bt_refill_group_1r,
    trellis_bt_refill_group_1w,
    trellis_bt_refill_group_2r,
    trellis_bt_refill_group_2w,
];
/// An access is to be done on a copy of two pages.
pub const SPLITS: [Assembly; 6] = [
    trellis_bt_split_0r,
    trellis_bt_split_0w,
    trellis_bt_split_1r,
    trellis_bt_split_1w,
    trellis_bt_split_2r,
    trellis_bt_split_2w,
];
/// Instead of the first two: Rust alone fills.
pub const MISSES: [Assembly; 6] = [
    trellis_bt_miss_0r,
    trellis_bt_miss_0w,
    trellis_bt_miss_1r,
    trellis_bt_miss_1w,
    trellis_bt_miss_2r,
    trellis_bt_miss_2w,
];
/// Behind [`SPLITS`].
pub const JOIN: Assembly = trellis_bt_join;
