//! From the loader to Rust: multiboot 1 and PVH entries, own GDT, identity page tables, long mode.
//!
//! Both protocols enter in 32-bit protected mode with flat segments, paging off and interrupts off
//! (multiboot 0.6.96 3.2; Xen `docs/misc/pvh.pandoc`). The memory map built here:
//!
//! | VA | PA | rights |
//! |---|---|---|
//! | 0 .. 1 GiB | same | supervisor, 2 MiB pages |
//! | 1 GiB .. 2 GiB | 0 .. 1 GiB | user: the alias under which CPL 3 code and data run |
//! | 2 GiB .. 4 GiB | same | supervisor, uncached (device memory) |

use core::arch::global_asm;

global_asm!(
    r#"
.section .multiboot, "a"
.balign 4
mb_header:
    .long 0x1BADB002
    .long 0x00010002
    .long -(0x1BADB002 + 0x00010002)
    .long mb_header
    .long __image_start
    .long __load_end
    .long __bss_end
    .long mb_entry

.section .note.Xen, "a", @note
.balign 4
    .long 4
    .long 8
    .long 18
    .asciz "Xen"
    .quad pvh_entry

.section .text.boot, "ax"
.code32
.global mb_entry
mb_entry:
    mov dword ptr [BOOT_KIND], 1
    jmp 2f
.global pvh_entry
pvh_entry:
    mov dword ptr [BOOT_KIND], 2
2:
    cli
    cld
    mov dword ptr [BOOT_INFO], ebx
    lgdt [GDT_POINTER]
    .byte 0xea
    .long 3f
    .short 0x38
3:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset BOOT_STACK + 0x10000

    /* PML4[0] -> PDPT, PDPT[0..4] -> PD0..PD3 */
    mov eax, offset BOOT_PDPT
    or eax, 7
    mov dword ptr [BOOT_PML4], eax
    mov eax, offset BOOT_PD
    or eax, 7
    mov edi, offset BOOT_PDPT
    mov ecx, 4
4:  mov dword ptr [edi], eax
    add eax, 0x1000
    add edi, 8
    dec ecx
    jnz 4b
    /* 2048 entries of 2 MiB */
    mov edi, offset BOOT_PD
    xor ecx, ecx
5:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    cmp ecx, 512
    jb 7f
    cmp ecx, 1024
    jae 6f
    and eax, 0x3fffffff
    or eax, 4
    jmp 7f
6:  or eax, 0x18
7:  mov dword ptr [edi], eax
    add edi, 8
    inc ecx
    cmp ecx, 2048
    jb 5b

    mov eax, 0x620          /* PAE, OSFXSR, OSXMMEXCPT */
    mov cr4, eax
    mov eax, offset BOOT_PML4
    mov cr3, eax
    mov eax, 0x80000001
    cpuid
    mov ebx, edx
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x101           /* LME, SCE */
    bt ebx, 20
    jnc 8f
    or eax, 0x800           /* NXE */
8:  wrmsr
    mov eax, 0x80010033     /* PG, WP, NE, ET, MP, PE */
    mov cr0, eax
    .byte 0xea
    .long 9f
    .short 0x08
.code64
9:
    mov rsp, offset BOOT_STACK + 0x10000
    xor ebp, ebp
    call guest_main
22: cli
    hlt
    jmp 22b
"#
);

/// Boot protocol: 1 multiboot, 2 PVH.
#[unsafe(no_mangle)]
static mut BOOT_KIND: u32 = 0;
/// Physical address of the loader's information structure.
#[unsafe(no_mangle)]
static mut BOOT_INFO: u32 = 0;

use crate::mem::Page;
/// The root of the boot address space.
#[unsafe(no_mangle)]
pub static mut BOOT_PML4: Page = Page::ZERO;
#[unsafe(no_mangle)]
static mut BOOT_PDPT: Page = Page::ZERO;
#[unsafe(no_mangle)]
static mut BOOT_PD: [Page; 4] = [Page::ZERO; 4];
#[unsafe(no_mangle)]
static mut BOOT_STACK: [Page; 16] = [Page::ZERO; 16];

static mut CMDLINE: [u8; 1024] = [0; 1024];
static mut CMDLINE_LEN: usize = 0;
static mut RSDP_HINT: u64 = 0;

/// Copies what is needed of the loader's structures (the tests overwrite low memory).
pub fn read_info() {
    unsafe {
        let info = u64::from(BOOT_INFO);
        let cmd = match BOOT_KIND {
            1 => {
                let flags = (info as *const u32).read_unaligned();
                if flags & 4 != 0 { u64::from(((info + 16) as *const u32).read_unaligned()) } else { 0 }
            }
            2 if (info as *const u32).read_unaligned() == 0x336e_c578 => {
                RSDP_HINT = ((info + 32) as *const u64).read_unaligned();
                ((info + 24) as *const u64).read_unaligned()
            }
            _ => 0,
        };
        if cmd != 0 {
            let dst = (&raw mut CMDLINE).cast::<u8>();
            while CMDLINE_LEN < 1023 {
                let b = (cmd as *const u8).add(CMDLINE_LEN).read_volatile();
                if b == 0 {
                    break;
                }
                dst.add(CMDLINE_LEN).write(b);
                CMDLINE_LEN += 1;
            }
        }
    }
}

/// The command line, empty if there is none.
pub fn cmdline() -> &'static str {
    unsafe {
        let bytes = core::slice::from_raw_parts((&raw const CMDLINE).cast::<u8>(), CMDLINE_LEN);
        core::str::from_utf8(bytes).unwrap_or("")
    }
}

/// The word after `key=` on the command line, if there is one.
pub fn option(key: &str) -> Option<&'static str> {
    let word = |w: &'static str| w.strip_prefix(key)?.strip_prefix('=').filter(|value| !value.is_empty());
    cmdline().split_ascii_whitespace().find_map(word)
}

/// Name of the boot protocol.
pub fn protocol() -> &'static str {
    match unsafe { BOOT_KIND } {
        1 => "multiboot",
        _ => "pvh",
    }
}

/// The RSDP address that PVH passed, or 0.
pub fn rsdp_hint() -> u64 {
    unsafe { RSDP_HINT }
}
