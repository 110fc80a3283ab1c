//! MOV to CR3 in the cache: to an address space whose translations live on (CR3 bit 63 under CR4.PCIDE, SDM 3A 4.10.4.1), as every switch between two
//! processes that ran before is.
//!
//! `trellis_bt_switch` does what [`x86_interp::tlb::Tlb::switch`] and [`crate::tables::Tables::apply`] would: the lower half gets the number of the context that the
//! PCID has ([`frame::KEPT`]), and the frame's TLB and jump cache forget what their logs say was filled for the lower half (INV-TAB-1). What a PCID's number is does not
//! change by such switches, so the interpreter learns only of the last one, when somebody looks ([`adopt`]). Whatever is unusual goes to `trellis_bt_callout`.
//!
//! INV-CR3-1: the frame's table of address spaces is the interpreter's whenever translated code is entered or gone on with ([`publish`]); it is empty where a
//! switch takes more than the above: without PCIDs, where local pages were filled in the upper half, where accesses must be slow, and under the knob `context=off`.

#![expect(unsafe_code, reason = "assembly that does a guest instruction")]

use std::arch::global_asm;

use bt::frame;
use x86::bits::cr4;
use x86_interp::cpu::Cpu;

use crate::exec::Frame;

global_asm!(
    // The value is in R14; behind the call that came here stands the number of the site. R15 and flags are free. MOV to CR3 serialises, so code that another
    // vCPU changed is acted on first.
    ".globl trellis_bt_switch",
    "trellis_bt_switch:",
    "cmp dword ptr gs:[{alarm}], 0\njne trellis_bt_callout",
    "mov r15, r14\nbtr r15, 63\njnc trellis_bt_callout",
    "test r15, gs:[{reserved}]\njne trellis_bt_callout",
    "push rax\npush rcx\npush rdx",
    "mov eax, r15d\nand eax, 0xfff\nmov ecx, eax\nand ecx, {kept_entries} - 1\nimul ecx, ecx, {kept_stride}\nbts rax, 63",
    "cmp gs:[rcx + {kept}], rax\njne 9f",
    "mov rdx, gs:[rcx + {kept} + 8]\nmov r14d, ecx",
    // A log that is full does not say what was filled.
    "mov rax, gs:[{jump_log}]\ncmp rax, gs:[{jump_log_end}]\njae 9f",
    "mov rax, gs:[{tlb_log}]\ncmp rax, gs:[{tlb_log_end}]\njae 9f",
    "mov gs:[{cr3}], r15\nmov gs:[{context}], rdx\nmov gs:[{code_context}], rdx",
    "mov rdx, gs:[r14 + {kept} + 16]\nmov gs:[{large}], rdx",
    // Entries whose tag is in the upper half are others' by now, or empty.
    "mov rcx, gs:[{starts}]\nmov gs:[{tlb_log}], rcx\njmp 3f",
    "2: mov edx, [rcx]\nadd rcx, 4\ncmp qword ptr gs:[rdx], 0\njl 3f",
    "lea r14d, [rdx - {tlb}]\nshl r14d, 7\nand r14d, ({tlb_entries} - 1) << 12\nnot r14",
    "mov gs:[rdx], r14\nmov gs:[rdx + 8], r14",
    "3: cmp rcx, rax\njne 2b",
    "mov rax, gs:[{jump_log}]\nmov rcx, gs:[{starts} + 8]\nmov gs:[{jump_log}], rcx\njmp 5f",
    "4: mov edx, [rcx]\nadd rcx, 4\ncmp qword ptr gs:[rdx], 0\njl 5f",
    "lea r14d, [rdx - {jumps}]\nmov r15d, 1\ntest r14d, {jump_mask} << 3\nmov r14d, 0\ncmove r14, r15",
    "mov gs:[rdx], r14",
    "5: cmp rcx, rax\njne 4b",
    "inc qword ptr gs:[{count}]",
    "pop rdx\npop rcx\npop rax",
    // INV-PAIR-1.
    "pop r15\nadd r15, 4\nmov rsp, gs:[{pairs}]\njmp r15",
    "9:\npop rdx\npop rcx\npop rax\njmp trellis_bt_callout",
    alarm = const frame::ALARM,
    pairs = const frame::PAIRS,
    reserved = const frame::CR3_RESERVED,
    kept = const frame::KEPT,
    kept_entries = const frame::KEPT_ENTRIES,
    kept_stride = const frame::KEPT_STRIDE,
    tlb_log = const frame::TLB_LOG,
    tlb_log_end = const frame::TLB_LOG_END,
    jump_log = const frame::JUMP_LOG,
    jump_log_end = const frame::JUMP_LOG_END,
    starts = const frame::LOG_STARTS,
    large = const frame::LARGE,
    cr3 = const frame::CR3,
    context = const frame::CONTEXT,
    code_context = const frame::CODE_CONTEXT,
    tlb = const frame::TLB,
    tlb_entries = const frame::TLB_ENTRIES,
    jumps = const frame::JUMPS,
    jump_mask = const frame::JUMP_MASK,
    count = const frame::COUNT_HELPED + 24,
);

unsafe extern "C" {
    fn trellis_bt_switch();
}

/// Address of the code that fragments call for MOV to CR3.
pub fn address() -> u64 {
    trellis_bt_switch as *const () as u64
}

/// Tells the frame which address spaces live on, and where large pages were filled, if that has changed. `trusted`: what is known by linear address may outlive a switch.
pub fn publish(cpu: &mut Cpu, frame: &Frame, trusted: bool) {
    if !std::mem::take(&mut cpu.tlb.kept_changed) {
        return;
    }
    for (at, large) in [frame::LARGE, frame::LARGE + 8].into_iter().zip(cpu.tlb.large()) {
        frame.set(at, large);
    }
    let entries = || (frame::KEPT..).step_by(frame::KEPT_STRIDE as usize);
    entries().zip(0..frame::KEPT_ENTRIES).for_each(|(at, _)| frame.set(at, 0));
    if !trusted || cpu.s.cr4 & cr4::PCIDE == 0 || !cpu.s.long_mode() {
        return;
    }
    frame.set(frame::CR3_RESERVED, !((1 << cpu.model.phys_bits()) - 1));
    for (pcid, context, large) in cpu.tlb.kept() {
        if let Some(at) = entries().nth((pcid % frame::KEPT_ENTRIES) as usize) {
            frame.set(at, pcid | frame::KEPT_VALID);
            frame.set(at + 8, context);
            frame.set(at + 16, large);
        }
    }
}

/// The interpreter learns of a switch that translated code made.
pub fn adopt(cpu: &mut Cpu, frame: &Frame) {
    let cr3 = frame.get(frame::CR3);
    if cr3 == cpu.s.cr3 {
        return;
    }
    cpu.s.cr3 = cr3;
    cpu.derive_paging();
    cpu.tlb.adopt(cr3 & 0xfff);
    debug_assert_eq!(cpu.tlb.context[0], frame.get(frame::CONTEXT), "INV-CR3-1");
}
