//! Which differences count, and what the two sides may legally differ in.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, RflagsBits};
use x86::bits::rflags;

use crate::state::{NAMES, Registers};

/// RFLAGS bits that are compared: all but RF, which a debugger's single steps disturb.
const FLAGS: u64 = rflags::ALL & !rflags::RF;

/// One register that differs.
pub struct Difference {
    pub name: String,
    pub ours: u128,
    pub qemu: u128,
}

/// Decodes one instruction.
pub fn decode(bits: u32, address: u64, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bits, bytes, address, DecoderOptions::NONE).decode()
}

/// Instructions whose result comes from elsewhere than the guest's own state: time, identity, chance, model.
pub fn is_external(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::In
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Cpuid
            | M::Rdmsr
            | M::Rdrand
            | M::Rdseed
            | M::Xgetbv
    ) || matches!(instruction.code(), Code::Mov_r64_cr | Code::Mov_r32_cr)
        && instruction.op1_register() == iced_x86::Register::CR8
}

/// Whether the instruction leaves the processor waiting, where single steps end.
pub fn is_waiting(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Hlt | Mnemonic::Mwait)
}

/// MOV to or from a debug register.
pub fn is_debug_move(instruction: &Instruction) -> bool {
    use Code as C;
    matches!(instruction.code(), C::Mov_r32_dr | C::Mov_r64_dr | C::Mov_dr_r32 | C::Mov_dr_r64)
}

/// RFLAGS bits that are undefined after the instruction (SDM 2; iced's table).
pub fn undefined_flags(instruction: &Instruction) -> u64 {
    let bits = instruction.rflags_undefined();
    let pairs = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    pairs.iter().filter(|(theirs, _)| bits & theirs != 0).fold(0, |mask, (_, ours)| mask | ours)
}

/// Everything that differs; `long` compares whole registers, otherwise their lower 32 bits.
pub fn differences(ours: &Registers, qemu: &Registers, long: bool) -> Vec<Difference> {
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let mut list = Vec::new();
    let mut note = |name: &str, ours: u128, qemu: u128| {
        if ours != qemu {
            list.push(Difference { name: name.to_owned(), ours, qemu });
        }
    };
    let wide = u128::from;
    note("rip", wide(ours.rip & mask), wide(qemu.rip & mask));
    note("rflags", wide(ours.rflags & FLAGS), wide(qemu.rflags & FLAGS));
    let count = if long { 16 } else { 8 };
    for (i, name) in NAMES.iter().enumerate().take(count) {
        note(name, wide(ours.gpr[i] & mask), wide(qemu.gpr[i] & mask));
    }
    for (i, name) in ["cs", "ss", "ds", "es", "fs", "gs"].iter().enumerate() {
        note(name, ours.selectors[i].into(), qemu.selectors[i].into());
    }
    note("fs_base", wide(ours.fs_base), wide(qemu.fs_base));
    note("gs_base", wide(ours.gs_base), wide(qemu.gs_base));
    for (i, name) in ["cr0", "cr2", "cr3", "cr4"].iter().enumerate() {
        note(name, wide(ours.cr[i]), wide(qemu.cr[i]));
    }
    note("efer", wide(ours.efer), wide(qemu.efer));
    for i in 0..count {
        note(&format!("xmm{i}"), ours.xmm[i], qemu.xmm[i]);
    }
    note("mxcsr", ours.mxcsr.into(), qemu.mxcsr.into());
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undefined_flags_of_a_multiplication_are_known() {
        let imul = decode(64, 0, &[0x48, 0x0f, 0xaf, 0xc1]);
        assert_eq!(undefined_flags(&imul), rflags::SF | rflags::ZF | rflags::AF | rflags::PF);
        assert!(is_external(&decode(64, 0, &[0x0f, 0x31])) && !is_external(&imul));
        assert!(is_external(&decode(64, 0, &[0x44, 0x0f, 0x20, 0xc0])));
    }

    #[test]
    fn upper_halves_count_in_64_bit_code_only() {
        let (a, mut b) = (Registers::default(), Registers::default());
        b.gpr[3] = 1 << 32;
        assert!(differences(&a, &b, false).is_empty());
        assert_eq!(differences(&a, &b, true)[0].name, "rbx");
    }
}
