//! Guest addresses that the jump cache does not have where a fragment looks, in assembly: kernel code is in a second-level table, user code is found by its frame
//! (`user_code`). What is in neither leaves the cache.

#![expect(clippy::cast_possible_truncation, reason = "a constant of a hash")]
#![expect(unsafe_code, reason = "assembly that reads and fills the frame's tables")]

use std::arch::global_asm;

use bt::frame;

use crate::exec::Assembly;

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
            context = const frame::CODE_CONTEXT,
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

/// Returns whose pair is not on top of the host's stack (`bt::lower::pair`): all pairs are dropped, and the target is looked up in the jump cache, then as
/// other targets are. Beside each return this would be as long as the rest of it. From the label `_at` on, as [`lookup`]'s.
macro_rules! elsewhere {
    ($name:literal, $lookup:literal, $class:literal) => {
        global_asm!(
            // Guest address in R14; behind the call that came here stands the number of the site. R15 and flags are free.
            concat!(".globl ", $name),
            concat!($name, ":"),
            "pop r15\nmov r15d, [r15]\nmov gs:[{site}], r15d",
            "mov rsp, gs:[{pairs}]",
            concat!(".globl ", $name, "_at"),
            concat!($name, "_at:"),
            concat!("cmp dword ptr gs:[{alarm}], 0\njne ", $lookup),
            "mov r15, r14\nror r15, 10\nxor r15d, r14d\nand r15d, {mask}",
            concat!("cmp gs:[r15*8 + {rips}], r14\njne ", $lookup),
            "jmp gs:[r15*8 + {rips} + {hosts}]",
            site = const frame::SITE,
            pairs = const frame::PAIRS,
            alarm = const frame::ALARM,
            mask = const frame::JUMP_MASK,
            rips = const frame::JUMPS + $class * frame::JUMP_STRIDE,
            hosts = const frame::JUMP_HOSTS,
        );
    };
}
elsewhere!("trellis_bt_return_0", "trellis_bt_lookup_0_at", 0);
elsewhere!("trellis_bt_return_1", "trellis_bt_lookup_1_at", 1);
elsewhere!("trellis_bt_return_2", "trellis_bt_lookup_2_at", 2);

unsafe extern "C" {
    fn trellis_bt_lookup_0();
    fn trellis_bt_lookup_1();
    fn trellis_bt_lookup_2();
    fn trellis_bt_lookup_3();
    fn trellis_bt_lookup_4();
    fn trellis_bt_lookup_5();
    fn trellis_bt_return_0();
    fn trellis_bt_return_1();
    fn trellis_bt_return_2();
}

/// By rights: another address of code.
pub const LOOKUPS: [Assembly; 3] = [trellis_bt_lookup_0, trellis_bt_lookup_1, trellis_bt_lookup_2];
/// The same for 16- and 32-bit code.
pub const LEGACY_LOOKUPS: [Assembly; 3] = [trellis_bt_lookup_3, trellis_bt_lookup_4, trellis_bt_lookup_5];
/// A return whose pair is another's. (Code with AC set has no pairs; who delivers exceptions goes on in the middle of this.)
pub const RETURNS: [Assembly; 3] = [trellis_bt_return_0, trellis_bt_return_1, trellis_bt_return_2];
