//! What is said when KVM cannot go on: one line with the instruction by name, where it is, and what to do.

use iced_x86::{Decoder, DecoderOptions, FastFormatter};
use kvm_bindings as kvm;
use x86::CpuState;
use x86::state::sreg;

use crate::exit::{Failure, reason_name};

/// The instruction that `bytes` begin with, and its bytes in hexadecimal. `bits` is the code's size.
#[must_use]
pub fn instruction(bytes: &[u8], bits: u32, rip: u64) -> String {
    let instruction = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE).decode();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    if bytes.is_empty() {
        return "an instruction (its bytes cannot be read)".to_owned();
    }
    if instruction.is_invalid() {
        return format!("the bytes {}", hex(bytes));
    }
    let mut text = String::new();
    FastFormatter::new().format(&instruction, &mut text);
    format!("`{text}` ({})", hex(&bytes[..instruction.len().min(bytes.len())]))
}

/// Size of the running code in bits.
#[must_use]
pub const fn code_bits(s: &CpuState) -> u32 {
    if s.code64() {
        64
    } else if s.seg[sreg::CS].attr.db() {
        32
    } else {
        16
    }
}

/// The whole line. `bytes` are those at RIP, for an instruction that could not be emulated; `software` says that no hardware stands behind KVM.
#[must_use]
pub fn text(vcpu: usize, failure: &Failure, s: &CpuState, bytes: &[u8], software: bool) -> String {
    let place = format!("RIP {:#x}, level {}, {}-bit code", s.rip, s.cpl, code_bits(s));
    let what = match failure {
        Failure::Emulation { .. } => {
            format!("KVM cannot emulate {} at {place}", instruction(bytes, code_bits(s), s.rip))
        }
        Failure::Internal { suberror, data } => {
            format!("KVM failed: {} (data {data:#x}) at {place}", internal(*suberror))
        }
        Failure::Entry { reason } => {
            format!("the processor refuses to enter the guest (reason {reason:#x}) at {place}")
        }
        Failure::Unexpected { reason } => {
            format!(
                "KVM came back for reason {reason} ({}), which is not for this machine, at {place}",
                reason_name(*reason)
            )
        }
    };
    let advice = if software {
        "this host's KVM has no hardware virtualization behind it; use --engine bt"
    } else {
        "--engine bt can run this guest"
    };
    format!("CPU {vcpu}: {what}; {advice}")
}

fn internal(suberror: u32) -> String {
    match suberror {
        kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time".to_owned(),
        kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered".to_owned(),
        kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "an exit of the processor that it does not know".to_owned()
        }
        other => format!("internal error {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::Attr;

    fn long_mode() -> CpuState {
        let mut s = CpuState { rip: 0x1000, ..CpuState::reset() };
        s.msr.efer = 0xd00;
        s.seg[sreg::CS].attr = Attr(0xa09b);
        s
    }

    #[test]
    fn emulation_failure_names_the_instruction_in_one_line() {
        let failure = Failure::Emulation { bytes: [0; 15], len: 0 };
        let line = text(1, &failure, &long_mode(), &[0x0f, 0xae, 0x08, 0x90], true);
        assert!(line.contains("CPU 1") && line.contains("fxrstor") && line.contains("(0f ae 08)"), "{line}");
        assert!(line.contains("0x1000") && line.contains("no hardware") && !line.contains('\n'), "{line}");
        let line = text(0, &failure, &CpuState::reset(), &[0xcd, 0x80], false);
        assert!(
            line.contains("int 80h") && line.contains("16-bit") && !line.contains("no hardware"),
            "{line}"
        );
    }

    #[test]
    fn nonsense_and_nothing_are_told_too() {
        assert_eq!(instruction(&[0xff, 0xff], 64, 0), "the bytes ff ff");
        assert!(instruction(&[], 64, 0).contains("cannot be read"));
        for failure in [
            Failure::Entry { reason: 0x8000_0021 },
            Failure::Unexpected { reason: 3 },
            Failure::Internal { suberror: 3, data: 1 },
        ] {
            let line = text(0, &failure, &long_mode(), &[], false);
            assert!(line.contains("0x1000") && !line.contains('\n'), "{line}");
        }
    }
}
