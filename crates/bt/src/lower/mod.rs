//! From a unit to a fragment. Nearly every instruction is itself again (IDENT) with its registers renamed ([`registers`]) and its memory
//! operand behind an inline TLB lookup ([`memory`], scheme S). What kernels do often is emulated in the fragment ([`system`]); what is
//! not known here calls out.
//!
//! Layout of a fragment: the outer entry (in code that does not know its RIP; S0 holds it), the inner entry, the straight line, then what is
//! seldom executed: misses, exits, and the stale exit to which the engine patches the entries when the code has changed.

#![expect(
    clippy::cast_possible_truncation,
    reason = "register numbers, offsets in a page and counts are small"
)]

mod adapt;
mod branch;
mod checked;
mod divide;
mod group;
mod ident;
mod legacy;
mod memory;
mod pair;
mod registers;
mod room;
mod scratch;
mod segment;
mod stack;
mod string;
mod system;
mod touch;
mod vector;

use iced_x86::{Code, FlowControl, Instruction, Mnemonic};

use crate::emit::{Asm, S0};
use crate::frame;
use crate::hints::Hints;
use crate::look::Look;
use crate::normal::Decoding;
use crate::unit::{self, Reader, STATUS, Unit};

pub use legacy::Legacy;
use room::Room;
use scratch::Scratch;
pub use system::TRAP;
pub use touch::Touch;

/// Rights with which code accesses memory: which of the TLBs, and of the jump caches, it asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Variant {
    /// Level 0.
    Supervisor = 0,
    /// Level 0 with RFLAGS.AC set under SMAP: user pages too.
    SupervisorAc = 1,
    /// Level 3.
    User = 2,
}

/// Which x87 and vector instructions may be executed as they are. Ordered: each includes those before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FpLevel {
    /// None: they fault now, or exceptions are unmasked.
    None,
    /// x87 and MMX.
    X87,
    /// Legacy SSE.
    Sse,
    /// VEX.
    Avx,
    /// EVEX and opmasks.
    Avx512,
}

/// How RDTSC and RDTSCP are done.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TimeStamp {
    /// By the interpreter: they may fault, or the guest's counter is not the host's plus an offset.
    Callout,
    /// By the interpreter, reached through a trap of the host: to be measured against the others.
    Trap,
    /// By the host's counter and an offset, in the fragment.
    Inline,
}

/// What the code of a fragment may rely on: part of its key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Facts {
    /// RIP of the page's first byte, if the code may contain it. Else the frame says ([`frame::PAGE_RIP`]), so that the same page at another
    /// address needs no other translation.
    pub page_rip: Option<u64>,
    /// Rights at the first instruction.
    pub variant: Variant,
    /// x87 and vector instructions.
    pub fp: FpLevel,
    /// AMD's decoding of operand-size prefixes on branches.
    pub amd: bool,
    /// EFER.SCE: SYSCALL and SYSRET exist.
    pub syscall: bool,
    /// CR4.SMAP: AC matters at level 0.
    pub smap: bool,
    /// CR4.FSGSBASE.
    pub fsgsbase: bool,
    /// How RDTSC and RDTSCP are done.
    pub rdtsc: TimeStamp,
    /// The host has BMI2.
    pub bmi2: bool,
    /// Every access checks for itself ([`group`]).
    pub plain: bool,
    /// 16- or 32-bit code, and what is known of its segments; None: 64-bit code.
    pub legacy: Option<Legacy>,
}

impl Facts {
    /// 64-bit code at level 0 that does not contain its RIP, on a processor with all that translations know of, set up as Linux does: for who
    /// looks at translations without a machine.
    pub const MODERN: Self = Self {
        page_rip: None,
        variant: Variant::Supervisor,
        fp: FpLevel::Avx512,
        amd: false,
        syscall: true,
        smap: true,
        fsgsbase: true,
        rdtsc: TimeStamp::Inline,
        bmi2: true,
        plain: false,
        legacy: None,
    };

    /// How the bytes are to be decoded.
    #[must_use]
    pub const fn decoding(&self) -> Decoding {
        let bits = match self.legacy {
            None => 64,
            Some(Legacy { bits16: false, .. }) => 32,
            Some(Legacy { bits16: true, .. }) => 16,
        };
        Decoding { bits, amd: self.amd }
    }
}

/// An access of one instruction within the range that a group checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Own {
    /// Bytes from the first that is checked.
    pub above: u16,
    /// Bytes.
    pub size: u8,
    /// It writes.
    pub write: bool,
}

/// Why a site calls the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SiteKind {
    /// A memory access missed: size in bytes, and whether it writes.
    Access {
        /// Bytes.
        size: u8,
        /// It writes.
        write: bool,
    },
    /// The check of a group of accesses failed: bytes from the group's first, and whether one of them writes.
    Group {
        /// Bytes.
        size: u16,
        /// One of them writes.
        write: bool,
        /// The access of the instruction that checks.
        own: Own,
    },
    /// The check of an access that has a second form for what crosses pages ([`crate::hints::Form::Halves`]).
    Halves {
        /// Bytes.
        size: u8,
        /// It writes.
        write: bool,
    },
    /// The second form of such an access: its pages are not at hand.
    Split {
        /// Bytes.
        size: u8,
        /// It writes.
        write: bool,
    },
    /// An access that is handed over at once ([`crate::hints::Form::Direct`]).
    Direct {
        /// Bytes.
        size: u8,
        /// It writes.
        write: bool,
    },
    /// The interpreter does the instruction.
    Callout,
    /// An indirect jump whose target was not found; RSP was moved by so much.
    Branch {
        /// Bytes added to RSP.
        popped: i8,
    },
}

/// A place that calls out.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Offset of the guest instruction in the page of the fragment's first.
    pub guest: u16,
    /// Length of the instruction.
    pub len: u8,
    /// Guest flags are in the host's where the code goes on.
    pub flags_in_host: bool,
    /// Guest x87 and vector registers are in the host's there.
    pub fp_loaded: bool,
    /// The instruction, for the statistics.
    pub code: Code,
    /// Offset of the host code behind the instruction ([`SiteKind::Group`]: of the exit to code without groups; [`SiteKind::Halves`]: of the
    /// second form); 0 if there is none.
    pub done: u16,
    /// A page fault of this access is what the instruction does: nothing comes before it.
    pub faults_first: bool,
    /// What the instruction does to a device, if it does nothing else.
    pub touch: Option<Touch>,
    /// Why.
    pub kind: SiteKind,
}

/// A way out of a fragment at a known place.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Offset of the jump's 32-bit displacement, if it may be linked to another fragment of the page.
    pub place: Option<u32>,
    /// Offset of the code that leaves by this exit.
    pub stub: u32,
    /// Offset of the target from the first byte of the page; outside of the page only in code that knows its RIP.
    pub target: i32,
    /// Rights there.
    pub variant: Variant,
    /// To code without groups.
    pub plain: bool,
}

/// Where a guest instruction's code begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Offset of the guest instruction in its page.
    pub guest: u16,
    /// Offset of its host code in the fragment.
    pub host: u32,
}

/// Translated code.
pub struct Fragment {
    /// Position-independent host code; the outer entry is its first byte.
    pub code: Vec<u8>,
    /// Offset of the inner entry, for jumps within the page.
    pub inner: usize,
    /// Offset of the code that leaves with RIP at this fragment's first instruction, from the inner entry.
    pub stale_inner: usize,
    /// The same from the outer entry.
    pub stale_outer: usize,
    /// Its exits.
    pub exits: Vec<Exit>,
    /// Its sites.
    pub sites: Vec<Site>,
    /// The guest-to-host map: every guest instruction with the host code that begins it.
    pub map: Vec<Place>,
    /// Offset behind the host code of the last guest instruction, where the unit is left if control falls through its end.
    pub leave: usize,
    /// Offset behind the straight line: what follows is seldom executed.
    pub straight: usize,
    /// Offset behind the second forms, which follow the straight line: what follows has no accesses of its own.
    pub accesses: usize,
    /// How many guest instructions always call out.
    pub callouts: usize,
    /// The ranges of the page's bytes that the fragment depends on, each from its first byte to the one behind its last.
    pub ranges: Vec<(u16, u16)>,
    /// Of a fragment that checks itself: the bytes, counted from its first, that may change all the same.
    pub variable: u128,
}

pub use checked::Checked;

/// Bytes of the jump that the engine puts over an entry that is closed.
const ENTRY_BYTES: usize = 5;

struct Lowering<'a, 'p> {
    asm: Asm,
    /// The lists.
    room: Box<Room>,
    /// Offset of the inner entry.
    inner: usize,
    facts: Facts,
    checked: Option<Checked>,
    targets: Targets<'a, 'p>,
    /// Rights at the current instruction.
    variant: Variant,
    /// Guest flags are in the host's; else they are in the frame (or dead).
    in_host: bool,
    /// Guest x87 and vector registers are in the host's.
    fp_loaded: bool,
    site_base: u32,
    exit_base: u32,
    callouts: usize,
    /// Number of the current instruction in the unit.
    number: usize,
    /// What the scratch registers hold before the current instruction, as far as it has not clobbered them, and behind it.
    held: Scratch,
    kept: Scratch,
    hints: &'a Hints,
    making: adapt::Making,
    /// That of the current instruction.
    look: Look,
    /// The second form that was just made.
    second: Option<memory::Halves>,
    /// In so many instructions the code polls, because IF may have become set: 2 behind STI, 1 in its shadow and behind POPF.
    poll_in: u8,
    /// The instruction is the unit's last.
    last: bool,
    /// Control falls through the unit's end.
    falls: bool,
    code: Code,
    /// See [`Site::touch`].
    touch: Option<Touch>,
    /// See [`Site::faults_first`].
    faults_first: bool,
    /// Offset of the instruction that is being translated.
    current: u64,
    /// And of the one behind it.
    next: u64,
}

/// Translates `unit` of the page that `reader` reads. Sites and exits are numbered from the bases, which the engine keeps. `announced` says which instructions
/// the CPU model has.
#[must_use]
pub fn translate(
    unit: &Unit,
    reader: &mut Reader<'_>,
    facts: Facts,
    site_base: u32,
    exit_base: u32,
    announced: &dyn Fn(&Instruction) -> bool,
) -> Fragment {
    translate_as(unit, reader, facts, None, (site_base, exit_base), announced)
}

/// As [`translate`], for code that changes often: the fragment compares its bytes itself whenever it is entered. `unit` is one of
/// [`unit::form_checked`].
#[must_use]
pub fn translate_checked(
    unit: &Unit,
    reader: &mut Reader<'_>,
    facts: Facts,
    checked: Checked,
    bases: (u32, u32),
    announced: &dyn Fn(&Instruction) -> bool,
) -> Fragment {
    translate_as(unit, reader, facts, Some(checked), bases, announced)
}

fn translate_as(
    unit: &Unit,
    reader: &mut Reader<'_>,
    facts: Facts,
    checked: Option<Checked>,
    (site_base, exit_base): (u32, u32),
    announced: &dyn Fn(&Instruction) -> bool,
) -> Fragment {
    let mut l = Lowering::new(Room::take(), unit, reader, facts, checked, (site_base, exit_base));
    let start = unit.instructions.first().map_or(0, Instruction::ip);
    if facts.page_rip.is_none() {
        l.asm.lea(crate::emit::S1, S0, None, -(start as i32));
        l.asm.store(frame::PAGE_RIP, crate::emit::S1);
    }
    let inner = l.asm.here();
    l.inner = inner;
    let failed = l.check_bytes(unit);
    l.look_at(unit);
    let mut open = true;
    for (n, i) in unit.instructions.iter().enumerate() {
        let live_after = l.room.live.get(n + 1).copied().unwrap_or(STATUS);
        l.begin(n);
        l.room.map.push(Place { guest: i.ip() as u16, host: l.asm.here() as u32 });
        l.last = i.next_ip() == unit.end as u64;
        open = l.instruction(i, live_after, announced(i));
    }
    let leave = l.asm.here();
    if open {
        let live = l.room.live.last().copied().unwrap_or(STATUS);
        l.poll_after_shadow(unit.end as u64, live);
        l.falls = true;
        l.leave_to(unit.end as u64, live);
    }
    let straight = l.asm.here();
    l.finish_halves(unit);
    let accesses = l.asm.here();
    l.finish_plain_exits();
    l.finish_misses();
    l.finish_seldom();
    l.finish_exits();
    let stale_inner = l.asm.here();
    l.take_exit(None, start, facts.variant, facts.plain);
    failed.into_iter().for_each(|jump| l.asm.bind_to(jump, stale_inner));
    let stale_outer = l.asm.here();
    if facts.page_rip.is_none() {
        l.asm.store(frame::RIP, S0);
        l.asm.jmp_gs(frame::LEAVE);
    }
    let ranges = l.targets.ranges(unit, std::mem::take(&mut l.room.ranges));
    let fragment = Fragment {
        code: std::mem::take(&mut l.asm.code),
        inner,
        stale_inner,
        stale_outer,
        exits: std::mem::take(&mut l.room.exits),
        sites: std::mem::take(&mut l.room.sites),
        map: std::mem::take(&mut l.room.map),
        leave,
        straight,
        accesses,
        callouts: l.callouts,
        ranges,
        variable: checked.map_or(0, |_| checked::variable_bytes(unit)),
    };
    l.leave_room();
    fragment
}

impl<'a, 'p> Lowering<'a, 'p> {
    fn new(
        mut room: Box<Room>,
        unit: &'a Unit,
        reader: &'a mut Reader<'p>,
        facts: Facts,
        checked: Option<Checked>,
        (site_base, exit_base): (u32, u32),
    ) -> Self {
        let code = std::mem::take(&mut room.code);
        let known = std::mem::take(&mut room.known);
        Lowering {
            asm: Asm::within(code, room.encoder.take(), facts.bmi2),
            room,
            inner: 0,
            facts,
            checked,
            targets: Targets { reader, known, unseen: checked.is_some() },
            variant: facts.variant,
            in_host: false,
            fp_loaded: false,
            site_base,
            exit_base,
            callouts: 0,
            number: 0,
            held: Scratch::default(),
            kept: Scratch::default(),
            hints: &unit.hints,
            making: adapt::Making::Plain,
            look: Look::default(),
            second: None,
            poll_in: 0,
            last: false,
            falls: false,
            code: Code::INVALID,
            touch: None,
            faults_first: false,
            current: 0,
            next: 0,
        }
    }

    /// Leaves the lists to the next translation.
    fn leave_room(self) {
        let mut room = self.room;
        let (code, encoder) = self.asm.into_parts();
        (room.code, room.encoder, room.known) = (code, Some(encoder), self.targets.known);
        room.leave();
    }
}

/// Live flags before each instruction, and after the last, into `live`, which is empty.
fn liveness(unit: &Unit, looks: &[Look], targets: &mut Targets<'_, '_>, live: &mut Vec<u32>) {
    let count = unit.instructions.len();
    live.resize(count + 1, 0);
    let last = unit.instructions.last();
    let mut after = match last {
        Some(i) if i.is_jmp_short_or_near() && !unit::is_narrow_branch(i) => {
            targets.live(i.near_branch_target())
        }
        Some(i) if unit::ends_unit(i) => STATUS,
        _ => targets.live(unit.end as u64),
    };
    live[count] = after;
    for ((i, look), live) in unit.instructions.iter().zip(looks).zip(&mut *live).rev() {
        if !look.falls && unit::is_conditional(i) {
            after |= targets.live(i.near_branch_target());
        }
        after = after & !look.written | look.read;
        *live = after;
    }
}

/// Live flags at places of the page, found once each.
struct Targets<'a, 'p> {
    reader: &'a mut Reader<'p>,
    /// Offset, live flags, offset behind what was looked at.
    known: Vec<(u64, u32, usize)>,
    /// Nothing but the unit may be looked at.
    unseen: bool,
}

impl Targets<'_, '_> {
    fn live(&mut self, offset: u64) -> u32 {
        let Ok(at) = usize::try_from(offset) else { return STATUS };
        if at >= 4096 || self.unseen {
            return STATUS;
        }
        if let Some(known) = self.known.iter().find(|k| k.0 == offset) {
            return known.1;
        }
        let (live, end) = self.reader.live_at(at);
        self.known.push((offset, live, end));
        live
    }

    /// What the unit lies in, and what was looked at for live flags where it may be left; into a list that is empty.
    fn ranges(&self, unit: &Unit, mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
        let start = unit.instructions.first().map_or(0, Instruction::ip);
        ranges.push((start as u16, unit.end.min(4096) as u16));
        ranges.extend(self.known.iter().map(|k| (k.0 as u16, k.2 as u16)));
        ranges
    }
}

impl Lowering<'_, '_> {
    /// What is to be known of the unit before its first instruction is translated.
    fn look_at(&mut self, unit: &Unit) {
        self.room.looks.extend(unit.instructions.iter().map(Look::at));
        liveness(unit, &self.room.looks, &mut self.targets, &mut self.room.live);
        self.room.plan.make(unit, &mut self.room.looks, self.facts, &mut self.room.info);
    }

    /// The instruction of this number is the current one.
    fn begin(&mut self, number: usize) {
        self.number = number;
        self.look = self.room.looks.get(number).copied().unwrap_or_default();
    }

    /// The RIP of an offset in the page (it may lie outside) into a register; flags stay.
    fn rip_to(&mut self, register: u8, offset: u64) {
        let legacy = self.facts.legacy.is_some();
        if let Some(page_rip) = self.facts.page_rip {
            let rip = page_rip.wrapping_add(offset);
            self.asm.mov_imm(register, if legacy { rip & 0xffff_ffff } else { rip });
            return;
        }
        self.asm.load(register, frame::PAGE_RIP);
        if legacy {
            return self.asm.lea32(register, register, None, offset as i32);
        }
        // Offsets of direct jumps fit: 32 bits of displacement and an offset in the page. Others end in a wrong RIP's low
        // bits only if they do not, and then the jump itself was lowered as a callout (see `reachable`).
        self.asm.lea(register, register, None, offset as i32);
    }

    /// Whether [`Lowering::rip_to`] can name an offset.
    fn reachable(&self, offset: u64) -> bool {
        self.facts.page_rip.is_some() || i32::try_from(offset as i64).is_ok()
    }

    fn site(&mut self, kind: SiteKind) -> u32 {
        self.room.sites.push(Site {
            guest: self.current as u16,
            len: (self.next - self.current) as u8,
            flags_in_host: false,
            fp_loaded: self.fp_loaded,
            code: self.code,
            done: 0,
            faults_first: self.faults_first,
            touch: self.touch,
            kind,
        });
        self.site_base + self.room.sites.len() as u32 - 1
    }

    /// Translates one instruction. False: control does not fall through it.
    fn instruction(&mut self, i: &Instruction, live_after: u32, announced: bool) -> bool {
        self.current = i.ip();
        self.next = i.next_ip();
        self.code = i.code();
        self.touch = Touch::of(i);
        // A masked access may leave its first elements out; the target of an indirect call is checked before the push.
        self.faults_first =
            !i.has_op_mask() && (self.look.falls || i.flow_control() != FlowControl::IndirectCall);
        let Look { read, written, .. } = self.look;
        let live_before = live_after & !written | read;
        self.held = std::mem::take(&mut self.kept);
        self.poll_after_shadow(self.current, live_before);
        if !self.look.falls {
            let direct = unit::is_conditional(i) && self.reachable(i.near_branch_target());
            if direct && self.conditional_jump(i, read != 0) {
                return true;
            }
            if !self.terminator(i, live_after) {
                self.interpret_transfer();
            }
            return false;
        }
        // With all exceptions masked WAIT finds none.
        let known = self.look.ident;
        if !known && (is_nop(i) || i.mnemonic() == Mnemonic::Wait && self.facts.fp >= FpLevel::X87) {
            self.kept = self.held;
            return true;
        }
        let reads = read != 0;
        let done = announced && (self.adapted(i, live_before, reads) || self.lower(i, live_before, reads));
        if !done {
            self.callout();
        }
        true
    }

    fn lower(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        if self.checked.is_some() && self.variable_move(i) {
            return true;
        }
        let mark = self.mark();
        let repeats = i.has_rep_prefix() || i.has_repne_prefix();
        let ok = if self.look.ident && !repeats {
            self.ident(i, live_before, reads)
        } else if repeats || i.is_string_instruction() {
            self.string(i, live_before)
        } else {
            match i.mnemonic() {
                Mnemonic::Push => self.push(i, live_before),
                Mnemonic::Pop => self.pop(i, live_before),
                Mnemonic::Leave => self.leave_frame(i, live_before),
                Mnemonic::Div | Mnemonic::Idiv => self.divide(i, live_before),
                _ if self.system(i, live_before) => true,
                _ => self.vector(i, live_before, reads),
            }
        };
        if !ok {
            self.back_to(mark);
        }
        ok
    }

    fn mark(&self) -> Mark {
        Mark {
            here: self.asm.here(),
            misses: self.room.misses.len(),
            sites: self.room.sites.len(),
            plain_exits: self.room.plain_exits.len(),
            open: self.room.plan.open(),
            in_host: self.in_host,
            fp_loaded: self.fp_loaded,
            variant: self.variant,
        }
    }

    /// Undoes an instruction that turned out to have no translation.
    fn back_to(&mut self, mark: Mark) {
        self.asm.code.truncate(mark.here);
        self.room.misses.truncate(mark.misses);
        self.room.sites.truncate(mark.sites);
        self.room.plain_exits.truncate(mark.plain_exits);
        self.room.plan.set_open(mark.open);
        self.in_host = mark.in_host;
        self.fp_loaded = mark.fp_loaded;
        self.variant = mark.variant;
        self.kept = Scratch::default();
    }

    // ---- flags --------------------------------------------------------------------------------------------------

    /// Before code that clobbers the host's flags: saves the guest's if they are there and live.
    fn spill(&mut self, live: u32) {
        if self.in_host && live != 0 {
            self.asm.spill_flags(frame::FLAGS);
            self.held.lose_s0();
        }
        self.in_host = false;
    }

    /// Sees to it that the guest's flags are in the host's.
    fn need_flags(&mut self) {
        if !self.in_host {
            self.asm.restore_flags(frame::FLAGS, S0);
            self.held.lose_s0();
            self.in_host = true;
        }
    }

    // ---- callouts --------------------------------------------------------------------------------------------------------

    fn callout(&mut self) {
        self.callouts += 1;
        self.call_out_by(frame::CALLOUT);
    }

    /// Calls out, by code of the engine that may do the instruction without Rust.
    fn call_out_by(&mut self, how: i32) {
        self.spill(STATUS);
        self.call_engine(how, SiteKind::Callout);
    }

    /// Has the engine do the instruction here. Guest flags are in the frame.
    fn call_engine(&mut self, how: i32, kind: SiteKind) {
        let site = self.site(kind);
        self.asm.call_gs(how);
        self.asm.bytes(&site.to_le_bytes());
        self.in_host = false;
        self.fp_loaded = false;
        if let Some(site) = self.room.sites.last_mut() {
            site.fp_loaded = false;
        }
    }
}

/// What an instruction's lowering is undone to.
struct Mark {
    here: usize,
    misses: usize,
    sites: usize,
    plain_exits: usize,
    open: u32,
    in_host: bool,
    fp_loaded: bool,
    variant: Variant,
}

fn is_nop(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetch
    )
}
