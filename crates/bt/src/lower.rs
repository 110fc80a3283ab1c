//! From a unit to a fragment. Nearly every instruction is itself again (IDENT) with its registers renamed (see [`crate::frame`])
//! and its memory operand behind an inline TLB lookup (scheme S). What is not known here calls out.

#![expect(
    clippy::cast_possible_truncation,
    reason = "register numbers, offsets in a page and counts are small"
)]

use iced_x86::{Code, Encoder, FlowControl, Instruction, Mnemonic, OpAccess, OpKind, Register, UsedRegister};

use x86::decode::condition;

use crate::emit::{Asm, Fixup, S0, S1, SP};
use crate::frame;
use crate::unit::{self, STATUS, Unit};

/// What the code of a fragment may rely on: part of its key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Facts {
    /// RIP of the page's first byte.
    pub page_rip: u64,
    /// User mode: which TLB is asked.
    pub user: bool,
    /// AMD's decoding of operand-size prefixes on branches.
    pub amd: bool,
    /// Instructions per unit at most.
    pub limit: usize,
}

/// A place that calls out, for an instruction or for a memory access that misses.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// RIP of the guest instruction.
    pub rip: u64,
    /// RIP of the one behind it.
    pub next: u64,
    /// The memory access: size in bytes (0 for a callout) and whether it writes.
    pub size: usize,
    /// See `size`.
    pub write: bool,
}

/// A direct jump to another fragment, not yet linked.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Offset of the jump's 32-bit displacement.
    pub place: usize,
    /// Guest RIP of the target.
    pub target: u64,
    /// The target lies in this page, so that the link holds as long as the fragments do.
    pub same_page: bool,
}

/// Translated code.
pub struct Fragment {
    /// Position-independent host code; the entry is its first byte.
    pub code: Vec<u8>,
    /// Its exits.
    pub exits: Vec<Exit>,
    /// Its sites.
    pub sites: Vec<Site>,
    /// Guest instructions.
    pub guest_instructions: usize,
    /// How many of them call out.
    pub callouts: usize,
    /// The page's 64-byte lines that the fragment depends on.
    pub lines: u64,
}

/// A memory access whose miss code stands behind the fragment.
struct Miss {
    jump: Fixup,
    retry: usize,
    done: usize,
    site: u32,
    /// Displacement of the tags that were compared.
    tags: i32,
    /// The instruction leaves its flags in the host's.
    flags_after: bool,
}

struct Lowering<'a> {
    asm: Asm,
    facts: Facts,
    page: &'a [u8; 4096],
    /// Guest flags are in the host's; else they are in the frame (or dead).
    in_host: bool,
    misses: Vec<Miss>,
    leaves: Vec<Fixup>,
    exits: Vec<Exit>,
    sites: Vec<Site>,
    site_base: u32,
    exit_base: u32,
    callouts: usize,
    /// Offset of the instruction that is being translated.
    current: u64,
    /// And of the one behind it.
    next: u64,
}

/// Translates `unit`. Sites and exits are numbered from the bases, which the engine keeps. `announced` says which instructions
/// the CPU model has.
#[must_use]
pub fn translate(
    unit: &Unit,
    page: &[u8; 4096],
    facts: Facts,
    site_base: u32,
    exit_base: u32,
    announced: &dyn Fn(&Instruction) -> bool,
) -> Fragment {
    let mut l = Lowering {
        asm: Asm::default(),
        facts,
        page,
        in_host: false,
        misses: Vec::new(),
        leaves: Vec::new(),
        exits: Vec::new(),
        sites: Vec::new(),
        site_base,
        exit_base,
        callouts: 0,
        current: 0,
        next: 0,
    };
    let live = liveness(unit, page, facts);
    let mut open = true;
    for (i, &live_after) in unit.instructions.iter().zip(&live[1..]) {
        open = l.instruction(i, live_after, announced(i));
    }
    if open {
        l.leave_to(unit.end as u64, live.last().copied().unwrap_or(STATUS));
    }
    l.finish_misses();
    Fragment {
        code: l.asm.code,
        exits: l.exits,
        sites: l.sites,
        guest_instructions: unit.instructions.len(),
        callouts: l.callouts,
        lines: lines_of(unit),
    }
}

/// The lines that a unit lies in, and those that were looked at for live flags where it ends.
fn lines_of(unit: &Unit) -> u64 {
    let start = unit.instructions.first().map_or(0, |i| i.ip());
    let mut mask = lines(start, unit.end as u64);
    let mut look = |at: u64| {
        if at < 4096 {
            mask |= lines(at, (at + unit::PEEK_BYTES).min(4096));
        }
    };
    look(unit.end as u64);
    if let Some(i) = unit.instructions.last()
        && (i.is_jcc_short_or_near() || i.is_jmp_short_or_near())
    {
        look(i.near_branch_target());
    }
    mask
}

/// The lines from offset `start` to `end` (exclusive, above `start`).
const fn lines(start: u64, end: u64) -> u64 {
    let last = if end == 0 { 0 } else { (end - 1) / 64 };
    (u64::MAX << ((start / 64) & 63)) & (u64::MAX >> (63 - (last & 63)))
}

/// Live flags before each instruction, and after the last.
fn liveness(unit: &Unit, page: &[u8; 4096], facts: Facts) -> Vec<u32> {
    let mut live = vec![0; unit.instructions.len() + 1];
    let last = unit.instructions.last();
    live[unit.instructions.len()] = match last {
        Some(i) if unit::ends_unit(i) => match i.flow_control() {
            FlowControl::ConditionalBranch => {
                target_live(i.near_branch_target(), page, facts) | target_live(unit.end as u64, page, facts)
            }
            FlowControl::UnconditionalBranch => target_live(i.near_branch_target(), page, facts),
            _ => STATUS,
        },
        _ => target_live(unit.end as u64, page, facts),
    };
    for (n, i) in unit.instructions.iter().enumerate().rev() {
        let (read, written) = unit::flag_effects(i);
        live[n] = live[n + 1] & !written | read;
    }
    live
}

fn target_live(offset: u64, page: &[u8; 4096], facts: Facts) -> u32 {
    match usize::try_from(offset) {
        Ok(o) if o < 4096 => unit::live_at(page, o, facts.amd),
        _ => STATUS,
    }
}

/// Guest registers that live in the frame.
fn in_frame(r: Register) -> bool {
    matches!(r.full_register(), Register::R13 | Register::R14 | Register::R15)
}

fn frame_slot(r: Register) -> i32 {
    frame::GPR + 8 * r.full_register().number() as i32
}

/// The host register number of a guest register that is not in the frame.
fn host_number(r: Register) -> u8 {
    match r.full_register() {
        Register::RSP => SP,
        full => full.number() as u8,
    }
}

/// `r` in the size of `like`.
fn sized(number: u8, like: Register) -> Register {
    let base = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => {
            // AL…BL are followed by AH…BH, then SPL…R15L.
            return if number < 4 {
                Register::AL + u32::from(number)
            } else {
                Register::SPL + u32::from(number - 4)
            };
        }
    };
    base + u32::from(number)
}

/// Instructions that may be executed as they are, their operands renamed.
fn is_ident(i: &Instruction) -> bool {
    use Mnemonic as M;
    let plain = matches!(
        i.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Bsf
            | M::Bsr
            | M::Movbe
            | M::Clc
            | M::Stc
            | M::Cmc
    );
    let bit_test = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && (i.op0_kind() == OpKind::Register || i.op1_kind() != OpKind::Register);
    let conditional =
        i.condition_code() != iced_x86::ConditionCode::None && i.flow_control() == FlowControl::Next;
    let gprs_only = (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr());
    (plain || bit_test || conditional) && gprs_only
}

fn is_nop(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Nop | M::Endbr64 | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta | M::Prefetchw
    )
}

impl Lowering<'_> {
    fn rip(&self, offset: u64) -> u64 {
        self.facts.page_rip.wrapping_add(offset)
    }

    fn site(&mut self, size: usize, write: bool) -> u32 {
        let (rip, next) = (self.rip(self.current), self.rip(self.next));
        self.sites.push(Site { rip, next, size, write });
        self.site_base + self.sites.len() as u32 - 1
    }

    /// Translates one instruction. False: control does not fall through it.
    fn instruction(&mut self, i: &Instruction, live_after: u32, announced: bool) -> bool {
        self.current = i.ip();
        self.next = i.next_ip();
        let (read, written) = unit::flag_effects(i);
        let live_before = live_after & !written | read;
        match i.flow_control() {
            FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => {
                self.leave_to(i.near_branch_target(), live_after);
                return false;
            }
            FlowControl::ConditionalBranch if i.is_jcc_short_or_near() => {
                self.conditional(i, live_after);
                return false;
            }
            FlowControl::Call if i.is_call_near() => {
                self.call(i);
                return false;
            }
            FlowControl::IndirectBranch if i.is_jmp_near_indirect() && i.op0_kind() == OpKind::Register => {
                self.spill(live_after);
                self.register_to(S0, i.op0_register());
                self.leave_indirect();
                return false;
            }
            FlowControl::Return if matches!(i.code(), Code::Retnq) => {
                self.ret();
                return false;
            }
            FlowControl::Next => {}
            _ => {
                self.callout();
                self.leave_after_callout();
                return false;
            }
        }
        if is_nop(i) {
            return true;
        }
        let done = announced
            && !i.has_rep_prefix()
            && !i.has_repne_prefix()
            && self.lower(i, live_before, read != 0);
        if !done {
            self.callout();
        }
        true
    }

    fn lower(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        let mark = (self.asm.here(), self.misses.len(), self.sites.len(), self.in_host);
        let ok = match i.mnemonic() {
            Mnemonic::Push => self.push(i, live_before),
            Mnemonic::Pop => self.pop(i, live_before),
            _ if is_ident(i) => self.ident(i, live_before, reads),
            _ => false,
        };
        if !ok {
            self.asm.code.truncate(mark.0);
            self.misses.truncate(mark.1);
            self.sites.truncate(mark.2);
            self.in_host = mark.3;
        }
        ok
    }

    // ---- flags --------------------------------------------------------------------------------------------------

    /// Before code that clobbers the host's flags: saves the guest's if they are there and live.
    fn spill(&mut self, live: u32) {
        if self.in_host && live != 0 {
            self.asm.spill_flags(frame::FLAGS);
        }
        self.in_host = false;
    }

    // ---- memory ---------------------------------------------------------------------------------------------------

    /// The effective address into [`S0`].
    fn address(&mut self, i: &Instruction) -> bool {
        let (base, index) = (i.memory_base(), i.memory_index());
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        if base.is_ip() {
            let target = self.rip(i.memory_displacement64());
            self.asm.mov_imm(S0, target);
        } else {
            let Ok(disp) = i32::try_from(i.memory_displacement64() as i64) else { return false };
            let sizes_ok = [base, index].iter().all(|r| *r == Register::None || r.size() >= 4);
            if !sizes_ok || i.memory_displ_size() == 4 && base == Register::None && index == Register::None {
                return false;
            }
            let index = match index {
                Register::None => None,
                r if in_frame(r) => {
                    self.asm.load(S1, frame_slot(r));
                    Some((S1, scale))
                }
                r => Some((host_number(r), scale)),
            };
            let base = match base {
                Register::None => {
                    self.asm.mov_imm(S0, 0);
                    S0
                }
                r if in_frame(r) => {
                    self.asm.load(S0, frame_slot(r));
                    S0
                }
                r => host_number(r),
            };
            self.asm.lea(S0, base, index, disp);
            let narrow =
                [i.memory_base(), i.memory_index()].iter().any(|r| r.size() == 4 && *r != Register::None);
            if narrow {
                self.asm.zero_extend(S0);
            }
        }
        match i.memory_segment() {
            Register::FS => self.asm.load(S1, frame::FS_BASE),
            Register::GS => self.asm.load(S1, frame::GS_BASE),
            _ => return true,
        }
        if i.mnemonic() != Mnemonic::Lea {
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
        }
        true
    }

    /// Scheme S: from the linear address in [`S0`] to a host address `S0 + S1`. Clobbers flags. `retry` is where the
    /// address computation began.
    fn check(&mut self, size: usize, write: bool, retry: usize) -> usize {
        let table = frame::TLB + if self.facts.user { frame::TLB_STRIDE } else { 0 };
        let tags = table + if write { 8 } else { 0 };
        let asm = &mut self.asm;
        asm.mov(S1, S0);
        asm.shr(S1, 7);
        asm.and32(S1, (frame::TLB_ENTRIES - 1) << 5);
        asm.xor_index(S0, S1, tags);
        asm.cmp_imm(S0, 4096 - size as i32);
        let jump = asm.jcc(7);
        asm.load_index(S1, S1, table + 16);
        self.in_host = false;
        let site = self.site(size, write);
        self.misses.push(Miss { jump, retry, done: 0, site, tags, flags_after: false });
        self.misses.len() - 1
    }

    /// The instruction of miss `n` is complete here.
    fn complete(&mut self, n: usize, flags_after: bool) {
        let here = self.asm.here();
        if let Some(m) = self.misses.get_mut(n) {
            m.done = here;
            m.flags_after = flags_after;
        }
    }

    // ---- plain instructions ------------------------------------------------------------------------------------------

    fn ident(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        let (_, written) = unit::flag_effects(i);
        let touches = i.rflags_modified() & STATUS != 0;
        // Flags that the instruction keeps must be in the host's when it writes others.
        let needs = reads
            || touches && live_before & !written != 0
            || touches && written != STATUS && live_before != 0;
        if memory && i.mnemonic() != Mnemonic::Lea {
            return self.ident_memory(i, live_before, needs, touches);
        }
        if i.mnemonic() == Mnemonic::Lea {
            return self.lea(i);
        }
        if needs && !self.in_host {
            self.asm.restore_flags(frame::FLAGS, S0);
            self.in_host = true;
        }
        let Some((renamed, used)) = rename(i, &[S0, S1]) else { return false };
        self.load_frame_registers(&used);
        if !self.encode(&renamed) {
            return false;
        }
        self.store_frame_registers(i, &used);
        if touches {
            self.in_host = true;
        }
        true
    }

    fn lea(&mut self, i: &Instruction) -> bool {
        if i.op0_register().size() == 2 || !self.address(i) {
            return false;
        }
        let to = i.op0_register();
        if to.size() == 4 {
            self.asm.zero_extend(S0);
        }
        if in_frame(to) {
            self.asm.store(frame_slot(to), S0);
        } else {
            self.asm.mov(host_number(to), S0);
        }
        true
    }

    fn ident_memory(&mut self, i: &Instruction, live_before: u32, needs: bool, touches: bool) -> bool {
        let size = i.memory_size().size();
        if size == 0 || size > 8 {
            return false;
        }
        self.spill(live_before);
        let retry = self.asm.here();
        if !self.address(i) {
            return false;
        }
        let write = writes_memory(i);
        let miss = self.check(size, write, retry);
        let Some((mut renamed, used)) = rename(i, &[S1]) else { return false };
        renamed.set_segment_prefix(Register::None);
        renamed.set_memory_base(Register::R14);
        renamed.set_memory_index_scale(1);
        renamed.set_memory_displacement64(0);
        renamed.set_memory_displ_size(0);
        if used.is_empty() {
            renamed.set_memory_index(Register::R15);
        } else {
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
            renamed.set_memory_index(Register::None);
        }
        if needs {
            if used.is_empty() {
                self.asm.lea(S0, S0, Some((S1, 0)), 0);
                renamed.set_memory_index(Register::None);
            }
            self.asm.restore_flags(frame::FLAGS, S1);
        }
        self.load_frame_registers(&used);
        if !self.encode(&renamed) {
            return false;
        }
        self.store_frame_registers(i, &used);
        if touches {
            self.in_host = true;
        }
        let flags_after = self.in_host;
        self.complete(miss, flags_after);
        true
    }

    fn load_frame_registers(&mut self, used: &[(Register, u8)]) {
        for &(guest, host) in used {
            self.asm.load(host, frame_slot(guest));
        }
    }

    fn store_frame_registers(&mut self, i: &Instruction, used: &[(Register, u8)]) {
        for &(guest, host) in used {
            if writes_register(i, guest) {
                self.asm.store(frame_slot(guest), host);
            }
        }
    }

    fn encode(&mut self, i: &Instruction) -> bool {
        let mut encoder = Encoder::new(64);
        let ok = encoder.encode(i, 0).is_ok();
        if ok {
            self.asm.bytes(&encoder.take_buffer());
        }
        ok
    }

    // ---- stack -------------------------------------------------------------------------------------------------------

    fn push(&mut self, i: &Instruction, live_before: u32) -> bool {
        if !matches!(i.code(), Code::Push_r64 | Code::Pushq_imm32 | Code::Pushq_imm8) {
            return false;
        }
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.lea(S0, SP, None, -8);
        let miss = self.check(8, true, retry);
        let r = i.op0_register();
        if i.op0_kind() == OpKind::Register && !in_frame(r) {
            self.asm.store_sum(S0, S1, host_number(r));
        } else {
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
            if i.op0_kind() == OpKind::Register {
                self.asm.load(S1, frame_slot(r));
            } else {
                self.asm.mov_imm(S1, i.immediate(0));
            }
            self.store_s1_at_s0();
        }
        self.asm.lea(SP, SP, None, -8);
        self.complete(miss, false);
        true
    }

    /// `mov [r14], r15`
    fn store_s1_at_s0(&mut self) {
        self.asm.bytes(&[0x4d, 0x89, 0x3e]);
    }

    fn pop(&mut self, i: &Instruction, live_before: u32) -> bool {
        if i.code() != Code::Pop_r64 {
            return false;
        }
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, SP);
        let miss = self.check(8, false, retry);
        let r = i.op0_register();
        if r == Register::RSP {
            self.asm.load_sum(SP, S0, S1);
        } else {
            let host = if in_frame(r) { S0 } else { host_number(r) };
            self.asm.load_sum(host, S0, S1);
            if in_frame(r) {
                self.asm.store(frame_slot(r), S0);
            }
            self.asm.lea(SP, SP, None, 8);
        }
        self.complete(miss, false);
        true
    }

    // ---- control flow --------------------------------------------------------------------------------------------------

    fn register_to(&mut self, to: u8, r: Register) {
        if in_frame(r) {
            self.asm.load(to, frame_slot(r));
        } else {
            self.asm.mov(to, host_number(r));
        }
    }

    /// Goes on at a known place of the page's address range (an offset; it may lie outside of the page).
    fn leave_to(&mut self, offset: u64, live: u32) {
        self.spill(live);
        let target = self.rip(offset);
        // Loops must see signals: a jump that does not go forward polls (INV-BT-2).
        let backward = self.is_backward(offset);
        let poll = backward.then(|| self.poll());
        let same_page = offset < 4096;
        if same_page {
            let jump = self.asm.jmp();
            let stub = self.asm.here();
            self.asm.bind_to(jump, stub);
            self.exits.push(Exit { place: Asm::place(jump), target, same_page });
            let number = self.exit_base + self.exits.len() as u32 - 1;
            self.asm.store_imm32(frame::EXIT, number + 1);
        } else {
            // Another page: by the jump cache, whose entry is known now.
            let entry = frame::JUMPS + 16 * frame::jump_set(target) as i32;
            self.asm.mov_imm(S0, target);
            self.asm.cmp_gs(entry, S0);
            let other = self.asm.jcc(5);
            self.asm.jmp_gs(entry + 8);
            self.asm.bind(other);
        }
        if let Some(p) = poll {
            self.asm.bind(p);
        }
        self.asm.mov_imm(S0, target);
        self.asm.store(frame::RIP, S0);
        self.asm.jmp_gs(frame::LEAVE);
    }

    /// Whether a jump from the current instruction may close a loop: it goes back, or to another page.
    fn is_backward(&self, offset: u64) -> bool {
        offset <= self.current || offset >= 4096
    }

    /// Jumps (to be bound) when a signal waits. Clobbers flags and [`S1`].
    fn poll(&mut self) -> Fixup {
        self.asm.load(S1, frame::SIGNALS);
        self.asm.deref32(S1);
        self.asm.test_gs32(frame::POLL_MASK, S1);
        self.asm.jcc(5)
    }

    fn conditional(&mut self, i: &Instruction, live_after: u32) {
        if !self.in_host {
            self.asm.restore_flags(frame::FLAGS, S0);
            self.in_host = true;
        }
        let cc = condition(i);
        let taken = self.asm.jcc(cc);
        let flags = self.in_host;
        self.leave_to(i.next_ip(), live_after & target_live(i.next_ip(), self.page, self.facts));
        self.asm.bind(taken);
        self.in_host = flags;
        self.leave_to(
            i.near_branch_target(),
            live_after & target_live(i.near_branch_target(), self.page, self.facts),
        );
    }

    fn call(&mut self, i: &Instruction) {
        self.spill(STATUS);
        let retry = self.asm.here();
        self.asm.lea(S0, SP, None, -8);
        let miss = self.check(8, true, retry);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        let next = self.rip(i.next_ip());
        self.asm.mov_imm(S1, next);
        self.store_s1_at_s0();
        self.asm.lea(SP, SP, None, -8);
        // A miss that the interpreter completed has jumped already: it leaves.
        self.misses[miss].done = usize::MAX;
        self.leave_to(i.near_branch_target(), 0);
    }

    fn ret(&mut self) {
        self.spill(STATUS);
        let retry = self.asm.here();
        self.asm.mov(S0, SP);
        let miss = self.check(8, false, retry);
        self.asm.load_sum(S0, S0, S1);
        self.asm.lea(SP, SP, None, 8);
        self.misses[miss].done = usize::MAX;
        self.leave_indirect();
    }

    /// Goes on at the guest address in [`S0`]: inline lookup, after a poll.
    fn leave_indirect(&mut self) {
        let poll = self.poll();
        let asm = &mut self.asm;
        asm.mov(S1, S0);
        asm.shr(S1, 10);
        asm.xor(S1, S0);
        asm.and32(S1, frame::JUMP_ENTRIES - 1);
        asm.shl32(S1, 4);
        asm.cmp_index(S1, frame::JUMPS, S0);
        let other = asm.jcc(5);
        asm.jmp_index(S1, frame::JUMPS + 8);
        asm.bind(other);
        asm.bind(poll);
        asm.store(frame::RIP, S0);
        asm.jmp_gs(frame::LEAVE);
    }

    // ---- callouts --------------------------------------------------------------------------------------------------------

    fn callout(&mut self) {
        self.callouts += 1;
        self.spill(STATUS);
        let site = self.site(0, false);
        self.asm.store_imm32(frame::SITE, site);
        self.asm.call_gs(frame::CALLOUT);
        self.asm.test(S1);
        let leave = self.asm.jcc(5);
        self.leaves.push(leave);
        self.in_host = false;
    }

    fn leave_after_callout(&mut self) {
        self.asm.jmp_gs(frame::LEAVE);
    }

    /// Out-of-line code: misses call out and retry, or find their instruction done.
    fn finish_misses(&mut self) {
        for m in std::mem::take(&mut self.misses) {
            self.asm.bind(m.jump);
            // The XOR undoes itself: the address again.
            self.asm.xor_index(S0, S1, m.tags);
            self.asm.store(frame::ADDRESS, S0);
            self.asm.store_imm32(frame::SITE, m.site);
            self.asm.call_gs(frame::SLOW);
            // 0: filled, try again; 1: the interpreter did the instruction; else leave.
            self.asm.cmp_imm(S1, 1);
            let retry = self.asm.jcc(2);
            self.asm.bind_to(retry, m.retry);
            let leave = self.asm.jcc(7);
            self.leaves.push(leave);
            if m.done == usize::MAX {
                let f = self.asm.jmp();
                self.leaves.push(f);
            } else {
                if m.flags_after {
                    self.asm.restore_flags(frame::FLAGS, S0);
                }
                self.asm.jmp_to(m.done);
            }
        }
        for f in std::mem::take(&mut self.leaves) {
            self.asm.bind(f);
        }
        self.asm.jmp_gs(frame::LEAVE);
    }
}

/// The instruction with its register operands renamed, and the frame registers with the scratch registers that stand for
/// them. None if there are not enough of those, or a register cannot be renamed.
fn rename(i: &Instruction, scratch: &[u8]) -> Option<(Instruction, Vec<(Register, u8)>)> {
    let mut renamed = *i;
    let mut used: Vec<(Register, u8)> = Vec::new();
    for n in 0..i.op_count() {
        if i.op_kind(n) != OpKind::Register {
            continue;
        }
        let r = i.op_register(n);
        let number = if in_frame(r) {
            let full = r.full_register();
            match used.iter().find(|(g, _)| *g == full) {
                Some(&(_, host)) => host,
                None => {
                    let host = *scratch.get(used.len())?;
                    used.push((full, host));
                    host
                }
            }
        } else if r.full_register() == Register::RSP && r != Register::AH {
            SP
        } else {
            continue;
        };
        renamed.set_op_register(n, sized(number, r));
    }
    Some((renamed, used))
}

fn writes_memory(i: &Instruction) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(i);
    info.used_memory().iter().any(|m| is_write(m.access()))
}

fn writes_register(i: &Instruction, guest: Register) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(i);
    info.used_registers()
        .iter()
        .any(|u: &UsedRegister| u.register().full_register() == guest && is_write(u.access()))
}

const fn is_write(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}
