//! A fragment for people: each guest instruction beside the host code made of it, then what is seldom executed, sites and exits.
//!
//! Made from what the translator returns, so that `trellis dump` (no guest at all) and `--trace code` (a running one) show the same.

use std::fmt::Write as _;

use bt::unit::Unit;
use bt::{Fragment, SiteKind, frame};
use iced_x86::{Code, Decoder, DecoderOptions, FastFormatter, Instruction, OpKind, Register};

/// A host instruction, or a number that stands in the code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostLine {
    /// Offset in the fragment.
    pub at: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its disassembly.
    pub text: String,
    /// What it touches in the frame, in words; empty if nothing.
    pub note: String,
    /// It is a number, which is not executed.
    pub is_number: bool,
}

/// A guest instruction with the straight line's code for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestLine {
    /// Its address.
    pub rip: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its disassembly.
    pub text: String,
    /// Its host code; none for an instruction that does nothing.
    pub host: Vec<HostLine>,
}

/// A place that calls out, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SiteLine {
    /// Its number.
    pub number: u32,
    /// Address of the guest instruction.
    pub rip: u64,
    /// The instruction with the form of its operands.
    pub instruction: String,
    /// Why it calls out.
    pub why: String,
}

/// A jump that the engine may link, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExitLine {
    /// Its number.
    pub number: u32,
    /// Offset of the displacement in the fragment, if the exit may be linked.
    pub place: Option<u32>,
    /// The guest address that it leads to.
    pub target: u64,
}

/// A translated unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listing {
    /// Address of the first instruction.
    pub rip: u64,
    /// Rights, in a word.
    pub rights: &'static str,
    /// What comes before the first instruction's code.
    pub entry: Vec<HostLine>,
    /// The straight line.
    pub lines: Vec<GuestLine>,
    /// What is seldom executed.
    pub outside: Vec<HostLine>,
    /// Places that call out.
    pub sites: Vec<SiteLine>,
    /// Jumps to link.
    pub exits: Vec<ExitLine>,
    /// Guest instructions that always call out.
    pub callouts: usize,
    /// Bytes of host code, all in all.
    pub host_bytes: usize,
}

/// What a listing is made of.
pub struct Source<'a> {
    /// The unit.
    pub unit: &'a Unit,
    /// The guest's bytes, from the unit's first on.
    pub bytes: &'a [u8],
    /// Its translation.
    pub fragment: &'a Fragment,
    /// RIP of the page's first byte.
    pub page_rip: u64,
    /// Rights of the code.
    pub variant: bt::Variant,
    /// Numbers of the first site and exit.
    pub bases: (u32, u32),
}

/// The formatter of everything shown.
#[must_use]
pub fn formatter() -> FastFormatter {
    let mut f = FastFormatter::new();
    let options = f.options_mut();
    options.set_use_hex_prefix(true);
    options.set_uppercase_hex(false);
    options.set_space_after_operand_separator(true);
    options.set_rip_relative_addresses(false);
    f
}

/// An instruction's name with the form of its operands, as in `MOV r64, CR0`.
#[must_use]
pub fn form_of(code: iced_x86::Code) -> String {
    code.op_code().instruction_string().to_owned()
}

/// Rights in a word.
#[must_use]
pub const fn rights(variant: bt::Variant) -> &'static str {
    match variant {
        bt::Variant::Supervisor => "supervisor",
        bt::Variant::SupervisorAc => "supervisor-ac",
        bt::Variant::User => "user",
    }
}

impl Listing {
    /// The listing of a translated unit.
    #[must_use]
    pub fn new(source: &Source<'_>) -> Self {
        let Source { unit, fragment, page_rip, .. } = *source;
        let start = unit.instructions.first().map_or(0, Instruction::ip);
        let mut host = source.host_lines();
        let straight = host.partition_point(|line| line.at < fragment.straight);
        let outside = host.split_off(straight);
        let bounds: Vec<usize> = fragment.map.iter().map(|p| p.host as usize).collect();
        let entry_end = bounds.first().map_or(0, |&b| host.partition_point(|line| line.at < b));
        let mut rest = host.split_off(entry_end);
        let entry = host;
        let mut lines = Vec::with_capacity(unit.instructions.len());
        let mut format = formatter();
        for (n, i) in unit.instructions.iter().enumerate() {
            let end = bounds.get(n + 1).copied().unwrap_or(usize::MAX);
            let behind = rest.split_off(rest.partition_point(|line| line.at < end));
            let mine = std::mem::replace(&mut rest, behind);
            let (bytes, text) = source.guest_text(i, start, &mut format);
            lines.push(GuestLine { rip: page_rip.wrapping_add(i.ip()), bytes, text, host: mine });
        }
        Self {
            rip: page_rip.wrapping_add(start),
            rights: rights(source.variant),
            entry,
            lines,
            outside,
            sites: source.sites(),
            exits: source.exits(),
            callouts: fragment.callouts,
            host_bytes: fragment.code.len(),
        }
    }

    /// Host instructions on the straight line, entry included.
    #[must_use]
    pub fn straight_instructions(&self) -> usize {
        let straight = self.lines.iter().flat_map(|l| &l.host);
        self.entry.iter().chain(straight).filter(|line| !line.is_number).count()
    }

    /// Guest bytes of the unit.
    #[must_use]
    pub fn guest_bytes(&self) -> usize {
        self.lines.iter().map(|l| l.bytes.len()).sum()
    }

    /// Host instructions for a guest instruction on the straight line.
    #[must_use]
    pub fn host_per_guest(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts of a unit")]
        let ratio = self.straight_instructions() as f64 / self.lines.len().max(1) as f64;
        ratio
    }

    /// As text, in colours if wanted.
    #[must_use]
    pub fn render(&self, colours: bool) -> String {
        let paint = if colours { Paint::COLOURED } else { Paint::PLAIN };
        render(self, &paint)
    }
}

impl Source<'_> {
    fn host_lines(&self) -> Vec<HostLine> {
        let code = &self.fragment.code;
        let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
        let mut format = formatter();
        let mut lines = Vec::new();
        // In so many instructions a number stands in the code, and what it is.
        let mut number: Option<(u8, &str)> = None;
        while decoder.can_decode() {
            let at = decoder.position();
            if let (Some((0, what)), Some(value)) = (number, code.get(at..at + 4)) {
                let bytes = value.to_vec();
                let value = value.iter().rev().fold(0u32, |n, byte| n << 8 | u32::from(*byte));
                let note = if value == u32::MAX { format!("no {what}") } else { format!("{what} {value}") };
                lines.push(HostLine { at, bytes, text: format!(".long {value:#x}"), note, is_number: true });
                let _at_end = decoder.set_position(at + 4);
                decoder.set_ip(at as u64 + 4);
                number = None;
                continue;
            }
            let i = decoder.decode();
            number = number.map(|(n, what)| (n.saturating_sub(1), what)).or_else(|| number_behind(&i));
            let mut text = String::new();
            format.format(&i, &mut text);
            let bytes = code[at..decoder.position()].to_vec();
            lines.push(HostLine { at, bytes, text, note: note(&i), is_number: false });
        }
        lines
    }

    fn guest_text(&self, i: &Instruction, start: u64, format: &mut FastFormatter) -> (Vec<u8>, String) {
        let at = usize::try_from(i.ip().wrapping_sub(start)).unwrap_or(usize::MAX);
        let bytes = self.bytes.get(at..at.saturating_add(i.len())).unwrap_or_default().to_vec();
        let rip = self.page_rip.wrapping_add(i.ip());
        // Once more, so that addresses in the text are the guest's, not offsets in the page.
        let decoded = Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE).decode();
        let shown = if bytes.len() == i.len() && decoded.code() == i.code() { &decoded } else { i };
        let mut text = String::new();
        format.format(shown, &mut text);
        (bytes, text)
    }

    fn sites(&self) -> Vec<SiteLine> {
        (self.bases.0..)
            .zip(&self.fragment.sites)
            .map(|(number, s)| SiteLine {
                number,
                rip: self.page_rip.wrapping_add(u64::from(s.guest)),
                instruction: form_of(s.code),
                why: match s.kind {
                    SiteKind::Access { size, write: true } => format!("a write of {size} misses"),
                    SiteKind::Access { size, write: false } => format!("a read of {size} misses"),
                    SiteKind::Group { size, .. } => format!("the check of a group of {size} bytes fails"),
                    SiteKind::Halves { size, .. } => format!("an access of {size} misses or crosses a page"),
                    SiteKind::Split { size, .. } => format!("{size} bytes on two pages, one of them unknown"),
                    SiteKind::Direct { size, .. } => format!("{size} bytes that are no plain memory"),
                    SiteKind::Callout => "the interpreter does it".to_owned(),
                    SiteKind::Branch { .. } => "its target is not known".to_owned(),
                },
            })
            .collect()
    }

    fn exits(&self) -> Vec<ExitLine> {
        (self.bases.1..)
            .zip(&self.fragment.exits)
            .map(|(number, e)| ExitLine {
                number,
                place: e.place,
                target: self.page_rip.wrapping_add_signed(i64::from(e.target)),
            })
            .collect()
    }
}

/// Addresses of the code that fills the TLB: for accesses of their own, and for groups.
const REFILLS: [std::ops::Range<i32>; 3] = [
    frame::REFILL..frame::SECOND_TLB,
    frame::REFILL_GROUP..frame::REFILL_GROUP + 16 * frame::VARIANTS,
    frame::SPLIT..frame::JOIN,
];

/// Addresses of the code that looks up targets of 16- and 32-bit code.
const RETURNS: std::ops::Range<i32> = frame::RETURN..frame::RETURN + 8 * frame::VARIANTS;
const LEGACY_LOOKUPS: std::ops::Range<i32> = frame::LOOKUP_LEGACY..frame::LOOKUP_LEGACY + 8 * frame::VARIANTS;

/// The number of a site or an exit that stands in the code behind some calls: after how many more instructions, and what it is. See
/// `bt::lower`: the engine finds it by the return address.
fn number_behind(i: &Instruction) -> Option<(u8, &'static str)> {
    if i.code() != Code::Call_rm64 || i.segment_prefix() != Register::GS {
        return None;
    }
    match displacement(i) {
        frame::TAKE_EXIT => Some((0, "exit")),
        frame::CALLOUT => Some((0, "site")),
        d if frame::HELPERS.contains(&d) => Some((0, "site")),
        d if (frame::LOOKUP..frame::REFILL).contains(&d) => Some((0, "site")),
        d if LEGACY_LOOKUPS.contains(&d) || RETURNS.contains(&d) => Some((0, "site")),
        d if REFILLS.iter().any(|refills| refills.contains(&d)) => Some((1, "site")),
        _ => None,
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "a 32-bit displacement")]
const fn displacement(i: &Instruction) -> i32 {
    i.memory_displacement64() as i64 as i32
}

/// What a host instruction touches in the frame.
fn note(i: &Instruction) -> String {
    let reaches = i.segment_prefix() == Register::GS && i.op_kinds().any(|kind| kind == OpKind::Memory);
    if reaches { frame_field(displacement(i)) } else { String::new() }
}

const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Single fields of the frame.
const FIELDS: &[(i32, &str)] = &[
    (frame::RIP, "rip"),
    (frame::FLAGS, "flags"),
    (frame::SITE, "site"),
    (frame::ALARM, "alarm"),
    (frame::EXIT, "exit"),
    (frame::SIGNALS, "signals"),
    (frame::LEAVE, "leave"),
    (frame::CALLOUT, "callout"),
    (frame::CR0, "cr0"),
    (frame::CR2, "cr2"),
    (frame::CR3, "cr3"),
    (frame::CR4, "cr4"),
    (frame::IRET, "iret, or callout"),
    (frame::FP_LOAD, "load fp state"),
    (frame::FS_BASE, "fs base"),
    (frame::GS_BASE, "gs base"),
    (frame::KERNEL_GS_BASE, "kernel gs base"),
    (frame::ADDRESS, "address"),
    (frame::PAGE_RIP, "page rip"),
    (frame::SYSFLAGS, "system flags"),
    (frame::MODE, "mode"),
    (frame::FP_LOADED, "fp loaded"),
    (frame::HOST_MXCSR, "host mxcsr"),
    (frame::LSTAR, "lstar"),
    (frame::SYSCALL_KEEP, "syscall keeps"),
    (frame::SYSCALL_KEEP_STATUS, "syscall keeps of flags"),
    (frame::TSC_OFFSET, "tsc offset"),
    (frame::TSC_AUX, "tsc aux"),
    (frame::TAKE_EXIT, "take exit"),
    (frame::JOIN, "write both pages"),
    (frame::DONE, "done"),
];

/// A field of 16- and 32-bit code's segments, in words.
fn segment_field(disp: i32) -> Option<String> {
    const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    let name = |n: i32| usize::try_from(n).ok().and_then(|n| SEGMENTS.get(n)).copied();
    match disp {
        frame::CODE_START => Some("first page of cs".to_owned()),
        frame::CODE_SIZE => Some("size of cs".to_owned()),
        d if (frame::SEGMENT_BASES..frame::SEGMENT_ENDS).contains(&d) => {
            name((d - frame::SEGMENT_BASES) / 8).map(|s| format!("{s} base"))
        }
        d if (frame::SEGMENT_ENDS..frame::CODE_START).contains(&d) => {
            let (n, write) = ((d - frame::SEGMENT_ENDS) / 16, d & 8 != 0);
            name(n).map(|s| format!("{s} end for {}", if write { "writes" } else { "reads" }))
        }
        _ => None,
    }
}

/// A place in the frame, in words.
fn frame_field(disp: i32) -> String {
    const RIGHTS: [&str; 3] = ["supervisor", "supervisor-ac", "user"];
    let rights = |n: i32| usize::try_from(n).ok().and_then(|n| RIGHTS.get(n)).copied().unwrap_or("?");
    if let Some((_, name)) = FIELDS.iter().find(|(at, _)| *at == disp) {
        return (*name).to_owned();
    }
    let slot = usize::try_from((disp - frame::GPR) / 8).unwrap_or(usize::MAX);
    if disp >= frame::GPR
        && let Some(name) = REGISTERS.get(slot)
    {
        return format!("guest {name}");
    }
    let temps = frame::TEMP..frame::LOOKUP;
    let lookups = frame::LOOKUP..frame::REFILL;
    let (jumps, tlb) =
        (frame::JUMPS..frame::JUMPS + frame::JUMP_CLASSES * frame::JUMP_STRIDE, frame::TLB..frame::LOGS);
    let groups = frame::DELTAS..frame::DELTAS + 8 * i32::try_from(frame::MAX_GROUPS).unwrap_or(0);
    if groups.contains(&disp) {
        format!("group {}", (disp - frame::DELTAS) / 8)
    } else if temps.contains(&disp) {
        format!("temporary {}", (disp - frame::TEMP) / 8)
    } else if lookups.contains(&disp) {
        format!("look up, {}", rights((disp - frame::LOOKUP) / 8))
    } else if RETURNS.contains(&disp) {
        format!("return elsewhere, {}", rights((disp - frame::RETURN) / 8))
    } else if LEGACY_LOOKUPS.contains(&disp) {
        format!("look up legacy, {}", rights((disp - frame::LOOKUP_LEGACY) / 8))
    } else if let Some(note) = segment_field(disp) {
        note
    } else if let Some(refills) = REFILLS.iter().find(|refills| refills.contains(&disp)) {
        let n = disp - refills.start;
        let what = match refills.start {
            frame::REFILL_GROUP => "refill group",
            frame::SPLIT => "bring together",
            _ => "refill",
        };
        format!("{what} {}, {}", if n & 8 == 0 { "read" } else { "write" }, rights(n / 16))
    } else if jumps.contains(&disp) {
        let n = disp - frame::JUMPS;
        let what = if n & frame::JUMP_HOSTS == 0 { "rip" } else { "host" };
        let class = n / frame::JUMP_STRIDE;
        let kind = if class < frame::VARIANTS { "" } else { " legacy" };
        format!("jump cache{kind} {what}, {}", rights(class % frame::VARIANTS))
    } else if tlb.contains(&disp) {
        let n = disp - frame::TLB;
        let what = ["read tag", "write tag", "host page", "host minus guest"];
        let what = what[usize::try_from(n / 8 % 4).unwrap_or(0)];
        format!("tlb {what}, {}", rights(n / frame::TLB_STRIDE))
    } else {
        format!("frame {disp:#x}")
    }
}

/// Escape sequences.
struct Paint {
    head: &'static str,
    guest: &'static str,
    dim: &'static str,
    note: &'static str,
    end: &'static str,
}

impl Paint {
    const PLAIN: Self = Self { head: "", guest: "", dim: "", note: "", end: "" };
    const COLOURED: Self =
        Self { head: "\x1b[1m", guest: "\x1b[36m", dim: "\x1b[2m", note: "\x1b[32m", end: "\x1b[0m" };
}

/// Columns of the guest's disassembly: at least, at most.
const GUEST_COLUMNS: (usize, usize) = (20, 44);
/// Columns of the host's disassembly, where a note follows.
const HOST_COLUMNS: usize = 40;

fn render(l: &Listing, p: &Paint) -> String {
    let width = l.lines.iter().map(|line| line.text.len()).max().unwrap_or(0);
    let width = width.clamp(GUEST_COLUMNS.0, GUEST_COLUMNS.1);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}unit {:#x}: {} guest instructions, {} bytes, {}{}",
        p.head,
        l.rip,
        l.lines.len(),
        l.guest_bytes(),
        l.rights,
        p.end
    );
    let blank = " ".repeat(18 + width);
    for host in &l.entry {
        let _ = writeln!(out, "{blank} | {}", host_text(host, p));
    }
    for line in &l.lines {
        let guest = format!("{:016x}  {}{:<width$}{}", line.rip, p.guest, line.text, p.end);
        let mut host = line.host.iter();
        let first = host.next().map(|h| host_text(h, p)).unwrap_or_default();
        let _ = writeln!(out, "{}", format!("{guest} | {first}").trim_end());
        host.for_each(|h| {
            let _ = writeln!(out, "{blank} | {}", host_text(h, p));
        });
    }
    let _ = writeln!(out, "{}seldom executed{}", p.head, p.end);
    for host in &l.outside {
        let _ = writeln!(out, "{blank} | {}", host_text(host, p));
    }
    for e in &l.exits {
        let how = e.place.map_or_else(|| "never linked".to_owned(), |at| format!("to be linked at {at:04x}"));
        let _ = writeln!(out, "exit {}: to {:#x}, {how}", e.number, e.target);
    }
    for s in &l.sites {
        let _ = writeln!(out, "site {}: {:#x} {}: {}", s.number, s.rip, s.instruction, s.why);
    }
    let _ = writeln!(
        out,
        "{}{} host instructions on the straight line, {:.2} for a guest instruction; {} call out; {} host bytes in all, {:.1} for a guest byte{}",
        p.head,
        l.straight_instructions(),
        l.host_per_guest(),
        l.callouts,
        l.host_bytes,
        ratio(l.host_bytes, l.guest_bytes()),
        p.end
    );
    out
}

fn ratio(a: usize, b: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "sizes of a unit")]
    let quotient = a as f64 / b.max(1) as f64;
    quotient
}

fn host_text(h: &HostLine, p: &Paint) -> String {
    if h.note.is_empty() {
        return format!("{}{:04x}{}  {}", p.dim, h.at, p.end, h.text);
    }
    format!("{}{:04x}{}  {:<HOST_COLUMNS$} {}; {}{}", p.dim, h.at, p.end, h.text, p.note, h.note, p.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bt::{Facts, FpLevel, Variant};

    fn listing(code: &[u8], variant: Variant) -> Listing {
        let mut page = [6; 4096];
        page[0x100..0x100 + code.len()].copy_from_slice(code);
        let user = variant == Variant::User;
        let facts = Facts {
            page_rip: (!user).then_some(0xffff_ffff_8100_0000),
            variant,
            fp: FpLevel::Avx,
            ..Facts::MODERN
        };
        let mut reader = bt::unit::Reader::new(&page, facts.decoding());
        let unit = reader.form(0x100, 48);
        let fragment = bt::translate(&unit, &mut reader, facts, 7, 3, &|_| true);
        Listing::new(&Source {
            unit: &unit,
            bytes: &page[0x100..],
            fragment: &fragment,
            page_rip: 0xffff_ffff_8100_0000,
            variant,
            bases: (7, 3),
        })
    }

    /// add rax, rbx; mov rcx, [rdi+8]; nop; cpuid; jmp back
    const CODE: &[u8] = &[0x48, 0x01, 0xd8, 0x48, 0x8b, 0x4f, 8, 0x90, 0x0f, 0xa2, 0xeb, 0xf4];

    #[test]
    fn every_host_byte_is_shown_once_in_order() {
        for variant in [Variant::Supervisor, Variant::User] {
            let l = listing(CODE, variant);
            let straight = l.lines.iter().flat_map(|line| &line.host);
            let all: Vec<_> = l.entry.iter().chain(straight).chain(&l.outside).collect();
            let mut at = 0;
            for line in all {
                assert_eq!(line.at, at);
                at += line.bytes.len();
            }
            assert_eq!(at, l.host_bytes);
        }
    }

    #[test]
    fn guest_instructions_keep_their_addresses_bytes_and_code() {
        let l = listing(CODE, Variant::Supervisor);
        assert_eq!(l.guest_bytes(), CODE.len());
        assert_eq!(l.lines[0].text, "add rax, rbx");
        assert_eq!(l.lines[0].host.last().unwrap().text, "add rax, rbx");
        assert!(l.lines[2].host.is_empty(), "a NOP costs nothing");
        assert_eq!(l.lines[3].host.iter().filter(|h| h.is_number).count(), 1, "CPUID's site");
        assert_eq!(l.straight_instructions(), l.lines.iter().map(|line| line.host.len()).sum::<usize>() - 1);
        assert!(l.lines[4].text.contains("0xffffffff81000100"), "{}", l.lines[4].text);
        assert_eq!(l.exits[0].target, 0xffff_ffff_8100_0100);
        assert_eq!(l.exits[0].number, 3);
    }

    #[test]
    fn frame_accesses_and_sites_are_named() {
        let l = listing(CODE, Variant::User);
        let text = l.render(false);
        for expected in
            ["tlb read tag, user", "page rip", "; alarm", "MOV r64, r/m64: a read of 8 misses", "site 7"]
        {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(!text.contains('\x1b') && l.render(true).contains('\x1b'));
        assert_eq!(l.sites[0].rip, 0xffff_ffff_8100_0103);
    }

    #[test]
    fn frame_fields_have_their_names() {
        for (disp, name) in [
            (frame::GPR + 8 * 14, "guest r14"),
            (frame::LOOKUP + 16, "look up, user"),
            (frame::REFILL + 24, "refill write, supervisor-ac"),
            (frame::JUMPS + frame::JUMP_STRIDE + frame::JUMP_HOSTS, "jump cache host, supervisor-ac"),
            (frame::TLB + 2 * frame::TLB_STRIDE + 16, "tlb host page, user"),
            (0x4f0, "frame 0x4f0"),
        ] {
            assert_eq!(frame_field(disp), name);
        }
    }
}
