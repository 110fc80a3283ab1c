//! Exceptions and interrupts in long mode.
//!
//! Every vector has a stub that builds a [`Frame`]. What happens then is data, [`set_mode`]: by default the
//! trap ends the innermost [`catch`], which returns the frame as an [`Outcome`]; a vector with mode bits is
//! counted, logged, acknowledged as asked, and the interrupted code goes on. The handlers are assembly without
//! SIMD, so that they work whatever CR0.TS, CR0.EM and CR4.OSFXSR say. All vectors use interrupt stacks (IST),
//! for compiled code keeps data in the red zone.

use core::arch::global_asm;

/// Resume the interrupted code.
pub const RESUME: u8 = 1;
/// Acknowledge the master PIC.
pub const EOI_PIC: u8 = 2;
/// Acknowledge both PICs.
#[allow(dead_code)]
pub const EOI_PIC2: u8 = 4;
/// Acknowledge the local APIC through memory.
pub const EOI_APIC: u8 = 8;
/// Acknowledge the local APIC through MSR 80BH.
pub const EOI_X2APIC: u8 = 16;
/// Add [`set_skip`] bytes to RIP.
pub const SKIP: u8 = 32;
/// Clear TF in the interrupted flags.
pub const CLEAR_TF: u8 = 64;
/// Set RF in the interrupted flags.
pub const SET_RF: u8 = 128;

/// What the stubs push; the order is known to the assembly below.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    /// CR2 at the trap.
    pub cr2: u64,
    /// General registers.
    pub r15: u64,
    /// R14.
    pub r14: u64,
    /// R13.
    pub r13: u64,
    /// R12.
    pub r12: u64,
    /// R11.
    pub r11: u64,
    /// R10.
    pub r10: u64,
    /// R9.
    pub r9: u64,
    /// R8.
    pub r8: u64,
    /// RDI.
    pub rdi: u64,
    /// RSI.
    pub rsi: u64,
    /// RBP.
    pub rbp: u64,
    /// RBX.
    pub rbx: u64,
    /// RDX.
    pub rdx: u64,
    /// RCX.
    pub rcx: u64,
    /// RAX.
    pub rax: u64,
    /// Vector, [`NONE`] when nothing trapped.
    pub vector: u64,
    /// Error code, 0 for vectors without.
    pub error: u64,
    /// RIP.
    pub rip: u64,
    /// CS.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// SS.
    pub ss: u64,
    /// DS.
    pub ds: u64,
    /// ES.
    pub es: u64,
    /// FS.
    pub fs: u64,
    /// GS.
    pub gs: u64,
    /// RSP of the handler on entry, after its frame.
    pub handler_rsp: u64,
    /// SS of the handler.
    pub handler_ss: u64,
}

/// How a [`catch`] or [`Ctx::run`] ended.
pub type Outcome = Frame;

/// `vector` of an [`Outcome`] without a trap.
pub const NONE: u64 = 0x100;
/// Divide error.
pub const DE: u64 = 0;
/// Debug.
pub const DB: u64 = 1;
/// Breakpoint.
pub const BP: u64 = 3;
/// Overflow.
pub const OF: u64 = 4;
/// Bound.
pub const BR: u64 = 5;
/// Invalid opcode.
pub const UD: u64 = 6;
/// Device not available.
pub const NM: u64 = 7;
/// Double fault.
pub const DF: u64 = 8;
/// Invalid TSS.
pub const TS: u64 = 10;
/// Segment not present.
pub const NP: u64 = 11;
/// Stack fault.
pub const SS: u64 = 12;
/// General protection.
pub const GP: u64 = 13;
/// Page fault.
pub const PF: u64 = 14;
/// x87 error.
pub const MF: u64 = 16;
/// Alignment check.
pub const AC: u64 = 17;
/// SIMD exception.
pub const XM: u64 = 19;
/// The vector by which snippets end.
pub const END: u64 = 0x80;

/// Entry of the log of resumed traps.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LogEntry {
    /// Vector.
    pub vector: u64,
    /// Interrupted RIP.
    pub rip: u64,
    /// RCX at the trap.
    pub rcx: u64,
    /// RFLAGS in the frame.
    pub rflags: u64,
}

#[unsafe(no_mangle)]
static mut TRAP_MODE: [u8; 256] = [0; 256];
#[unsafe(no_mangle)]
static mut TRAP_COUNT: [u32; 256] = [0; 256];
#[unsafe(no_mangle)]
static mut TRAP_LOG: [LogEntry; 64] = [LogEntry { vector: 0, rip: 0, rcx: 0, rflags: 0 }; 64];
#[unsafe(no_mangle)]
static mut TRAP_LOG_N: u32 = 0;
#[unsafe(no_mangle)]
static mut TRAP_SKIP: u64 = 0;
#[unsafe(no_mangle)]
static mut CATCH_RSP: u64 = 0;
#[unsafe(no_mangle)]
static mut OUTCOME: Frame = unsafe { core::mem::zeroed() };

global_asm!(
    r#"
.section .text
.code64
.balign 16
.global trap_stubs
trap_stubs:
.set vec, 0
.rept 256
    .balign 16
    .if (vec == 8) || (vec >= 10 && vec <= 14) || (vec == 17) || (vec == 21) || (vec == 29) || (vec == 30)
    .else
    .byte 0x6a, 0
    .endif
    .byte 0x68
    .long vec
    jmp trap_common
    .set vec, vec + 1
.endr

trap_common:
    cld
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rax, cr2
    push rax
    mov rbx, [rsp + 8*16]
    lea rcx, [rip + TRAP_MODE]
    movzx eax, byte ptr [rcx + rbx]
    test eax, eax
    jz trap_catch

    lea rcx, [rip + TRAP_COUNT]
    inc dword ptr [rcx + rbx*4]
    mov edx, [rip + TRAP_LOG_N]
    inc dword ptr [rip + TRAP_LOG_N]
    and edx, 63
    shl edx, 5
    lea rcx, [rip + TRAP_LOG]
    add rcx, rdx
    mov [rcx], rbx
    mov rdx, [rsp + 8*18]
    mov [rcx + 8], rdx
    mov rdx, [rsp + 8*14]
    mov [rcx + 16], rdx
    mov rdx, [rsp + 8*20]
    mov [rcx + 24], rdx
    mov ebx, eax
    test bl, 4
    jz 2f
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
2:  test bl, 2
    jz 3f
    mov al, 0x20
    out 0x20, al
3:  test bl, 8
    jz 4f
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
4:  test bl, 16
    jz 5f
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
5:  test bl, 32
    jz 6f
    mov rax, [rip + TRAP_SKIP]
    add [rsp + 8*18], rax
6:  test bl, 64
    jz 7f
    and dword ptr [rsp + 8*20], 0xfffffeff
7:  test bl, 128
    jz 8f
    or dword ptr [rsp + 8*20], 0x10000
8:  pop rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

trap_catch:
    lea rdi, [rip + OUTCOME]
    mov rsi, rsp
    mov ecx, 23
    rep movsq
    xor eax, eax
    mov ax, ds
    stosq
    mov ax, es
    stosq
    mov ax, fs
    stosq
    mov ax, gs
    stosq
    mov rax, rsp
    add rax, 8*18
    stosq
    xor eax, eax
    mov ax, ss
    stosq
    cmp qword ptr [rip + CATCH_RSP], 0
    je 2f
    push 0x10
    push qword ptr [rip + CATCH_RSP]
    push 2
    push 8
    lea rax, [rip + catch_landing]
    push rax
    iretq
2:  mov rax, cr0
    and eax, 0xfffffff3
    mov cr0, rax
    and rsp, -16
    call guest_fatal
    ud2

/* catch_enter(rdi: function, rsi: its argument): calls it; a trap comes back here. */
.global catch_enter
catch_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    push qword ptr [rip + CATCH_RSP]
    mov rax, cr0
    push rax
    mov rax, cr4
    push rax
    mov [rip + CATCH_RSP], rsp
    mov rax, rdi
    mov rdi, rsi
    sub rsp, 8
    test rsp, 15
    jz 2f
    sub rsp, 8
2:  call rax
    mov qword ptr [rip + OUTCOME + 8*16], 0x100
    mov rsp, [rip + CATCH_RSP]
catch_landing:
    mov eax, 0x23
    mov ds, eax
    mov es, eax
    pop rax
    mov rcx, cr4
    cmp rax, rcx
    je 3f
    mov cr4, rax
3:  pop rax
    mov rcx, cr0
    cmp rax, rcx
    je 4f
    mov cr0, rax
4:  pop qword ptr [rip + CATCH_RSP]
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

/* enter_ctx(rdi: &Ctx): leaves for the context by IRETQ. */
.global enter_ctx
enter_ctx:
    push qword ptr [rdi + 8*22]
    push qword ptr [rdi + 8*21]
    push qword ptr [rdi + 8*20]
    push qword ptr [rdi + 8*19]
    push qword ptr [rdi + 8*18]
    mov eax, [rdi + 8*23]
    mov ds, eax
    mov eax, [rdi + 8*24]
    mov es, eax
    mov r15, [rdi + 8*1]
    mov r14, [rdi + 8*2]
    mov r13, [rdi + 8*3]
    mov r12, [rdi + 8*4]
    mov r11, [rdi + 8*5]
    mov r10, [rdi + 8*6]
    mov r9, [rdi + 8*7]
    mov r8, [rdi + 8*8]
    mov rsi, [rdi + 8*10]
    mov rbp, [rdi + 8*11]
    mov rbx, [rdi + 8*12]
    mov rdx, [rdi + 8*13]
    mov rcx, [rdi + 8*14]
    mov rax, [rdi + 8*15]
    mov rdi, [rdi + 8*9]
    iretq
"#
);

unsafe extern "C" {
    static trap_stubs: u8;
    fn catch_enter(f: usize, arg: *mut u8);
    fn enter_ctx(ctx: *const Frame);
}

/// Address of the stub of a vector.
pub fn stub(vector: u8) -> u64 {
    (&raw const trap_stubs) as u64 + u64::from(vector) * 16
}

/// Runs `f`; a trap in it ends it. CR0, CR4 and RFLAGS are as before afterwards.
pub fn catch<F: FnOnce()>(f: F) -> Outcome {
    extern "C" fn call<F: FnOnce()>(p: *mut F) {
        unsafe { p.read()() }
    }
    let mut f = core::mem::ManuallyDrop::new(f);
    unsafe {
        catch_enter(call::<F> as *const () as usize, (&raw mut f).cast());
        (&raw const OUTCOME).read_volatile()
    }
}

/// The registers that a trap found when nothing was there to catch it.
pub fn last() -> Outcome {
    unsafe { (&raw const OUTCOME).read_volatile() }
}

/// Says what a vector does; 0 is to end the innermost [`catch`].
pub fn set_mode(vector: u8, mode: u8) {
    unsafe { (&raw mut TRAP_MODE).cast::<u8>().add(usize::from(vector)).write_volatile(mode) };
}

/// What a vector does.
pub fn mode(vector: u8) -> u8 {
    unsafe { (&raw const TRAP_MODE).cast::<u8>().add(usize::from(vector)).read_volatile() }
}

/// How many bytes [`SKIP`] skips.
pub fn set_skip(bytes: u64) {
    unsafe { (&raw mut TRAP_SKIP).write_volatile(bytes) };
}

/// How often a resumed vector came.
pub fn count(vector: u8) -> u32 {
    unsafe { (&raw const TRAP_COUNT).cast::<u32>().add(usize::from(vector)).read_volatile() }
}

/// Number of resumed traps since the last [`reset`].
pub fn logged() -> usize {
    unsafe { (&raw const TRAP_LOG_N).read_volatile() as usize }
}

/// The nth resumed trap.
pub fn log(n: usize) -> LogEntry {
    unsafe { (&raw const TRAP_LOG).cast::<LogEntry>().add(n & 63).read_volatile() }
}

/// Forgets modes, counts and log.
pub fn reset() {
    unsafe {
        (&raw mut TRAP_MODE).write_bytes(0, 1);
        (&raw mut TRAP_COUNT).write_bytes(0, 1);
        (&raw mut TRAP_LOG_N).write_volatile(0);
    }
}

/// A context to enter by IRETQ.
#[derive(Clone, Copy)]
pub struct Ctx(pub Frame);

#[repr(C, align(4096))]
struct Stack([u8; 8192]);
static mut USER_STACK: Stack = Stack([0; 8192]);
static mut SYS_STACK: Stack = Stack([0; 8192]);

/// Top of the stack of CPL 3 contexts (its user alias).
pub fn user_stack() -> u64 {
    (&raw const USER_STACK) as u64 + 8192 - 64 + crate::mem::ALIAS
}

/// Top of the stack of CPL 0 contexts.
pub fn sys_stack() -> u64 {
    (&raw const SYS_STACK) as u64 + 8192 - 64
}

use crate::desc;

impl Ctx {
    fn at(rip: u64, cs: u16, rsp: u64, ss: u16) -> Self {
        let mut f: Frame = unsafe { core::mem::zeroed() };
        f.rip = rip;
        f.cs = u64::from(cs);
        f.rflags = 2;
        f.rsp = rsp;
        f.ss = u64::from(ss);
        f.ds = u64::from(desc::UDS);
        f.es = u64::from(desc::UDS);
        Ctx(f)
    }
    /// 64-bit code at CPL 3.
    pub fn user(code: Code) -> Self {
        Self::at(code.start + crate::mem::ALIAS, desc::UCS, user_stack(), desc::UDS)
    }
    /// 32-bit code at CPL 3 in compatibility mode.
    pub fn user32(code: Code) -> Self {
        Self::at(code.start + crate::mem::ALIAS, desc::UCS32, user_stack(), desc::UDS)
    }
    /// 64-bit code at CPL 0.
    pub fn kernel(code: Code) -> Self {
        Self::at(code.start, desc::KCS, sys_stack(), desc::KDS)
    }
    /// 32-bit code at CPL 0 in compatibility mode.
    pub fn kernel32(code: Code) -> Self {
        Self::at(code.start, desc::KCS32, sys_stack(), desc::KDS)
    }
    /// Sets RAX.
    pub fn rax(mut self, v: u64) -> Self {
        self.0.rax = v;
        self
    }
    /// Sets RBX.
    pub fn rbx(mut self, v: u64) -> Self {
        self.0.rbx = v;
        self
    }
    /// Sets RCX.
    pub fn rcx(mut self, v: u64) -> Self {
        self.0.rcx = v;
        self
    }
    /// Sets RDX.
    pub fn rdx(mut self, v: u64) -> Self {
        self.0.rdx = v;
        self
    }
    /// Sets RSI.
    pub fn rsi(mut self, v: u64) -> Self {
        self.0.rsi = v;
        self
    }
    /// Sets RDI.
    pub fn rdi(mut self, v: u64) -> Self {
        self.0.rdi = v;
        self
    }
    /// Sets RFLAGS bits.
    pub fn flags(mut self, v: u64) -> Self {
        self.0.rflags |= v;
        self
    }
    /// Sets DS.
    pub fn ds(mut self, v: u16) -> Self {
        self.0.ds = u64::from(v);
        self
    }
    /// Enters the context and returns how it ended.
    pub fn run(self) -> Outcome {
        catch(|| unsafe { enter_ctx(&self.0) })
    }
}

/// Machine code written in a test by [`crate::code64`] and its kin. It ends with INT 80H.
#[derive(Clone, Copy)]
pub struct Code {
    /// First byte.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
}

impl Code {
    /// Its bytes.
    pub fn bytes(&self) -> &'static [u8] {
        unsafe { core::slice::from_raw_parts(self.start as *const u8, (self.end - self.start) as usize) }
    }
}

/// Assembles a snippet for the given mode and yields it as [`Code`].
#[macro_export]
macro_rules! snippet {
    ($mode:literal; $($line:expr),* $(,)?) => {{
        let (start, end): (u64, u64);
        #[allow(unused_unsafe, reason = "the macro is used inside unsafe blocks too")]
        unsafe {
            core::arch::asm!(
                "lea {start}, [rip + 77f]", "lea {end}, [rip + 78f]", "jmp 78f", ".balign 16", $mode, "77:",
                $($line,)*
                "int 0x80", ".code64", "78:",
                start = out(reg) start, end = out(reg) end, options(nomem, nostack, preserves_flags)
            );
        }
        $crate::traps::Code { start, end }
    }};
}
/// 64-bit code.
#[macro_export]
macro_rules! code64 { ($($l:expr),* $(,)?) => { $crate::snippet!(".code64"; $($l),*) }; }
/// 32-bit code.
#[macro_export]
macro_rules! code32 { ($($l:expr),* $(,)?) => { $crate::snippet!(".code32"; $($l),*) }; }
/// 16-bit code.
#[macro_export]
macro_rules! code16 { ($($l:expr),* $(,)?) => { $crate::snippet!(".code16"; $($l),*) }; }
