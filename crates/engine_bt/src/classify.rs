//! What each host instruction of a fragment is for, told from the code itself: for profiles. The patterns are those that `bt::lower` makes; what
//! matches none of them is the guest's own.

use bt::listing::{Part, field_name, frame_field, parts};
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

/// What for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// What the guest's instruction does.
    Guest,
    /// Forming the address of an access.
    Address,
    /// Looking it up in the TLB.
    Check,
    /// Looking up the target of a jump.
    Lookup,
    /// Looking whether a signal waits.
    Poll,
    /// Saving and restoring flags.
    Flags,
    /// Guest registers that are kept in the frame, and RIP.
    Registers,
    /// Anything else with the frame, and calls of the engine.
    Other,
}

impl Purpose {
    /// The name in profiles.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Address => "address",
            Self::Check => "check",
            Self::Lookup => "lookup",
            Self::Poll => "poll",
            Self::Flags => "flags",
            Self::Registers => "registers",
            Self::Other => "other",
        }
    }
}

/// Rotations by which a check finds the TLB's set, and a lookup that of the jump cache.
const TLB_ROTATION: u8 = 7;
const JUMP_ROTATION: u8 = 10;

fn uses(i: &Instruction, registers: &[Register]) -> bool {
    let full = |r: Register| registers.contains(&r.full_register());
    let operands = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && full(i.op_register(n)));
    operands || full(i.memory_base()) || full(i.memory_index())
}

const SCRATCH: [Register; 2] = [Register::R14, Register::R15];

fn is_rotation(i: &Instruction, by: u8) -> bool {
    i.mnemonic() == Mnemonic::Rorx && i.immediate8() == by
}

/// Offsets and purposes of all instructions of a fragment; empty if its code cannot be taken apart.
pub fn purposes(code: &[u8]) -> Vec<(usize, Purpose)> {
    let all = parts(code).unwrap_or_default();
    let instructions: Vec<Instruction> =
        all.iter().filter_map(|part| if let Part::Instruction(i) = part { Some(*i) } else { None }).collect();
    let mut found = vec![None; instructions.len()];
    for n in 0..instructions.len() {
        if found[n].is_none() {
            mark(&instructions, n, &mut found);
        }
    }
    let plain = |i: &Instruction| if is_scratch_only(i) { Purpose::Address } else { Purpose::Guest };
    let purpose = |(i, found): (&Instruction, &Option<Purpose>)| (at(i), found.unwrap_or_else(|| plain(i)));
    instructions.iter().zip(&found).map(purpose).collect()
}

fn at(i: &Instruction) -> usize {
    usize::try_from(i.ip()).unwrap_or(usize::MAX)
}

/// Works on scratch registers alone, without memory.
fn is_scratch_only(i: &Instruction) -> bool {
    let memory = i.op_kinds().any(|kind| kind == OpKind::Memory);
    let target = i.op_count() > 0 && i.op_kind(0) == OpKind::Register;
    target
        && SCRATCH.contains(&i.op0_register().full_register())
        && (!memory || i.mnemonic() == Mnemonic::Lea)
}

/// Marks the pattern that has its distinctive instruction at `n`.
fn mark(all: &[Instruction], n: usize, found: &mut [Option<Purpose>]) {
    let i = &all[n];
    if is_rotation(i, TLB_ROTATION) {
        return mark_check(all, n, found);
    }
    if is_rotation(i, JUMP_ROTATION) {
        return mark_until(all, n, found, Purpose::Lookup, 12, |i| {
            i.flow_control() == FlowControl::IndirectBranch
        });
    }
    match i.mnemonic() {
        Mnemonic::Lahf | Mnemonic::Sahf => return mark_flags(all, n, found),
        _ => {}
    }
    let Some(field) = frame_field(i) else { return };
    let name = field_name(field);
    found[n] = Some(match name.as_str() {
        "ALARM" => {
            if let Some(next) = found.get_mut(n + 1) {
                *next = Some(Purpose::Poll);
            }
            Purpose::Poll
        }
        "FLAGS" => Purpose::Flags,
        "PAGE_RIP" | "RIP" | "R13" | "R14" | "R15" => Purpose::Registers,
        name if name.starts_with("DELTA") || name.starts_with("REFILL") || name.starts_with("SPLIT") => {
            Purpose::Check
        }
        name if name.starts_with("LOOKUP") || name.starts_with("JUMPS") => Purpose::Lookup,
        _ => Purpose::Other,
    });
}

/// The lookup of an address: what forms it stands before the rotation, the comparison and the load of the host's page behind.
fn mark_check(all: &[Instruction], n: usize, found: &mut [Option<Purpose>]) {
    found[n] = Some(Purpose::Check);
    for k in (n.saturating_sub(4)..n).rev() {
        if found[k].is_some() || !is_scratch_only(&all[k]) {
            break;
        }
        found[k] = Some(Purpose::Address);
    }
    let end = all.len().min(n + 9);
    for k in n + 1..end {
        let i = &all[k];
        let branch = i.flow_control() == FlowControl::ConditionalBranch;
        let table = i.memory_segment() == Register::GS && uses(i, &SCRATCH);
        let plain = uses(i, &SCRATCH) && !i.op_kinds().any(|kind| kind == OpKind::Memory);
        let delta = frame_field(i).is_some_and(|f| field_name(f).starts_with("DELTA"));
        if !branch && !table && !plain && !delta {
            break;
        }
        found[k] = Some(Purpose::Check);
    }
}

/// Everything from `n` to the first that ends it.
fn mark_until(
    all: &[Instruction],
    n: usize,
    found: &mut [Option<Purpose>],
    purpose: Purpose,
    most: usize,
    ends: impl Fn(&Instruction) -> bool,
) {
    for k in n..all.len().min(n + most) {
        found[k] = Some(purpose);
        if ends(&all[k]) {
            break;
        }
    }
}

/// LAHF and SAHF with what keeps RAX meanwhile.
fn mark_flags(all: &[Instruction], n: usize, found: &mut [Option<Purpose>]) {
    let moves = |i: &Instruction| {
        let keeps = i.mnemonic() == Mnemonic::Mov && uses(i, &[Register::RAX]) && uses(i, &SCRATCH);
        let field = frame_field(i).is_some_and(|f| field_name(f) == "FLAGS");
        // What makes SETO's result OF again, before SAHF.
        let back = i.mnemonic() == Mnemonic::Add && i.op0_register() == Register::AL;
        keeps || field || back || i.mnemonic() == Mnemonic::Seto
    };
    found[n] = Some(Purpose::Flags);
    for k in n + 1..all.len().min(n + 4) {
        if !moves(&all[k]) {
            break;
        }
        found[k] = Some(Purpose::Flags);
    }
    for k in (n.saturating_sub(3)..n).rev() {
        if !moves(&all[k]) {
            break;
        }
        found[k] = Some(Purpose::Flags);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn load_is_address_check_and_the_guests_own() {
        // add rax, rbx; mov rcx, [rdi + 8]; jmp rcx
        let mut page = [0x90; 4096];
        page[..9].copy_from_slice(&[0x48, 0x01, 0xd8, 0x48, 0x8b, 0x4f, 0x08, 0xff, 0xe1]);
        let facts = bt::Facts { variant: bt::Variant::User, ..bt::Facts::MODERN };
        let mut reader = bt::unit::Reader::new(&page, facts.decoding());
        let unit = reader.form(0, 48);
        let fragment = bt::translate(&unit, &mut reader, facts, 0, 0, &|_| true);
        let mut counts = HashMap::new();
        for (_, purpose) in purposes(&fragment.code).into_iter().filter(|(at, _)| *at < fragment.straight) {
            *counts.entry(purpose.name()).or_insert(0) += 1;
        }
        // The first form of the load: lea; rorx, and, xor, cmp, ja, mov.
        assert!(counts["address"] >= 1 && counts["check"] >= 6, "{counts:?}");
        assert!(counts["lookup"] >= 5 && counts["guest"] >= 2, "{counts:?}");
        assert!(counts["registers"] >= 1, "{counts:?}");
    }
}
