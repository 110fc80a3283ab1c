//! What a C library would bring: the entry point, memory functions, the panic handler.

use crate::sys;

// The stack holds argc, argv[0], …; `start` gets its address. The memory functions copy 16 bytes a step, so that a
// benchmark measures loads and stores here and string instructions only where it says so.
core::arch::global_asm!(
    r#"
.section .text
.global _start
.global memcpy
.global memmove
.global memset
.global memcmp
.global bcmp
.global strlen
.global rust_eh_personality
_start:
    xor ebp, ebp
    mov rdi, rsp
    and rsp, -16
    call {start}
    ud2
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jae memcpy
    mov rax, rdi
2:  test rdx, rdx
    je 3f
    dec rdx
    movzx ecx, byte ptr [rsi + rdx]
    mov byte ptr [rdi + rdx], cl
    jmp 2b
3:  ret
memcpy:
    mov rax, rdi
    cmp rdx, 16
    jb 3f
2:  movups xmm0, [rsi]
    movups [rdi], xmm0
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    cmp rdx, 16
    jae 2b
3:  test rdx, rdx
    je 5f
4:  movzx ecx, byte ptr [rsi]
    mov byte ptr [rdi], cl
    inc rsi
    inc rdi
    dec rdx
    jne 4b
5:  ret
memset:
    mov rax, rdi
    movzx ecx, sil
    movabs r8, 0x0101010101010101
    imul rcx, r8
    movq xmm0, rcx
    punpcklqdq xmm0, xmm0
    cmp rdx, 16
    jb 3f
2:  movups [rdi], xmm0
    add rdi, 16
    sub rdx, 16
    cmp rdx, 16
    jae 2b
3:  test rdx, rdx
    je 5f
4:  mov byte ptr [rdi], cl
    inc rdi
    dec rdx
    jne 4b
5:  ret
memcmp:
bcmp:
    xor ecx, ecx
2:  cmp rcx, rdx
    je 3f
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    je 2b
    ret
3:  xor eax, eax
    ret
strlen:
    xor eax, eax
2:  cmp byte ptr [rdi + rax], 0
    je 3f
    inc rax
    jmp 2b
3:  ret
rust_eh_personality:
    ud2
"#,
    start = sym crate::start
);

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    crate::output::line(format_args!("ERR panic at line {}", info.location().map_or(0, |at| at.line())));
    sys::exit(101)
}
