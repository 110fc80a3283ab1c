//! IRETQ in the cache: from 64-bit code at level 0 to 64-bit code at level 0 or 3, by descriptors in the GDT (SDM 2A IRET, SDM 3A 5.8).
//!
//! `trellis_bt_iret` reads the frame's five words and both descriptors through the second-level TLB, each word once, and checks what the
//! interpreter would check. INV-IRET-1: it changes nothing before all checks have passed; whatever is unusual (a bad selector, a page that the TLB does not
//! know, flags that translated code does not run with, NMIs to be unblocked, data segments to be dropped) goes to `trellis_bt_callout`
//! instead, as if the fragment had called that. Descriptors are read anew each time, so a changed GDT is seen at once.
//!
//! The segments are left to be loaded when somebody looks: the frame holds the selectors, the raw descriptors, and `MODE_IRET`
//! (`state::read_mode`). RF is dropped: no breakpoint is armed while translated code runs (`state::drop_resume_flag`).

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]

use std::arch::global_asm;

use bt::frame;
use x86_interp::tlb::SETS;

/// The host address of the guest address in RCX, readable at level 0, into RAX; else goes to 9. Uses RDX.
macro_rules! find_page {
    () => {
        "mov rax, rcx\nshr rax, 63\nmov rax, gs:[rax*8 + {context}]\n\
         mov rdx, rcx\nand rdx, -4096\nor rax, rdx\n\
         mov edx, ecx\nshr edx, 12\nand edx, {sets} - 1\nshl rdx, 5\nadd rdx, gs:[{second}]\n\
         cmp [rdx], rax\njne 9f\n\
         mov rax, [rdx + 16]\nadd rax, gs:[{memory}]\nadd rax, rcx"
    };
}

/// The descriptor of the selector in ECX, which is in the GDT and not null, into RBP; else goes to 9. Uses RAX, RCX, RDX.
macro_rules! descriptor {
    () => {
        concat!(
            "test ecx, 4\njne 9f\nand ecx, 0xfff8\nje 9f\n\
             lea edx, [rcx + 7]\ncmp edx, gs:[{limit}]\nja 9f\n\
             add rcx, gs:[{base}]\nmov edx, ecx\nand edx, 4095\ncmp edx, 4096 - 8\nja 9f\n",
            find_page!(),
            "\nmov rbp, [rax]"
        )
    };
}

global_asm!(
    // Behind the call that came here stands the number of the site. R14, R15 and flags are free.
    ".globl trellis_bt_iret",
    "trellis_bt_iret:",
    "push rax\npush rcx\npush rdx\npush rbx\npush rsi\npush rdi\npush rbp",
    // IF may be about to be cleared: the interpreter looks first (INV-BT-4).
    "test dword ptr gs:[{sysflags}], {nt} | {if_}\njne 9f",
    // The stack, at level 0.
    "mov rcx, r13\nmov edx, ecx\nand edx, 4095\ncmp edx, 4096 - 40\nja 9f",
    find_page!(),
    "mov r14, [rax]\nmovzx esi, word ptr [rax + 8]\nmov rbx, [rax + 16]\nmov r15, [rax + 24]\nmovzx edi, word ptr [rax + 32]",
    "test rbx, {odd}\njne 9f",
    // The level may be returned to, by what `state::fill` found; with AC only level 0.
    "mov eax, esi\nand eax, 3\nmov edx, gs:[{allowed}]\nbt edx, eax\njnc 9f",
    "test eax, eax\nje 2f\ntest ebx, {ac}\njne 9f\n2:",
    // CS: present, 64-bit, not conforming, accessed, of the level that the selector asks for.
    "mov ecx, esi",
    descriptor!(),
    "mov rax, rbp\nshr rax, 40\nand eax, 0x60fd",
    "mov edx, esi\nand edx, 3\nshl edx, 5\nor edx, 0x2099\ncmp eax, edx\njne 9f",
    "mov gs:[{temp}], rbp",
    // SS: null at level 0, else present, writable, accessed, of the same level.
    "mov eax, edi\nxor eax, esi\ntest eax, 3\njne 9f",
    "xor ebp, ebp\nmov eax, edi\nor eax, esi\ntest eax, 3\njne 3f\ntest edi, edi\nje 4f\n3:",
    "mov ecx, edi",
    descriptor!(),
    "mov rax, rbp\nshr rax, 40\nand eax, 0xfb",
    "mov edx, esi\nand edx, 3\nshl edx, 5\nor edx, 0x93\ncmp eax, edx\njne 9f",
    "4:\nmov rax, r14\nshl rax, 16\nsar rax, 16\ncmp rax, r14\njne 9f",
    // Nothing can fail any more.
    "mov r13, r15",
    "mov rax, gs:[{temp}]\nmov gs:[{descriptors}], rax\nmov gs:[{descriptors} + 8], rbp",
    "mov gs:[{selectors} + 4], esi\nmov gs:[{selectors} + 8], edi",
    "mov dword ptr gs:[{mode}], {mode_iret}",
    "mov eax, ebx\nand eax, {if_} | {ac} | {id}\nor eax, 2\nmov gs:[{sysflags}], rax",
    "mov eax, ebx\nand eax, 0xd5\nshl eax, 8\nmov ecx, ebx\nshr ecx, 11\nand ecx, 1\nor eax, ecx\nmov gs:[{flags}], ax",
    // INV-BT-4: a signal may have waited for IF.
    "test ebx, {if_}\nje 5f",
    "mov rax, gs:[{signals}]\ncmp dword ptr [rax], 0\nje 5f\nmov dword ptr gs:[{alarm}], 1\n5:",
    // Which rights: the displacement of the variant's jump cache, into EAX.
    "test esi, 3\njne 6f",
    "xor eax, eax\ntest ebx, {ac}\nje 7f\ntest dword ptr gs:[{allowed}], {smap}\nje 7f\nmov eax, {stride}\njmp 7f",
    "6:\nmov eax, 2 * {stride}\n7:",
    "cmp dword ptr gs:[{alarm}], 0\njne 8f",
    "mov rcx, r14\nror rcx, 10\nxor ecx, r14d\nand ecx, {mask}\nlea ecx, [rcx*8 + rax]",
    "cmp gs:[rcx + {jumps}], r14\njne 8f",
    "mov r15, gs:[rcx + {jumps} + {hosts}]",
    "pop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax\nmov rsp, gs:[{pairs}]",
    "jmp r15",
    // By the second level, or out of the cache. No site is to blame if the target is bad: it is canonical.
    "8:\nmov dword ptr gs:[{site}], -1\nmov r15d, eax",
    "pop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax\nmov rsp, gs:[{pairs}]",
    "cmp r15d, {stride}\njb trellis_bt_lookup_0_at\nje trellis_bt_lookup_1_at\njmp trellis_bt_lookup_2_at",
    "9:\npop rbp\npop rdi\npop rsi\npop rbx\npop rdx\npop rcx\npop rax",
    "jmp trellis_bt_callout",
    pairs = const frame::PAIRS,
    context = const frame::CONTEXT,
    sets = const SETS,
    second = const frame::SECOND_TLB,
    memory = const frame::MEMORY,
    limit = const frame::GDT_LIMIT,
    base = const frame::GDT_BASE,
    sysflags = const frame::SYSFLAGS,
    nt = const 1 << 14,
    if_ = const 1 << 9,
    ac = const frame::AC,
    id = const 1 << 21,
    // All but CF, 1, PF, AF, ZF, SF, IF, OF, RF, AC, ID.
    odd = const !0x0025_0ad7_i32,
    allowed = const frame::IRET_ALLOWED,
    smap = const frame::IRET_SMAP,
    temp = const frame::TEMP,
    descriptors = const frame::IRET_DESCRIPTORS,
    selectors = const frame::SELECTORS,
    mode = const frame::MODE,
    mode_iret = const frame::MODE_IRET,
    flags = const frame::FLAGS,
    signals = const frame::SIGNALS,
    alarm = const frame::ALARM,
    site = const frame::SITE,
    stride = const frame::JUMP_STRIDE,
    mask = const frame::JUMP_MASK,
    jumps = const frame::JUMPS,
    hosts = const frame::JUMP_HOSTS,
);

unsafe extern "C" {
    fn trellis_bt_iret();
}

/// Address of the code that fragments call for IRETQ.
pub fn address() -> u64 {
    trellis_bt_iret as *const () as u64
}
