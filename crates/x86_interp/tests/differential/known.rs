//! Differences between this host and the interpreter that are no mistakes: places where the manuals leave the choice to
//! the processor, or where vendors differ and the interpreter follows the other one. Each is told apart as narrowly as
//! possible and counted.

use iced_x86::{Instruction, Mnemonic as M};

use crate::state::{AREA, Mode, Outcome};

const ALIGNMENT_CHECK: u8 = 17;
const GENERAL_PROTECTION: u8 = 13;
const STACK_FAULT: u8 = 12;
const PAGE_FAULT: u8 = 14;
const X87: u8 = 16;
const SIMD: u8 = 19;
/// MXCSR.PE.
const PRECISION: u32 = 1 << 5;

/// The reason to accept the difference; `i` is the instruction that faulted, or the last that the interpreter reached.
pub fn reason(mode: Mode, i: Option<&Instruction>, host: &Outcome, interp: &Outcome) -> Option<&'static str> {
    let i = i?;
    let name = format!("{:?}", i.mnemonic());
    // The order of elements and the state in between are the processor's choice (SDM 2C VPGATHERDD, "faults").
    let steps = host.vector == 1 && interp.vector == PAGE_FAULT;
    if i.is_vsib() && steps {
        return Some("gather under single step: a trap after each element");
    }
    if i.is_vsib()
        && host.vector == interp.vector
        && host.regs.gpr == interp.regs.gpr
        && host.error == interp.error
    {
        return Some("gather or scatter that faults: mask and destination between elements");
    }
    // DEVIATION of the interpreter: operands of natively executed instructions are not checked for alignment.
    if host.vector == ALIGNMENT_CHECK && !is_plain(i) {
        return Some("#AC of a natively executed instruction");
    }
    if name.starts_with("Sha") && interp.vector == GENERAL_PROTECTION {
        return Some("AMD's processors do not ask for alignment of SHA operands");
    }
    if !is_plain(i)
        && i.has_op_mask()
        && interp.vector == GENERAL_PROTECTION
        && (host.vector, host.regs.rip) != (interp.vector, interp.regs.rip)
    {
        return Some("alignment of a wholly masked operand is not asked for by AMD's processors");
    }
    if matches!(i.mnemonic(), M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq)
        && (host.vector == PAGE_FAULT || interp.vector == PAGE_FAULT)
    {
        return Some(
            "MASKMOVQ and a fault: for which bytes of the mask, and whether the x87 tags have changed",
        );
    }
    let at_the_end = |cr2: u64| !(0x1000..0xffff_f000).contains(&cr2);
    let limit = matches!(host.vector, STACK_FAULT | GENERAL_PROTECTION);
    let missed = interp.vector == PAGE_FAULT && at_the_end(interp.cr2) || interp.vector == ALIGNMENT_CHECK;
    if mode == Mode::Compat && limit && missed {
        return Some("an access across 4 GiB: wraps or faults (SDM 3A 5.3)");
    }
    if matches!(i.mnemonic(), M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi) && host.vector == SIMD
    {
        return Some("a conversion to MMX that raises #XM: whether the x87 tags have changed");
    }
    if matches!(i.mnemonic(), M::Cvtpi2ps | M::Cvtpi2pd)
        && (interp.vector == X87 || host.vector == X87 || host.vector == SIMD)
    {
        return Some("a conversion from MMX memory and a pending x87 exception (vendors differ)");
    }
    if i.mnemonic() == M::Call
        && matches!(host.vector, PAGE_FAULT | ALIGNMENT_CHECK)
        && interp.vector == GENERAL_PROTECTION
    {
        return Some("CALL to a non-canonical address on a bad stack: AMD's processors push first");
    }
    if i.has_op_mask()
        && interp.vector == PAGE_FAULT
        && (host.vector, host.regs.rip) != (interp.vector, interp.regs.rip)
    {
        return Some(
            "a masked operand without fault suppression (SDM 2A class E4NF): AMD's processors suppress",
        );
    }
    if i.has_op_mask()
        && host.vector == PAGE_FAULT
        && interp.vector == PAGE_FAULT
        && interp.cr2.abs_diff(host.cr2) < 64
    {
        return Some("the address of a fault of a masked operand: its start or its first element");
    }
    if host.vector == SIMD && interp.vector == SIMD && mxcsr(host) ^ mxcsr(interp) == PRECISION {
        return Some("an unmasked underflow: whether the result is also inexact with an unbounded exponent");
    }
    if name.starts_with("Vcvtne2ps2bf16") && host.vector != interp.vector && i.has_op_mask() {
        // DEVIATION of the interpreter: class E4NF has no fault suppression; it suppresses.
        return Some("VCVTNE2PS2BF16 under a mask: fault suppression");
    }
    if name.starts_with("Vextract") && host.vector != interp.vector && i.has_op_mask() {
        // DEVIATION of the interpreter: class E6NF has no fault suppression (SDM 2C VEXTRACTF128); it suppresses.
        return Some("VEXTRACT to memory under a mask: fault suppression");
    }
    if matches!(i.mnemonic(), M::Vdpps | M::Dpps | M::Dppd) && host.vector == SIMD {
        return Some("flags of the steps of a dot product with unmasked exceptions");
    }
    if matches!(i.mnemonic(), M::Popa | M::Popad) && host.vector == interp.vector {
        return Some("POPA that faults: registers popped before the fault");
    }
    let compare = matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
    if compare && host.vector == PAGE_FAULT && interp.vector == PAGE_FAULT {
        return Some("CMPS whose operands both fault: which is read first");
    }
    if matches!(i.mnemonic(), M::Ud0 | M::Ud1) && interp.vector == PAGE_FAULT {
        return Some("UD0 and UD1 across a page: whether ModRM is fetched");
    }
    None
}

const fn mxcsr(o: &Outcome) -> u32 {
    let a = &o.regs.fpu;
    u32::from_le_bytes([a[24], a[25], a[26], a[27]])
}

/// Instructions that the interpreter executes by hand-written code (`ops`).
fn is_plain(i: &Instruction) -> bool {
    use iced_x86::CpuidFeature as F;
    i.cpuid_features().iter().all(|f| {
        matches!(f, F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV)
            || matches!(f, F::CX8 | F::CMPXCHG16B | F::MOVBE)
    })
}

/// Takes what is not compared out of both outcomes.
pub fn smooth(host: &mut Outcome, interp: &mut Outcome) {
    for o in [host, interp] {
        // Linux hides from programs whether a kernel address is mapped (arch/x86/mm/fault.c, sanitize_error_code).
        if o.vector == PAGE_FAULT && o.cr2 >= 1 << 47 {
            o.error |= 1;
        }
        clear_opcode(&mut o.regs.fpu);
    }
}

/// FOP is kept only for unmasked exceptions on some processors (SDM 1 8.1.9.1).
fn clear_opcode(area: &mut [u8; AREA]) {
    area[6..8].fill(0);
}
