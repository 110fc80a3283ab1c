//! The host executes an instruction another way than `native`: with all its state loaded by XRSTOR, all general
//! registers the guest's own, the memory operand where it is.
#![expect(unsafe_code, reason = "executes instructions directly, to compare with")]

use std::sync::Mutex;

use x86::state::FpuArea;

use super::{PAGE, PAGES};

/// What goes in and comes out.
#[repr(C, align(64))]
pub struct Machine {
    /// The index is the register's; RSP is ignored.
    pub gpr: [u64; 16],
    pub flags: u64,
    target: u64,
    area: u64,
    mask: u64,
    stack: u64,
}

std::arch::global_asm!(
    ".globl vector_oracle_run",
    "vector_oracle_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 24",
    "stmxcsr [rsp]",
    "mov [rsp + 8], rdi",
    "mov r8, rdi",
    "mov eax, [r8 + 152]",
    "mov edx, [r8 + 156]",
    "mov rsi, [r8 + 144]",
    "xrstor64 [rsi]",
    "push qword ptr [r8 + 136]", // target
    "push qword ptr [r8 + 128]", // flags
    "mov rax, [r8 + 0]",
    "mov rcx, [r8 + 8]",
    "mov rdx, [r8 + 16]",
    "mov rbx, [r8 + 24]",
    "mov rbp, [r8 + 40]",
    "mov rsi, [r8 + 48]",
    "mov rdi, [r8 + 56]",
    "mov r9, [r8 + 72]",
    "mov r10, [r8 + 80]",
    "mov r11, [r8 + 88]",
    "mov r12, [r8 + 96]",
    "mov r13, [r8 + 104]",
    "mov r14, [r8 + 112]",
    "mov r15, [r8 + 120]",
    "mov r8, [r8 + 64]",
    "popfq",
    "call [rsp]",
    "pushfq",
    "push rax",
    "mov rax, [rsp + 32]", // Machine: below flags, rax, target, mxcsr
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rbx",
    "mov [rax + 40], rbp",
    "mov [rax + 48], rsi",
    "mov [rax + 56], rdi",
    "mov [rax + 64], r8",
    "mov [rax + 72], r9",
    "mov [rax + 80], r10",
    "mov [rax + 88], r11",
    "mov [rax + 96], r12",
    "mov [rax + 104], r13",
    "mov [rax + 112], r14",
    "mov [rax + 120], r15",
    "mov r8, rax",
    "pop qword ptr [r8]",
    "pop qword ptr [r8 + 128]",
    "mov eax, [r8 + 152]",
    "mov edx, [r8 + 156]",
    "mov rsi, [r8 + 144]",
    "xsave64 [rsi]",
    "fninit",
    "vzeroupper",
    "add rsp, 8",
    "ldmxcsr [rsp]",
    "cld",
    "add rsp, 24",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "sysv64" {
    fn vector_oracle_run(machine: *mut Machine);
}

/// Code and data of the oracle.
struct Arena {
    code: *mut u8,
    data: *mut u8,
}

// SAFETY: used under the mutex only.
unsafe impl Send for Arena {}

static ARENA: Mutex<Option<Arena>> = Mutex::new(None);

fn map(len: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh private mapping.
    let p =
        unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert!(p != libc::MAP_FAILED);
    p.cast()
}

fn with_arena<T>(f: impl FnOnce(&Arena) -> T) -> T {
    let mut slot = ARENA.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    f(slot.get_or_insert_with(|| Arena { code: map(PAGE), data: map(PAGES * PAGE) }))
}

/// Where the oracle's data lies: the mock's memory must have this base.
pub fn data_base() -> u64 {
    with_arena(|a| a.data as u64)
}

/// Executes `code` on registers, state and memory, all updated.
pub fn run(
    code: &[u8],
    gpr: &mut [u64; 16],
    flags: &mut u64,
    area: &mut FpuArea,
    mask: u64,
    memory: &mut [u8],
) {
    with_arena(|a| {
        assert!(memory.len() == PAGES * PAGE && code.len() < 64);
        // SAFETY: both regions are ours and long enough; the code is one instruction of the module under test and a
        // RET, whose memory operands lie in `data`.
        unsafe {
            libc::mprotect(a.code.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE);
            std::ptr::copy_nonoverlapping(code.as_ptr(), a.code, code.len());
            a.code.add(code.len()).write(0xc3);
            libc::mprotect(a.code.cast(), PAGE, libc::PROT_READ | libc::PROT_EXEC);
            std::ptr::copy_nonoverlapping(memory.as_ptr(), a.data, memory.len());
            area.0[512..576].fill(0);
            area.0[512..520].copy_from_slice(&mask.to_le_bytes());
            let mut m = Machine {
                gpr: *gpr,
                flags: *flags,
                target: a.code as u64,
                area: std::ptr::from_mut(area) as u64,
                mask,
                stack: 0,
            };
            vector_oracle_run(&raw mut m);
            let rsp = gpr[4];
            *gpr = m.gpr;
            gpr[4] = rsp;
            *flags = m.flags;
            std::ptr::copy_nonoverlapping(a.data, memory.as_mut_ptr(), memory.len());
        }
    });
}
