//! Calls and returns that are no pairs: an engine that remembers where a call came from must go where the stack says.

use crate::harness::{Verdict, done, eq, page_fault};
use crate::mem::{P, Space, U, W, WIN, page, put, wr};
use crate::traps::*;
use crate::{code64, cpu, desc, skip, tests};

tests!("calls":
    return_elsewhere, frames_skipped, recursion, two_stacks, return_to_nothing, return_without_call, address_space_changes, mapping_changes, caller_changes,
    return_to_other_level, return_to_other_level_by_sysret, indirect_calls,
);

/// How often a place is executed, so that every engine has taken it to heart.
const WARM: usize = 60;

fn return_elsewhere() -> Verdict {
    // Every third time the callee adds the length of an INC to its return address.
    let c = code64!(
        "xor eax, eax",
        "mov ecx, 300",
        "mov ebx, 3",
        "2: call 5f",
        "inc eax",
        "inc eax",
        "dec ecx",
        "jnz 2b",
        "jmp 9f",
        "5: dec ebx",
        "jnz 6f",
        "mov ebx, 3",
        "add qword ptr [rsp], 2",
        "6: ret",
        "9:",
    );
    both_leave(c, 500, "two for each call, one for each third")
}

fn frames_skipped() -> Verdict {
    // Ten calls deep, then out of all of them at once, as longjmp does; the next call's return must not be mistaken.
    let c = code64!(
        "xor eax, eax",
        "mov ecx, 100",
        "2: mov rsi, rsp",
        "mov edx, 10",
        "call 5f",
        "3: call 7f",
        "dec ecx",
        "jnz 2b",
        "jmp 9f",
        "5: dec edx",
        "jz 6f",
        "call 5b",
        "ud2",
        "6: mov rsp, rsi",
        "jmp 3b",
        "7: inc eax",
        "ret",
        "9:",
    );
    both_leave(c, 100, "one for each turn")
}

/// Runs code in the kernel and as a user; it leaves `rax` in RAX.
fn both_leave(c: Code, rax: u64, what: &str) -> Verdict {
    for o in [Ctx::kernel(c).run(), Ctx::user(c).run()] {
        done(&o, what)?;
        eq(o.rax, rax, what)?;
    }
    Ok(())
}

fn recursion() -> Verdict {
    // Deeper than any predictor's stack: 400 frames of 16 bytes.
    let c = code64!(
        "xor eax, eax",
        "mov edx, 30",
        "2: mov ecx, 400",
        "call 5f",
        "dec edx",
        "jnz 2b",
        "jmp 9f",
        "5: push rcx",
        "dec ecx",
        "jz 6f",
        "call 5b",
        "6: pop rcx",
        "add rax, rcx",
        "ret",
        "9:",
    );
    both_leave(c, 30 * 400 * 401 / 2, "the sum of all frames")
}

fn two_stacks() -> Verdict {
    // Two routines that call each other's stacks: every return goes to the other's last call.
    let c = code64!(
        "xor eax, eax",
        "xor edx, edx",
        "mov ecx, 200",
        "mov rbx, rsp",
        "lea rdi, [rsp - 2048]",
        "lea rsi, [rip + 4f]",
        "mov [rdi], rsi",
        "2: call 7f",
        "inc eax",
        "dec ecx",
        "jnz 2b",
        "jmp 9f",
        "4: inc edx",
        "call 7f",
        "jmp 4b",
        "7: xchg rsp, rdi",
        "ret",
        "9: mov rsp, rbx",
    );
    for o in [Ctx::kernel(c).run(), Ctx::user(c).run()] {
        done(&o, "routines")?;
        eq(o.rax, 200, "turns of the one")?;
        eq(o.rdx, 200, "turns of the other")?;
    }
    Ok(())
}

fn return_to_nothing() -> Verdict {
    // Supervisor pages begin at 0.
    for _ in 0..WARM {
        let o = Ctx::user(code64!("push 0", "ret")).run();
        page_fault(&o, o.error | 5, 0, "a user's return to 0")?;
    }
    Ok(())
}

fn return_without_call() -> Verdict {
    let c = code64!(
        "xor eax, eax",
        "mov ecx, 500",
        "lea rsi, [rip + 3f]",
        "2: push rsi",
        "ret",
        "ud2",
        "3: inc eax",
        "dec ecx",
        "jnz 2b",
    );
    both_leave(c, 500, "returns")
}

/// Machine code: `call rdi; mov eax, v; ret`.
fn code_around_call(v: u32) -> [u8; 8] {
    let b = v.to_le_bytes();
    [0xff, 0xd7, 0xb8, b[0], b[1], b[2], b[3], 0xc3]
}

/// Calls the code at `va` with arguments in RDI, RSI, RDX, RCX, R8.
fn call_with(va: u64, args: [u64; 5]) -> u64 {
    let f: extern "C" fn(u64, u64, u64, u64, u64) -> u64 = unsafe { core::mem::transmute(va as *const ()) };
    f(args[0], args[1], args[2], args[3], args[4])
}

fn address_space_changes() -> Verdict {
    if !cpu::has_pcid() {
        skip!("no PCID");
    }
    const PCIDE: u64 = 1 << 17;
    const NO_FLUSH: u64 = 1 << 63;
    let (a, b, pa, pb) = (Space::new(), Space::new(), page(), page());
    put(pa, &code_around_call(0x111));
    put(pb, &code_around_call(0x222));
    a.map(WIN, pa, P | W);
    b.map(WIN, pb, P | W);
    cpu::set_cr4(cpu::cr4() | PCIDE);
    let (a, b) = (a.root | 1, b.root | 2);
    cpu::set_cr3(b);
    cpu::set_cr3(a);
    let switch = code64!("mov cr3, rsi", "ret").start;
    for _ in 0..WARM {
        eq(call_with(WIN, [switch, b | NO_FLUSH, 0, 0, 0]), 0x222, "a return in B of a call in A")?;
        eq(call_with(WIN, [switch, b | NO_FLUSH, 0, 0, 0]), 0x222, "in B all the time")?;
        eq(call_with(WIN, [switch, a | NO_FLUSH, 0, 0, 0]), 0x111, "a return in A of a call in B")?;
    }
    Ok(())
}

fn mapping_changes() -> Verdict {
    let (s, pa, pb) = (Space::active(), page(), page());
    put(pa, &code_around_call(0x111));
    put(pb, &code_around_call(0x222));
    s.map(WIN, pa, P | W);
    let entry = s.entry(WIN, 1);
    let remap = code64!("mov [rdx], rcx", "invlpg [rsi]", "ret").start;
    let mut call = |page: u64| call_with(WIN, [remap, WIN, entry, page | P | W, 0]);
    for _ in 0..WARM {
        eq(call(pb), 0x222, "the page behind the call is another")?;
        eq(call(pa), 0x111, "and the first again")?;
        eq(call(pa), 0x111, "which stays")?;
    }
    Ok(())
}

fn caller_changes() -> Verdict {
    let (s, pa) = (Space::active(), page());
    put(pa, &code_around_call(0));
    s.map(WIN, pa, P | W);
    let patch = code64!("mov [rsi], edx", "ret").start;
    for v in 1..WARM as u64 {
        eq(call_with(WIN, [patch, WIN + 3, v, 0, 0]), v, "the callee wrote what it returns to")?;
    }
    Ok(())
}

/// A kernel's call that has often returned is left by other means to a user, who returns to the same address. The code at RAX does that: it finds the
/// user's code in RDI, the stack and selectors in RCX, RBX and RSI.
fn leave_for_user(leave: u64) -> Verdict {
    let user = code64!("push rdx", "ret").start + crate::mem::ALIAS;
    let c = code64!(
        "mov r9d, 50",
        "2: call 5f",
        "test r9d, r9d",
        "jz 9f",
        "dec r9d",
        "jmp 2b",
        "5: test r9d, r9d",
        "jz 6f",
        "ret",
        "6: pop rdx",
        "jmp rax",
        "9:",
    );
    for _ in 0..WARM {
        let ctx = Ctx::kernel(c).rax(leave).rdi(user).rsi(u64::from(desc::UCS));
        let o = ctx.rcx(user_stack()).rbx(u64::from(desc::UDS)).run();
        page_fault(&o, o.error | 5, o.rdx, "a user's return to a kernel's call")?;
    }
    Ok(())
}

fn return_to_other_level() -> Verdict {
    let leave = code64!("push rdx", "push rbx", "push rcx", "push 2", "push rsi", "push rdi", "iretq");
    leave_for_user(leave.start)
}

fn return_to_other_level_by_sysret() -> Verdict {
    cpu::wrmsr(0xc000_0081, 0x001b_0008 << 32);
    leave_for_user(code64!("mov rsp, rcx", "mov rcx, rdi", "mov r11d, 2", "sysretq").start)
}

fn indirect_calls() -> Verdict {
    // One call with targets in turn, in pages of their own.
    let (s, targets) = (Space::active(), 8);
    let table = page();
    for n in 0..targets {
        let (p, at) = (page(), WIN + n * 0x1000 + n * 16);
        // add eax, n + 1; ret
        put(p + n * 16, &[0x83, 0xc0, n as u8 + 1, 0xc3]);
        s.map(at & !0xfff, p, P | W | U);
        wr(table + 8 * n, at);
    }
    let c = code64!(
        "xor eax, eax",
        "mov ecx, 400",
        "2: mov edx, ecx",
        "and edx, 7",
        "call [rdi + rdx*8]",
        "mov rdx, [rdi + rdx*8]",
        "call rdx",
        "dec ecx",
        "jnz 2b",
    );
    let o = Ctx::kernel(c).rdi(table).run();
    done(&o, "calls")?;
    eq(o.rax, 2 * 50 * 36, "every target twice in each turn")
}
