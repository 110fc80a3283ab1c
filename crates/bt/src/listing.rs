//! What a fragment's code consists of: instructions, and the numbers that stand behind calls of the engine. For `dump`, golden files and the
//! fuzzer; the way of translated code does not come by here.

use std::fmt::Write as _;

use iced_x86::{Code, Decoder, DecoderOptions, FastFormatter, Instruction, Register};

use crate::frame;

/// A piece of a fragment.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// Host code; its RIP is its offset in the fragment.
    Instruction(Instruction),
    /// The number of a site or an exit, at an offset.
    Number(usize, u32),
}

impl Part {
    /// Offset of its first byte.
    #[must_use]
    pub fn offset(&self) -> usize {
        match self {
            Self::Instruction(i) => usize::try_from(i.ip()).unwrap_or(usize::MAX),
            Self::Number(at, _) => *at,
        }
    }
}

/// A field of the frame that an instruction names absolutely: `gs:[disp]`.
#[must_use]
pub fn frame_field(i: &Instruction) -> Option<i32> {
    let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
    let there =
        i.memory_segment() == Register::GS && absolute && i.op_kinds().any(|k| k == iced_x86::OpKind::Memory);
    there.then(|| i32::try_from(i.memory_displacement64()).ok()).flatten()
}

/// Instructions between a call and its number; None if no number follows.
fn number_behind(i: &Instruction) -> Option<usize> {
    if i.code() != Code::Call_rm64 {
        return None;
    }
    let refills = frame::REFILL..frame::REFILL + 16 * frame::VARIANTS;
    let group_refills = frame::REFILL_GROUP..frame::REFILL_GROUP + 16 * frame::VARIANTS;
    let lookups = [frame::LOOKUP, frame::LOOKUP_LEGACY, frame::RETURN].map(|at| at..at + 8 * frame::VARIANTS);
    let splits = frame::SPLIT..frame::SPLIT + 16 * frame::VARIANTS;
    match frame_field(i)? {
        frame::CALLOUT | frame::TAKE_EXIT => Some(0),
        d if frame::HELPERS.contains(&d) => Some(0),
        at if lookups.iter().any(|l| l.contains(&at)) => Some(0),
        // The jump that tries again.
        at if refills.contains(&at) || group_refills.contains(&at) || splits.contains(&at) => Some(1),
        _ => None,
    }
}

/// Takes a fragment's code apart from its first byte to its last. None: it is not made of whole instructions and numbers.
#[must_use]
pub fn parts(code: &[u8]) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut number_in = None;
    while decoder.position() < code.len() {
        if number_in == Some(0) {
            let at = decoder.position();
            let bytes = code.get(at..at + 4)?;
            parts.push(Part::Number(at, u32::from_le_bytes(bytes.try_into().ok()?)));
            decoder.set_position(at + 4).ok()?;
            decoder.set_ip(at as u64 + 4);
            number_in = None;
            continue;
        }
        let i = decoder.decode();
        if i.is_invalid() {
            return None;
        }
        number_in = number_behind(&i).or_else(|| number_in.map(|n: usize| n - 1));
        parts.push(Part::Instruction(i));
    }
    number_in.is_none().then_some(parts)
}

/// The name of a place in the frame.
#[must_use]
pub fn field_name(at: i32) -> String {
    const RIGHTS: [&str; 3] = ["supervisor", "ac", "user"];
    const NAMES: &[(i32, &str)] = &[
        (frame::JOIN, "JOIN"),
        (frame::PAIRS, "PAIRS"),
        (frame::PAIRS_END, "PAIRS_END"),
        (frame::RIP, "RIP"),
        (frame::FLAGS, "FLAGS"),
        (frame::SITE, "SITE"),
        (frame::ALARM, "ALARM"),
        (frame::EXIT, "EXIT"),
        (frame::SIGNALS, "SIGNALS"),
        (frame::LEAVE, "LEAVE"),
        (frame::CALLOUT, "CALLOUT"),
        (frame::IRET, "IRET"),
        (frame::DO_CPUID, "DO_CPUID"),
        (frame::DO_XSAVE, "DO_XSAVE"),
        (frame::DO_XRSTOR, "DO_XRSTOR"),
        (frame::DO_SWITCH, "DO_SWITCH"),
        (frame::DO_INVLPG, "DO_INVLPG"),
        (frame::DO_RDMSR, "DO_RDMSR"),
        (frame::DO_WRMSR, "DO_WRMSR"),
        (frame::NULLED, "NULLED"),
        (frame::CR0, "CR0"),
        (frame::CR3, "CR3"),
        (frame::CR4, "CR4"),
        (frame::FP_LOAD, "FP_LOAD"),
        (frame::FS_BASE, "FS_BASE"),
        (frame::GS_BASE, "GS_BASE"),
        (frame::KERNEL_GS_BASE, "KERNEL_GS_BASE"),
        (frame::ENGINE, "ENGINE"),
        (frame::ADDRESS, "ADDRESS"),
        (frame::PAGE_RIP, "PAGE_RIP"),
        (frame::SYSFLAGS, "SYSFLAGS"),
        (frame::MODE, "MODE"),
        (frame::FP_LOADED, "FP_LOADED"),
        (frame::FP_AREA, "FP_AREA"),
        (frame::FP_MASK, "FP_MASK"),
        (frame::HOST_MXCSR, "HOST_MXCSR"),
        (frame::LSTAR, "LSTAR"),
        (frame::SYSCALL_KEEP, "SYSCALL_KEEP"),
        (frame::SYSCALL_KEEP_STATUS, "SYSCALL_KEEP_STATUS"),
        (frame::TSC_OFFSET, "TSC_OFFSET"),
        (frame::TSC_AUX, "TSC_AUX"),
        (frame::TAKE_EXIT, "TAKE_EXIT"),
        (frame::DONE, "DONE"),
        (frame::MEMORY, "MEMORY"),
        (frame::SECOND_TLB, "SECOND_TLB"),
        (frame::CODE_START, "CODE_START"),
        (frame::CODE_SIZE, "CODE_SIZE"),
    ];
    let within = |from: i32, each: i32, count: i32| {
        let n = at.wrapping_sub(from);
        (at >= from && n < each * count).then(|| (n / each, n % each))
    };
    let rights = |n: i32| usize::try_from(n).ok().and_then(|n| RIGHTS.get(n)).copied().unwrap_or("?");
    if let Some((_, name)) = NAMES.iter().find(|(field, _)| *field == at) {
        return (*name).to_owned();
    }
    if let Some((n, 0)) = within(frame::GPR, 8, 16) {
        return format!("{:?}", Register::RAX + n.unsigned_abs());
    }
    if let Some((n, 0)) = within(frame::TEMP, 8, 4) {
        return format!("TEMP{n}");
    }
    if let Some((n, 0)) = within(frame::DELTAS, 8, 24) {
        return format!("DELTA{n}");
    }
    if let Some((n, 0)) = within(frame::SELECTORS, 4, 6) {
        return format!("{:?}_SELECTOR", Register::ES + n.unsigned_abs());
    }
    if let Some((n, 0)) = within(frame::LOOKUP, 8, frame::VARIANTS) {
        return format!("LOOKUP_{}", rights(n));
    }
    if let Some((n, 0)) = within(frame::RETURN, 8, frame::VARIANTS) {
        return format!("LOOKUP_RETURN_{}", rights(n));
    }
    if let Some((n, 0)) = within(frame::LOOKUP_LEGACY, 8, frame::VARIANTS) {
        return format!("LOOKUP_LEGACY_{}", rights(n));
    }
    if let Some((n, 0)) = within(frame::SEGMENT_BASES, 8, 6) {
        return format!("{:?}_BASE", Register::ES + n.unsigned_abs());
    }
    if let Some((n, kind)) = within(frame::SEGMENT_ENDS, 16, 6) {
        let end = if kind == 0 { "READ_END" } else { "WRITE_END" };
        return format!("{:?}_{end}", Register::ES + n.unsigned_abs());
    }
    if let Some((n, kind)) = within(frame::REFILL, 16, frame::VARIANTS) {
        return format!("REFILL_{}_{}", rights(n), if kind == 0 { "read" } else { "write" });
    }
    if let Some((n, kind)) = within(frame::REFILL_GROUP, 16, frame::VARIANTS) {
        return format!("REFILL_GROUP_{}_{}", rights(n), if kind == 0 { "read" } else { "write" });
    }
    if let Some((n, kind)) = within(frame::SPLIT, 16, frame::VARIANTS) {
        return format!("SPLIT_{}_{}", rights(n), if kind == 0 { "read" } else { "write" });
    }
    if let Some((n, part)) = within(frame::TLB, frame::TLB_STRIDE, frame::VARIANTS) {
        let field = match part {
            0 => "read",
            8 => "write",
            16 => "page",
            24 => "delta",
            _ => "?",
        };
        return format!("TLB_{}.{field}", rights(n));
    }
    if let Some((n, part)) = within(frame::JUMPS, frame::JUMP_STRIDE, frame::JUMP_CLASSES) {
        let (field, set) =
            if part & frame::JUMP_HOSTS == 0 { ("rip", part) } else { ("host", part - frame::JUMP_HOSTS) };
        let kind = if n < frame::VARIANTS { "" } else { "_LEGACY" };
        return format!("JUMPS{kind}_{}.{field}+{:#x}", rights(n % frame::VARIANTS), set / 8);
    }
    format!("{at:#x}")
}

/// An instruction as text, places in the frame by name.
#[must_use]
pub fn text(i: &Instruction) -> String {
    let mut formatted = String::new();
    FastFormatter::new().format(i, &mut formatted);
    let named = i.memory_segment() == Register::GS && i.op_kinds().any(|k| k == iced_x86::OpKind::Memory);
    let (Some(open), Some(close)) = (formatted.find("gs:["), formatted.find(']')) else { return formatted };
    let Ok(disp) = i32::try_from(i.memory_displacement64()) else { return formatted };
    if !named {
        return formatted;
    }
    let mut inside = String::new();
    for (r, scale) in [(i.memory_base(), 1), (i.memory_index(), i.memory_index_scale())] {
        if r != Register::None {
            let scale = if scale == 1 { String::new() } else { format!("*{scale}") };
            let _ = write!(inside, "{r:?}{scale}+");
        }
    }
    let inside = inside.to_lowercase() + &field_name(disp);
    format!("{}gs:[{inside}]{}", &formatted[..open], &formatted[close + 1..])
}
