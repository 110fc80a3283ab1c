# A 64-bit kernel that a multiboot 1 loader enters in 32-bit mode: it sets up long mode itself, tries what 64-bit
# systems rely on (2 MiB pages, page faults, SYSCALL and SYSRET, IST, compatibility mode, CPUID, the TSC), and comes
# back to real mode and to long mode again. One character a step on COM1: "0123456789ABC", then OK.
    .set CODE32, 8
    .set CODE64, 16
    .set DATA, 24
    .set USER32, 32
    .set USERDATA, 40
    .set USER64, 48
    .set CODE16, 56
    .set DATA16, 64
    .set TSS, 72
    .macro step c
    mov $0x3f8, %dx
    mov $\c, %al
    out %al, %dx
    .endm

    .section .text.start, "ax"
    .code32
    .align 4
header:
    .long 0x1badb002, 2, -(0x1badb002 + 2)
    .globl _start
_start:
    cli
    cld
    cmp $0x2badb002, %eax
    jne fail32
    mov $stack_top, %esp
    step 0x30
    # Page tables: 1 GiB of 2 MiB pages, identity and at the top of the address space; user pages from 512 MiB on.
    mov $pml4, %edi
    movl $pdpt + 7, (%edi)
    movl $pdpt + 7, 511*8(%edi)
    movl $pd + 7, pdpt
    movl $pd + 7, pdpt + 510*8
    mov $pd, %edi
    mov $0x83, %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    mov %edi, %ebx
    add $8, %edi
    add $0x200000, %eax
    cmp $0x600083, %eax
    jne 2f
    or $4, %eax               # 6 MiB to 8 MiB: user
2:  test $4, %eax
    jz 3f
    cmp $0x800087, %eax
    jne 3f
    and $~4, %eax
3:  loop 1b
    movl $0, pd + 256*8       # a hole at 512 MiB
    # Every exception leads to one handler, on IST 1.
    mov $idt, %edi
    mov $exception, %eax
    mov $32, %ecx
4:  mov %ax, (%edi)
    movw $CODE64, 2(%edi)
    movw $0x8e01, 4(%edi)
    mov %eax, %ebx
    shr $16, %ebx
    mov %bx, 6(%edi)
    add $16, %edi
    loop 4b
    movl $ist_top, 0x5000 + 36
    lgdt gdt_descriptor
    step 0x31
    call enter_long
    .code64
    step 0x32
    # High half.
    mov $high, %rax
    mov $0xffffffff80000000, %rcx
    add %rcx, %rax
    jmp *%rax
high:
    lidt idt_descriptor(%rip)
    mov $TSS, %ax
    ltr %ax
    step 0x33
    # A page fault on its own stack (IST 1), with the right CR2 and error code.
    movq $resume_pf, resume
    mov $0x20000123, %rax
    movb $1, (%rax)           # (QEMU takes INC for a read)
resume_pf:
    cmpq $2, last_error
    jne fail
    mov $0x20000123, %rax
    cmp %rax, last_cr2
    jne fail
    mov ist_used, %rax
    test %rax, %rax
    jz fail
    step 0x34
    # A non-canonical address: #GP(0).
    movq $resume_gp, resume
    movq $-1, last_error
    mov $0x800000000000, %rax
    mov (%rax), %rbx
resume_gp:
    cmpq $0, last_error
    jne fail
    step 0x35
    # SYSCALL and SYSRET: user code at 6 MiB.
    mov $user_code, %rsi
    mov $0x600000, %rdi
    mov $(user_end - user_code), %ecx
    rep movsb
    mov $0xc0000080, %ecx
    rdmsr
    or $1, %eax
    wrmsr
    mov $0xc0000081, %ecx     # STAR: SYSCALL CS 16, SYSRET base 32
    xor %eax, %eax
    mov $(32 << 16 | 16), %edx
    wrmsr
    mov $0xc0000082, %ecx     # LSTAR
    mov $syscall_entry, %rax
    mov %rax, %rdx
    shr $32, %rdx
    wrmsr
    mov $0xc0000084, %ecx     # SFMASK: IF
    mov $0x200, %eax
    xor %edx, %edx
    wrmsr
    mov $0x600000, %ecx
    mov $0x202, %r11d
    mov %rsp, saved_rsp
    mov $0x7ff000, %rsp
    sysretq
back:
    mov saved_rsp, %rsp
    cmp $0x55aa, %rbx
    jne fail
    step 0x36
    # Compatibility mode in ring 0: far return to 32-bit code and back.
    pushq $CODE32
    pushq $compat
    lretq
    .code32
compat:
    mov $0x11223344, %eax
    shl $4, %eax
    ljmp $CODE64, $compat_back
    .code64
compat_back:
    cmp $0x12233440, %rax
    jne fail
    step 0x37
    # RIP-relative, MOVABS, 64-bit push and pop, BSWAP, CMPXCHG16B (if there).
    mov $1, %eax
    cpuid
    bt $13, %ecx
    jnc 1f
    mov $1, %rbx
    mov $2, %rcx
    movq $0, pair
    movq $0, pair + 8
    xor %eax, %eax
    xor %edx, %edx
    lock cmpxchg16b pair
    jne fail
    cmpq $2, pair + 8
    jne fail
1:
    step 0x38
    # The TSC grows; RDTSC at both ends of 10 ms by the PIT.
    rdtsc
    shl $32, %rdx
    or %rax, %rdx
    mov %rdx, %rbx
    in $0x61, %al
    and $0xfc, %al
    or $1, %al
    out %al, $0x61
    mov $0xb0, %al
    out %al, $0x43
    mov $0x9c, %al
    out %al, $0x42
    mov $0x2e, %al
    out %al, $0x42
1:  in $0x61, %al
    test $0x20, %al
    jz 1b
    rdtsc
    shl $32, %rdx
    or %rax, %rdx
    sub %rbx, %rdx
    cmp $5000000, %rdx        # more than 500 MHz
    jb fail
    step 0x39
    # Leave long mode for real mode, call INT 12H there, come back.
    call leave_long
    .code64
    cmpw $600, memory_kib
    jb fail
    step 0x41
    # Once more: long mode is not a one-way street.
    call leave_long
    step 0x42
    # A double fault through a bad stack reaches its IST.
    movq $resume_df, resume
    mov $0x20000100, %rsp
    movq $0, idt + 14*16      # no handler for #PF: the fault on the push becomes #DF
    push %rax
resume_df:
    mov $stack_top, %rsp
    step 0x43
    mov $'\n', %al
    out %al, %dx
    mov $'O', %al
    out %al, %dx
    mov $'K', %al
    out %al, %dx
    mov $'\n', %al
    out %al, %dx
end:
    mov $0x604, %dx
    mov $0x2000, %ax
    out %ax, %dx
1:  cli
    hlt
    jmp 1b
fail:
    mov $0x3f8, %dx
    mov $'!', %al
    out %al, %dx
    jmp end
    .code32
fail32:
    mov $0x3f8, %dx
    mov $'?', %al
    out %al, %dx
    hlt
    jmp fail32

# Called in 32-bit mode without paging, returns in 64-bit mode.
enter_long:
    pop %ebp
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80010001, %eax
    mov %eax, %cr0
    ljmp $CODE64, $1f
    .code64
1:  mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %ebp, %ebp
    jmp *%rbp

# Called in 64-bit mode: to real mode, INT 12H, and back.
leave_long:
    pop %r15
    mov %r15, return_to
    mov %rsp, saved_rsp
    mov $real, %esi
    mov $0x7000, %edi
    mov $(real_end - real), %ecx
    rep movsb
    pushq $CODE32
    pushq $1f
    lretq
    .code32
1:  mov %cr0, %eax
    and $0x7fffffff, %eax
    mov %eax, %cr0
    mov $0xc0000080, %ecx
    rdmsr
    and $~0x100, %eax
    wrmsr
    mov %cr4, %eax
    and $~0x20, %eax
    mov %eax, %cr4
    lidt real_idt
    ljmp $CODE16, $0x7000
    .code16
real:
    mov $DATA16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %cr0, %eax
    and $~1, %al
    mov %eax, %cr0
    ljmp $0, $(0x7000 + 1f - real)
1:  xor %ax, %ax
    mov %ax, %ss
    mov %ax, %ds
    mov $0x6ff0, %sp
    int $0x12
    mov %ax, %bx
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $CODE32, $real_back
real_end:
    .code32
real_back:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %bx, memory_kib
    mov $stack_top, %esp
    call enter_long
    .code64
    lidt idt_descriptor
    mov saved_rsp, %rsp
    jmp *return_to

# User code: two calls of the kernel, the second does not return.
user_code:
    xor %eax, %eax
    syscall
    cmp $77, %rax
    jne 1f
    mov $0x55aa, %ebx
1:  mov $1, %eax
    syscall
    ud2
user_end:

syscall_entry:
    test %eax, %eax
    jnz back
    mov $77, %eax
    sysretq

exception:                    # rdi below: error code on the stack, then the frame
    pop last_error
    mov %cr2, %rax
    mov %rax, last_cr2
    lea ist_top(%rip), %rax
    sub %rsp, %rax
    cmp $64, %rax
    ja 1f
    movq $1, ist_used
1:  mov resume, %rax
    mov %rax, (%rsp)
    iretq

    .data
    .align 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff  # 8 code 32
    .quad 0x00af9a000000ffff  # 16 code 64
    .quad 0x00cf92000000ffff  # 24 data (SYSCALL's SS)
    .quad 0x00cffa000000ffff  # 32 user code 32
    .quad 0x00cff2000000ffff  # 40 user data
    .quad 0x00affa000000ffff  # 48 user code 64
    .quad 0x00009a000000ffff  # 56 code 16
    .quad 0x000092000000ffff  # 64 data 16
    .word 103, 0x5000         # 72 TSS at 0x5000
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_descriptor:
    .word gdt_end - gdt - 1
    .quad gdt
real_idt:
    .word 0x3ff
    .long 0
idt_descriptor:
    .word idt_end - idt - 1
    .quad idt
    .align 16
idt:
    .skip 32 * 16
idt_end:
    .align 16
pair: .quad 0, 0
resume: .quad 0
last_error: .quad 0
last_cr2: .quad 0
ist_used: .quad 0
saved_rsp: .quad 0
return_to: .quad 0
memory_kib: .word 0
    .bss
    .align 4096
pml4: .skip 4096
pdpt: .skip 4096
pd: .skip 4096
    .skip 4096
ist_top:
    .skip 4096
stack_top:
    .section .note.GNU-stack, "", @progbits
