//! Leaving long mode: 32-bit protected mode with any paging, virtual-8086 mode and real mode, and back.
//!
//! A [`Legacy`] context is entered by IRETD (or, in real mode, IRET); it ends with the first exception or
//! INT that is not marked to resume, and the machine returns to long mode as it was. Low memory used:
//! 6000H stack and parameters, 7000H real-mode handlers, 9000H the snippet under test.

use crate::desc;
use crate::mem::{self, rd32, wr32};
use crate::traps::{self, Code};
use core::arch::global_asm;

global_asm!(
    r#"
.section .text
.code64
.global legacy_enter
legacy_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    cli
    mov [rip + LG_RSP], rsp
    mov [rip + LG_CTX], rdi
    mov rax, cr0
    mov [rip + LG_CR0], eax
    mov rax, cr3
    mov [rip + LG_CR3], eax
    mov rax, cr4
    mov [rip + LG_CR4], eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffbff
    mov [rip + LG_EFER], eax
    push 0x38
    lea rax, [rip + 2f]
    push rax
    .byte 0x48, 0xcb
.code32
2:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    mov ebx, dword ptr [LG_CTX]
    mov eax, dword ptr [ebx + 8]
    mov cr4, eax
    mov eax, dword ptr [ebx + 4]
    mov cr3, eax
    mov eax, dword ptr [ebx]
    mov cr0, eax
    jmp 3f
3:  cmp dword ptr [ebx + 12], 0
    jne 6f
    lidt [LG_IDTR32]
    and byte ptr [GDT + 0x60 + 5], 0xfd
    mov eax, 0x60
    ltr ax
    test dword ptr [ebx + 52], 0x20000
    jnz 5f
    test byte ptr [ebx + 48], 3
    jnz 4f
    mov eax, dword ptr [ebx + 60]
    mov ecx, dword ptr [ebx + 56]
    mov ss, eax
    mov esp, ecx
    jmp 9f
4:  mov esp, offset LG_STACK + 0x2000
    push dword ptr [ebx + 60]
    push dword ptr [ebx + 56]
    jmp 9f
5:  mov esp, offset LG_STACK + 0x2000
    push dword ptr [ebx + 76]
    push dword ptr [ebx + 72]
    push dword ptr [ebx + 64]
    push dword ptr [ebx + 68]
    push dword ptr [ebx + 60]
    push dword ptr [ebx + 56]
9:  push dword ptr [ebx + 52]
    push dword ptr [ebx + 48]
    push dword ptr [ebx + 44]
    test dword ptr [ebx + 52], 0x20000
    jnz 7f
    mov eax, dword ptr [ebx + 68]
    mov es, eax
    mov eax, dword ptr [ebx + 72]
    mov fs, eax
    mov eax, dword ptr [ebx + 76]
    mov gs, eax
7:  mov edi, dword ptr [ebx + 16]
    mov esi, dword ptr [ebx + 20]
    mov ebp, dword ptr [ebx + 24]
    mov edx, dword ptr [ebx + 32]
    mov ecx, dword ptr [ebx + 36]
    test dword ptr [ebx + 52], 0x20000
    jnz 8f
    push dword ptr [ebx + 64]
    mov eax, dword ptr [ebx + 40]
    mov ebx, dword ptr [ebx + 28]
    .byte 0x1f
    iretd
8:  mov eax, dword ptr [ebx + 40]
    mov ebx, dword ptr [ebx + 28]
    iretd
6:  lidt [LG_IVTR]
    .byte 0xea
    .long 0x7000
    .short 0x40

.balign 16
.global legacy_stubs
legacy_stubs:
.set vec, 0
.rept 256
    .balign 16
    .if (vec == 8) || (vec >= 10 && vec <= 14) || (vec == 17) || (vec == 21) || (vec == 29) || (vec == 30)
    .else
    .byte 0x6a, 0
    .endif
    .byte 0x68
    .long vec
    jmp legacy_common
    .set vec, vec + 1
.endr

legacy_common:
    pushad
    .byte 0x1e
    .byte 0x06
    .byte 0x0f, 0xa0
    .byte 0x0f, 0xa8
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    cld
    mov ebx, dword ptr [esp + 48]
    movzx eax, byte ptr [TRAP_MODE + ebx]
    test eax, eax
    jz 5f
    inc dword ptr [TRAP_COUNT + ebx*4]
    mov ecx, eax
    test cl, 2
    jz 2f
    mov al, 0x20
    out 0x20, al
2:  test cl, 8
    jz 3f
    mov dword ptr [0xfee000b0], 0
3:  test cl, 64
    jz 4f
    and dword ptr [esp + 64], 0xfffffeff
4:  pop gs
    .byte 0x0f, 0xa1
    .byte 0x07
    .byte 0x1f
    popad
    add esp, 8
    iretd
5:  mov esi, esp
    mov edi, offset LG_OUT
    mov ecx, 26
    rep movsd
    mov eax, cr2
    stosd
    str eax
    stosd
    mov eax, ss
    stosd
    mov eax, cr3
    stosd
    lea eax, [esp + 56]
    stosd
    sldt eax
    stosd

legacy_back:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset LG_STACK + 0x2000
    mov eax, cr0
    and eax, 0x7ffffff3
    mov cr0, eax
    mov eax, dword ptr [LG_CR4]
    mov cr4, eax
    mov eax, dword ptr [LG_CR3]
    mov cr3, eax
    mov ecx, 0xc0000080
    xor edx, edx
    mov eax, dword ptr [LG_EFER]
    wrmsr
    mov eax, dword ptr [LG_CR0]
    mov cr0, eax
    .byte 0xea
    .long 2f
    .short 0x08
.code64
2:  lgdt [rip + GDT_POINTER]
    lidt [rip + LG_IDTR64]
    and byte ptr [rip + GDT + 0x50 + 5], 0xfd
    mov eax, 0x50
    ltr ax
    xor eax, eax
    lldt ax
    mov rsp, [rip + LG_RSP]
    mov eax, 0x10
    mov ss, eax
    mov eax, 0x23
    mov ds, eax
    mov es, eax
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

/* Copied to 7000H. Entered in 16-bit protected mode with base 0. */
.code16
.balign 16
.global real_start
real_start:
    mov eax, 0x48
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov gs, eax
    mov fs, eax
    cmp word ptr [0x680c], 2
    jne 2f
    mov eax, 0x10
    mov fs, eax
2:  mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    .byte 0xea
    .short 0x7000 + 3f - real_start
    .short 0
3:  xor eax, eax
    mov ds, eax
    mov gs, eax
    mov ax, word ptr [0x683c]
    mov ss, eax
    movzx esp, word ptr [0x6838]
    push word ptr [0x6834]
    push word ptr [0x6830]
    push word ptr [0x682c]
    mov ax, word ptr [0x6844]
    mov es, eax
    cmp word ptr [0x680c], 2
    je 4f
    mov ax, word ptr [0x6848]
    mov fs, eax
    mov ax, word ptr [0x684c]
    mov gs, eax
4:  mov edi, dword ptr [0x6810]
    mov esi, dword ptr [0x6814]
    mov ebp, dword ptr [0x6818]
    mov ebx, dword ptr [0x681c]
    mov edx, dword ptr [0x6820]
    mov ecx, dword ptr [0x6824]
    push word ptr [0x6840]
    mov eax, dword ptr [0x6828]
    pop ds
    iret
real_common:
    pushad
    push ds
    push es
    push fs
    push gs
    cld
    xor eax, eax
    mov ds, eax
    movzx ebp, sp
    movzx ebx, word ptr [ebp + 40]
    cmp byte ptr [ebx + 0x6a00], 0
    jne 2f
    mov dword ptr [0x6c00], ebp
    mov word ptr [0x6c04], ss
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long real_back
    .short 0x38
2:  inc word ptr [0x6c08]
    mov al, 0x20
    out 0x20, al
    pop gs
    pop fs
    pop es
    pop ds
    popad
    add sp, 2
    iret
.balign 8
.global real_stubs
real_stubs:
.set vec, 0
.rept 256
    .balign 8
    .byte 0x68
    .short vec
    .byte 0xe9
    .short real_common - (. + 2)
    .set vec, vec + 1
.endr
.global real_end
real_end:

.code32
real_back:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    movzx esi, word ptr [0x6c04]
    shl esi, 4
    add esi, dword ptr [0x6c00]
    mov edi, offset LG_OUT
    mov ecx, 12
    rep movsd
    jmp legacy_back
.code64
"#
);

unsafe extern "C" {
    fn legacy_enter(ctx: *const Legacy);
    static legacy_stubs: u8;
    static real_start: u8;
    static real_stubs: u8;
    static real_end: u8;
}

#[unsafe(no_mangle)]
static mut LG_RSP: u64 = 0;
#[unsafe(no_mangle)]
static mut LG_CTX: u64 = 0;
#[unsafe(no_mangle)]
static mut LG_CR0: u32 = 0;
#[unsafe(no_mangle)]
static mut LG_CR3: u32 = 0;
#[unsafe(no_mangle)]
static mut LG_CR4: u32 = 0;
#[unsafe(no_mangle)]
static mut LG_EFER: u32 = 0;
#[unsafe(no_mangle)]
static mut LG_OUT: [u32; 40] = [0; 40];
#[repr(C, align(4096))]
struct Bytes<const N: usize>([u8; N]);
#[unsafe(no_mangle)]
static mut LG_STACK: Bytes<8192> = Bytes([0; 8192]);
static mut STACK0: Bytes<8192> = Bytes([0; 8192]);
static mut STACK3: Bytes<8192> = Bytes([0; 8192]);
static mut IDT32: Bytes<4096> = Bytes([0; 4096]);
static mut TSS: Bytes<8448> = Bytes([0; 8448]);

global_asm!(
    ".section .data",
    ".balign 8",
    ".global LG_IDTR32, LG_IDTR64, LG_IVTR",
    "LG_IDTR32: .short 2047",
    ".quad {idt32}",
    "LG_IDTR64: .short 4095",
    ".quad {idt64}",
    "LG_IVTR: .short 1023",
    ".quad 0",
    ".section .text",
    idt32 = sym IDT32,
    idt64 = sym desc::IDT,
);

/// A context outside long mode. The field order is known to the assembly.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Legacy {
    /// CR0 to run with.
    pub cr0: u32,
    /// CR3.
    pub cr3: u32,
    /// CR4.
    pub cr4: u32,
    real: u32,
    /// EDI.
    pub edi: u32,
    /// ESI.
    pub esi: u32,
    /// EBP.
    pub ebp: u32,
    /// EBX.
    pub ebx: u32,
    /// EDX.
    pub edx: u32,
    /// ECX.
    pub ecx: u32,
    /// EAX.
    pub eax: u32,
    /// EIP.
    pub eip: u32,
    /// CS.
    pub cs: u32,
    /// EFLAGS.
    pub eflags: u32,
    /// ESP.
    pub esp: u32,
    /// SS.
    pub ss: u32,
    /// DS.
    pub ds: u32,
    /// ES.
    pub es: u32,
    /// FS.
    pub fs: u32,
    /// GS.
    pub gs: u32,
}

/// How it ended.
#[derive(Clone, Copy, Default)]
pub struct LegacyOutcome {
    /// Vector.
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// EIP.
    pub eip: u32,
    /// CS.
    pub cs: u32,
    /// EFLAGS.
    pub eflags: u32,
    /// ESP of the interrupted code.
    pub esp: u32,
    /// SS of the interrupted code, if the privilege changed.
    pub ss: u32,
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
    /// ESI.
    pub esi: u32,
    /// EDI.
    pub edi: u32,
    /// EBP.
    pub ebp: u32,
    /// DS.
    pub ds: u32,
    /// ES.
    pub es: u32,
    /// FS.
    pub fs: u32,
    /// GS.
    pub gs: u32,
    /// CR2.
    pub cr2: u64,
    /// Task register in the handler.
    pub tr: u32,
    /// SS in the handler.
    pub handler_ss: u32,
    /// CR3 in the handler.
    pub cr3: u32,
    /// LDTR in the handler.
    pub ldtr: u32,
}

/// CR0 with PE, MP, ET, NE.
pub const CR0_PM: u32 = 0x33;
/// Where the snippet of real and V86 mode lies.
pub const LOW: u32 = 0x9000;

/// Top of the CPL 0 stack.
pub fn stack0() -> u32 {
    (&raw const STACK0) as u32 + 8192 - 128
}
/// Top of the CPL 3 stack.
pub fn stack3() -> u32 {
    (&raw const STACK3) as u32 + 8192 - 128
}
/// Address of the 32-bit TSS in the task register.
pub fn tss() -> u64 {
    (&raw const TSS) as u64
}
/// Address of the 32-bit IDT.
pub fn idt() -> u64 {
    (&raw const IDT32) as u64
}
/// Handler stub of a vector.
pub fn stub(vector: u8) -> u32 {
    (&raw const legacy_stubs) as u32 + u32::from(vector) * 16
}

/// Writes a 32-bit gate: type and DPL in `access`.
pub fn set_gate(vector: u8, offset: u32, selector: u16, access: u8) {
    let at = idt() + u64::from(vector) * 8;
    wr32(at, offset & 0xffff | u32::from(selector) << 16);
    wr32(at + 4, offset & 0xffff_0000 | u32::from(access) << 8);
}

fn prepare() {
    for v in 0..=255u8 {
        set_gate(v, stub(v), desc::KCS32, if matches!(v, 3 | 4 | 0x80) { 0xee } else { 0x8e });
    }
    for i in 0..8448 {
        mem::wr8(tss() + i, if (104..104 + 8193).contains(&i) { 0xff } else { 0 });
    }
    wr32(tss() + 4, (&raw const LG_STACK) as u32 + 8192);
    wr32(tss() + 8, u32::from(desc::KDS));
    wr32(tss() + 100, 104 << 16);
    desc::set_gdt(desc::TSS32, desc::descriptor(tss() as u32, 104 + 8192, 0x89, 0));
}

impl Legacy {
    fn at(eip: u32, cs: u16, esp: u32, ss: u16) -> Self {
        prepare();
        let (cs, ss) = (u32::from(cs), u32::from(ss));
        let data = if cs & 3 == 0 { u32::from(desc::KDS) } else { u32::from(desc::UDS) };
        Legacy {
            cr0: CR0_PM,
            cr3: 0,
            cr4: 0x600,
            real: 0,
            edi: 0,
            esi: 0,
            ebp: 0,
            ebx: 0,
            edx: 0,
            ecx: 0,
            eax: 0,
            eip,
            cs,
            eflags: 2,
            esp,
            ss,
            ds: data,
            es: data,
            fs: 0,
            gs: 0,
        }
    }
    /// 32-bit code at CPL 0.
    pub fn kernel(code: Code) -> Self {
        Self::at(code.start as u32, desc::KCS32, stack0(), desc::KDS)
    }
    /// 32-bit code at CPL 3.
    pub fn user(code: Code) -> Self {
        Self::at(code.start as u32, desc::UCS32, stack3(), desc::UDS)
    }
    fn low(code: Code) -> Self {
        mem::put(u64::from(LOW), code.bytes());
        let mut l = Self::at(0, 0, 0x6700, 0);
        l.cs = LOW >> 4;
        l.ss = 0;
        (l.ds, l.es) = (LOW >> 4, LOW >> 4);
        l
    }
    /// 16-bit code in virtual-8086 mode with this IOPL.
    pub fn v86(code: Code, iopl: u32) -> Self {
        let mut l = Self::low(code);
        l.eflags = 0x2_0002 | iopl << 12;
        l
    }
    /// 16-bit code in real mode; `unreal` gives FS a limit of 4 GiB and base 0.
    pub fn real(code: Code, unreal: bool) -> Self {
        let mut l = Self::low(code);
        l.real = if unreal { 2 } else { 1 };
        l
    }
    /// Enters the context and returns how it ended.
    pub fn run(self) -> LegacyOutcome {
        let mut me = self;
        if self.real != 0 {
            install_real(&self);
            me.cs = 0;
        }
        for i in 0..40 {
            wr32((&raw const LG_OUT) as u64 + i * 4, 0);
        }
        let o = traps::catch(|| unsafe { legacy_enter(&me) });
        if o.vector != traps::NONE {
            return LegacyOutcome {
                vector: o.vector | 0x1_0000,
                error: o.error,
                eip: o.rip as u32,
                ..Default::default()
            };
        }
        if self.real != 0 { real_outcome() } else { outcome() }
    }
}

fn out(i: u64) -> u32 {
    rd32((&raw const LG_OUT) as u64 + i * 4)
}

fn outcome() -> LegacyOutcome {
    let outer = out(15) & 3 != 0 || out(16) & 0x2_0000 != 0;
    let v86 = out(16) & 0x2_0000 != 0;
    LegacyOutcome {
        gs: out(if v86 { 22 } else { 0 }),
        fs: out(if v86 { 21 } else { 1 }),
        es: out(if v86 { 19 } else { 2 }),
        ds: out(if v86 { 20 } else { 3 }),
        edi: out(4),
        esi: out(5),
        ebp: out(6),
        ebx: out(8),
        edx: out(9),
        ecx: out(10),
        eax: out(11),
        vector: u64::from(out(12)),
        error: u64::from(out(13)),
        eip: out(14),
        cs: out(15),
        eflags: out(16),
        esp: if outer { out(17) } else { out(7) + 20 },
        ss: if outer { out(18) } else { out(28) },
        cr2: u64::from(out(26)),
        tr: out(27),
        handler_ss: out(28),
        cr3: out(29),
        ldtr: out(31),
    }
}

fn install_real(l: &Legacy) {
    let (start, end) = (&raw const real_start as u64, &raw const real_end as u64);
    for i in 0..end - start {
        mem::wr8(0x7000 + i, mem::rd8(start + i));
    }
    let stubs = 0x7000 + (&raw const real_stubs as u64 - start);
    for v in 0..256 {
        wr32(v * 4, (stubs + v * 8) as u32);
    }
    let words = (&raw const *l).cast::<u32>();
    for i in 0..20 {
        wr32(0x6800 + i * 4, unsafe { words.add(i as usize).read() });
    }
    for v in 0..256 {
        mem::wr8(0x6a00 + v, 0);
    }
    for i in 0..4 {
        wr32(0x6c00 + i * 4, 0);
    }
    for v in 0..=255u8 {
        if traps::mode(v) != 0 {
            mem::wr8(0x6a00 + u64::from(v), 1);
        }
    }
}

fn real_outcome() -> LegacyOutcome {
    let half = |i: u64| u32::from(unsafe { ((&raw const LG_OUT) as *const u16).add(i as usize).read() });
    LegacyOutcome {
        gs: half(0),
        fs: half(1),
        es: half(2),
        ds: half(3),
        edi: out(2),
        esi: out(3),
        ebp: out(4),
        ebx: out(6),
        edx: out(7),
        ecx: out(8),
        eax: out(9),
        vector: u64::from(half(20)),
        eip: half(21),
        cs: half(22),
        eflags: half(23),
        esp: rd32(0x6c00) + 48,
        ..Default::default()
    }
}
