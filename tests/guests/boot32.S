# Entry of the multiboot 1 test kernel, its interrupt stubs and the way into real mode and back.
# -DAOUT: header with load addresses ("a.out kludge") for a flat binary; -DFLAGS=n: other header flags.
#ifndef FLAGS
#define FLAGS 3
#endif
#ifdef AOUT
#define ALLFLAGS (FLAGS | 0x10000)
#else
#define ALLFLAGS FLAGS
#endif
    .section .text.start, "ax"
    .code32
    .globl _start
_start:
    jmp 1f
    .align 4
header:
    .long 0x1badb002, ALLFLAGS, -(0x1badb002 + ALLFLAGS)
#ifdef AOUT
    .long header, load_start, load_end, bss_end, _start
#endif
1:  cli
    cld
    mov $stack_top, %esp
    push $0
    popf
    push %ebx
    push %eax
    lgdt gdt_descriptor
    ljmp $8, $2f
2:  mov $16, %cx
    mov %cx, %ds
    mov %cx, %es
    mov %cx, %ss
    mov %cx, %fs
    mov %cx, %gs
    call kernel_main
3:  hlt
    jmp 3b

# Interrupt stubs: 256 of 16 bytes; push a zero where the CPU gives no error code.
    .text
    .globl stubs
    .align 16
stubs:
    .set v, 0
    .rept 256
    .align 16
    .if !((v == 8) || (v >= 10 && v <= 14) || v == 17 || v == 21 || v == 29 || v == 30)
    push $0
    .endif
    push $v
    jmp common
    .set v, v + 1
    .endr
common:
    pusha
    push %ds
    push %es
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    push %esp
    cld
    call interrupt
    add $4, %esp
    pop %es
    pop %ds
    popa
    add $8, %esp
    iret

# void task_b_entry: the second task of the hardware task switch.
    .globl task_b_entry
task_b_entry:
    incl task_b_runs
    iret                    # nested task: back to the first
    jmp task_b_entry

# void real_mode(struct real_regs *r): interrupt r->vector in real mode with r's registers.
# The code runs from a copy at 0x7000.
    .globl real_mode
real_mode:
    pusha
    mov 36(%esp), %esi
    mov %esi, real_arg
    mov %esp, real_esp
    sidt real_idt
    mov $real_start, %esi
    mov $0x7000, %edi
    mov $(real_end - real_start), %ecx
    rep movsb
    mov real_arg, %esi
    mov (%esi), %eax          # vector
    mov %al, 0x7000 + (real_vector - real_start)
    mov 4(%esi), %eax
    mov 8(%esi), %ebx
    mov 12(%esi), %ecx
    mov 16(%esi), %edx
    ljmp $24, $0x7000
real_return:
    mov $16, %si
    mov %si, %ds
    mov %si, %es
    mov %si, %ss
    mov %si, %fs
    mov %si, %gs
    mov real_esp, %esp
    lidt real_idt
    mov real_arg, %esi
    mov %eax, 4(%esi)
    mov %ebx, 8(%esi)
    mov %ecx, 12(%esi)
    mov %edx, 16(%esi)
    mov 0x7000 + (real_flags - real_start), %eax
    mov %eax, 20(%esi)
    popa
    ret
    .code16
real_start:
    mov $32, %si
    mov %si, %ds
    mov %si, %es
    mov %si, %ss
    mov %si, %fs
    mov %si, %gs
    lidtl %cs:(0x7000 + (real_ivt - real_start))
    mov %cr0, %esi
    and $~1, %esi
    mov %esi, %cr0
    ljmp $0, $(0x7000 + (1f - real_start))
1:  xor %si, %si
    mov %si, %ds
    mov %si, %es
    mov %si, %ss
    mov $0x6ff0, %sp
    sti
    .byte 0xcd
real_vector:
    .byte 0
    pushfl
    popl %cs:(0x7000 + (real_flags - real_start))
    cli
    mov %cr0, %esi
    or $1, %esi
    mov %esi, %cr0
    ljmpl $8, $real_return
    .align 4
real_ivt:
    .word 0x3ff
    .long 0
    .align 4
real_flags:
    .long 0
real_end:
    .code32

    .data
    .globl gdt
    .align 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff  # 8 code
    .quad 0x00cf92000000ffff  # 16 data
    .quad 0x00009a000000ffff  # 24 16-bit code
    .quad 0x000092000000ffff  # 32 16-bit data
    .quad 0, 0                # 40, 48: task states
gdt_end:
gdt_descriptor:
    .word gdt_end - gdt - 1
    .long gdt
real_arg: .long 0
real_esp: .long 0
real_idt: .quad 0
    .bss
    .align 16
    .skip 16384
stack_top:
    .section .note.GNU-stack, "", @progbits
