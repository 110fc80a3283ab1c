//! Groups: memory accesses of a unit off one base share one check.
//!
//! Before lowering, the unit's accesses are gathered by base (and index) register, as long as those change by constants only (PUSH, POP, ADD RSP).
//! The first access of a group checks the whole range that the group touches, and remembers the difference between host and guest address of
//! its page ([`frame::DELTAS`]); the others add that. A range that does not lie in one page, or is not plain writable memory, leaves to a fragment
//! that begins with this instruction and has no groups ([`super::Facts::plain`]).
//!
//! DEVIATION: the check of a group with a write sets the dirty bit of its page though the write may not come to pass (a fault or a jump in
//! between), as the check of a misaligned access does before the access faults. Only pages that may be written are concerned.
//!
//! INV-GROUP-1: a remembered difference is used only while no translation was taken back since its check: the engine leaves the fragment when
//! an instruction that it did for it took back any.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, Register};

use super::memory::Operand;
use super::registers::{host_number, in_frame};
use super::scratch::Scratch;
use super::{Facts, Lowering, segment, vector};
use crate::emit::{S0, S1, SP};
use crate::frame;
use crate::hints::Form;
use crate::look::{Look, gpr_number};
use crate::unit::Unit;

/// Bytes from a group's first to its last at most: the longer, the more often it crosses a page.
const MAX_RANGE: i32 = 1024;

/// What an access of an instruction is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Access {
    base: Register,
    index: Register,
    scale: u32,
    disp: i32,
    size: i32,
    write: bool,
    /// The operand must be aligned to 16 bytes.
    aligned: bool,
}

/// Accesses that share a check.
struct Group {
    base: (Register, u32),
    index: (Register, u32),
    scale: u32,
    /// AC was changed so often before.
    epoch: u32,
    low: i32,
    high: i32,
    write: bool,
    /// An offset that must be a multiple of 16.
    aligned: Option<i32>,
    members: u32,
}

/// A registers' value as the plan sees it.
#[derive(Clone, Copy, Default)]
struct Value {
    version: u32,
    offset: i32,
}

impl Value {
    /// The instruction writes `r`, which has this value.
    fn change(&mut self, i: &Instruction, r: Register, facts: Facts) {
        let full = r.full_register();
        let (change, size) = match facts.legacy {
            None => (constant_change(i, full), 8),
            Some(_) => (constant_change_legacy(i, full), 4),
        };
        match change.and_then(|c| self.offset.checked_add(c)) {
            Some(offset) if r.size() == size => self.offset = offset,
            _ => *self = Self { version: self.version + 1, offset: 0 },
        }
    }
}

/// Which accesses share checks.
#[derive(Default)]
pub(super) struct Plan {
    groups: Vec<Group>,
    /// For each instruction its group, and the displacement of its access from the group's lowest byte.
    members: Vec<Option<(usize, i32)>>,
    /// Groups whose check was emitted.
    open: u32,
}

fn number(r: Register) -> usize {
    usize::from(gpr_number(r) & 15)
}

/// The access of an instruction, if it can share a check.
fn access(i: &Instruction, facts: Facts, look: &Look) -> Option<Access> {
    // PUSH and its kin are not among those.
    if look.ident && !look.memory {
        return None;
    }
    let write = look.writes;
    let stack = |disp, size, write| Access {
        base: Register::RSP,
        index: Register::None,
        scale: 1,
        disp,
        size,
        write,
        aligned: false,
    };
    if facts.legacy.is_some_and(|l| !l.flat_data || !l.wide_stack) {
        return None;
    }
    if let Some(size) = pushed(i) {
        return Some(stack(-size, size, true));
    }
    match i.code() {
        Code::Pop_r64 if i.op0_register() != Register::RSP => return Some(stack(0, 8, false)),
        Code::Pop_r32 if i.op0_register() != Register::ESP => return Some(stack(0, 4, false)),
        Code::Retnq => return Some(stack(0, 8, false)),
        Code::Retnd => return Some(stack(0, 4, false)),
        _ => {}
    }
    if !look.memory {
        return None;
    }
    let segment = matches!(i.memory_segment(), Register::FS | Register::GS);
    if segment || i.has_rep_prefix() || i.has_repne_prefix() || i.mnemonic() == Mnemonic::Lea {
        return None;
    }
    let bits = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let aligned = match look.ident && i.mnemonic() != Mnemonic::Cmpxchg16b {
        true if bits => return None,
        true => false,
        false => vector::group_access(i, facts)?,
    };
    let size = i.memory_size();
    let size = if size.is_broadcast() { size.element_size() } else { size.size() };
    let (base, index) = (i.memory_base().full_register(), i.memory_index().full_register());
    let based = match facts.legacy {
        None => {
            let wide = |r: Register| r == Register::None || r.is_gpr64();
            i.memory_base() == Register::RIP || i.memory_base().is_gpr64() && wide(i.memory_index())
        }
        Some(_) => segment::address_bits(i) == 32 && i.memory_segment() != Register::CS,
    };
    if !based || !(1..=64).contains(&size) || aligned && size != 16 {
        return None;
    }
    let disp = displacement(i, facts.legacy.is_some())?;
    let scale = i.memory_index_scale();
    Some(Access { base, index, scale, disp, size: size as i32, write, aligned })
}

fn displacement(i: &Instruction, legacy: bool) -> Option<i32> {
    if legacy {
        return Some(segment::displacement(i));
    }
    i32::try_from(i.memory_displacement64() as i64).ok()
}

/// Bytes that an instruction pushes of which a group may take care.
const fn pushed(i: &Instruction) -> Option<i32> {
    match i.code() {
        Code::Push_r64 | Code::Pushq_imm32 | Code::Pushq_imm8 | Code::Call_rel32_64 => Some(8),
        Code::Push_r32 | Code::Pushd_imm32 | Code::Pushd_imm8 | Code::Call_rel32_32 => Some(4),
        _ => None,
    }
}

/// Bytes that an instruction of a group pushes or pops.
const fn stack_bytes(i: &Instruction) -> usize {
    match (pushed(i), i.code()) {
        (Some(4), _) | (None, Code::Pop_r32 | Code::Retnd) => 4,
        _ => 8,
    }
}

/// What an instruction of 32-bit code adds to a register, modulo 4 GiB.
fn constant_change_legacy(i: &Instruction, r: Register) -> Option<i32> {
    let own = i.op0_register().full_register() == r;
    match i.code() {
        Code::Push_r32 | Code::Pushd_imm32 | Code::Pushd_imm8 if r == Register::RSP => Some(-4),
        Code::Pop_r32 if r == Register::RSP && i.op0_register() != Register::ESP => Some(4),
        Code::Add_rm32_imm8 | Code::Add_rm32_imm32 if own => Some(i.immediate(1) as i32),
        Code::Sub_rm32_imm8 | Code::Sub_rm32_imm32 if own => (i.immediate(1) as i32).checked_neg(),
        Code::Inc_rm32 if own => Some(1),
        Code::Dec_rm32 if own => Some(-1),
        Code::Lea_r32_m
            if own && i.memory_base().full_register() == r && i.memory_index() == Register::None =>
        {
            (segment::address_bits(i) == 32).then(|| segment::displacement(i))
        }
        _ => None,
    }
}

/// What an instruction adds to a register that it changes by a constant.
fn constant_change(i: &Instruction, r: Register) -> Option<i32> {
    match i.code() {
        Code::Push_r64 | Code::Pushq_imm32 | Code::Pushq_imm8 if r == Register::RSP => Some(-8),
        Code::Pop_r64 if r == Register::RSP && i.op0_register() != r => Some(8),
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 if i.op0_register() == r => Some(i.immediate(1) as i32),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if i.op0_register() == r => {
            (i.immediate(1) as i32).checked_neg()
        }
        Code::Inc_rm64 if i.op0_register() == r => Some(1),
        Code::Dec_rm64 if i.op0_register() == r => Some(-1),
        Code::Lea_r64_m
            if i.op0_register() == r && i.memory_base() == r && i.memory_index() == Register::None =>
        {
            i32::try_from(i.memory_displacement64() as i64).ok()
        }
        _ => None,
    }
}

impl Plan {
    /// Forgets what is in it.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.members.clear();
        self.open = 0;
    }

    /// The plan of a unit, in an empty one. Completes what was seen of its instructions.
    pub fn make(&mut self, unit: &Unit, looks: &mut [Look], facts: Facts, info: &mut InstructionInfoFactory) {
        self.members.resize(unit.instructions.len(), None);
        let mut values = [Value::default(); 16];
        let mut epoch = 0;
        for (n, (i, look)) in unit.instructions.iter().zip(looks).enumerate() {
            let adapted = || unit.hints.has(i.ip(), Form::Direct) || unit.hints.has(i.ip(), Form::Halves);
            let shared = |look: &Look| access(i, facts, look).filter(|_| !facts.plain && !adapted());
            // What the instruction changes counts for those behind it.
            if look.is_known() {
                if let Some(a) = shared(look) {
                    self.add(n, a, &values, epoch);
                }
                look.each_written(i, info, |r| values[number(r)].change(i, r, facts));
            } else {
                let before = values;
                look.each_written(i, info, |r| values[number(r)].change(i, r, facts));
                if let Some(a) = shared(look) {
                    self.add(n, a, &before, epoch);
                }
            }
            let changes_ac = !look.ident && matches!(i.mnemonic(), Mnemonic::Stac | Mnemonic::Clac);
            epoch += u32::from(changes_ac);
        }
        self.disband(unit);
        self.finish();
    }

    /// Groups that often fail are none.
    fn disband(&mut self, unit: &Unit) {
        if unit.hints.is_empty() {
            return;
        }
        for (number, g) in self.groups.iter_mut().enumerate() {
            let first = self.members.iter().position(|m| m.is_some_and(|(group, _)| group == number));
            let first = first.and_then(|n| unit.instructions.get(n));
            if first.is_some_and(|i| unit.hints.has(i.ip(), Form::Alone)) {
                g.members = 0;
            }
        }
    }

    /// Which groups' checks were emitted, as a mask.
    pub const fn open(&self) -> u32 {
        self.open
    }

    /// Sets what [`Plan::open`] told.
    pub const fn set_open(&mut self, open: u32) {
        self.open = open;
    }

    fn add(&mut self, n: usize, a: Access, values: &[Value; 16], epoch: u32) {
        let value = |r: Register| if r.is_gpr() { values[number(r)] } else { Value::default() };
        let (b, x) = (value(a.base), value(a.index));
        let moved = i64::from(b.offset) + i64::from(x.offset) * i64::from(a.scale);
        let Ok(low) = i32::try_from(i64::from(a.disp) + moved) else { return };
        let Some(high) = low.checked_add(a.size) else { return };
        let (base, index) = ((a.base, b.version), (a.index, x.version));
        let same = self
            .groups
            .iter_mut()
            .enumerate()
            .rev()
            .find(|(_, g)| g.base == base && g.index == index && g.scale == a.scale && g.epoch == epoch);
        if let Some((number, g)) = same
            && g.high.max(high).saturating_sub(g.low.min(low)) <= MAX_RANGE
            && !(a.aligned && g.aligned.is_some_and(|at| (at.wrapping_sub(low)) & 15 != 0))
        {
            (g.low, g.high) = (g.low.min(low), g.high.max(high));
            g.write |= a.write;
            g.members += 1;
            if a.aligned {
                g.aligned = Some(low);
            }
            self.members[n] = Some((number, low));
            return;
        }
        if self.groups.len() < frame::MAX_GROUPS {
            let aligned = a.aligned.then_some(low);
            let (scale, write) = (a.scale, a.write);
            self.groups.push(Group { base, index, scale, epoch, low, high, write, aligned, members: 1 });
            self.members[n] = Some((self.groups.len() - 1, low));
        }
    }

    /// Groups of one are none; lowest bytes are aligned where something must be.
    fn finish(&mut self) {
        for g in &mut self.groups {
            if let Some(at) = g.aligned {
                g.low -= g.low.wrapping_sub(at) & 15;
            }
        }
        for m in &mut self.members {
            *m = m.and_then(|(group, at)| {
                let g = self.groups.get(group)?;
                (g.members > 1).then_some((group, at - g.low))
            });
        }
    }
}

impl Lowering<'_, '_> {
    /// The operand of the current instruction's access at `disp` off the given base and index, if it shares a check with others. Guest flags
    /// are spilled where the check is; otherwise they stay.
    pub(super) fn grouped(&mut self, i: &Instruction, live_before: u32) -> Option<Operand> {
        let (group, above) = self.room.plan.members.get(self.number).copied().flatten()?;
        let stack = !self.look.memory;
        let disp = match pushed(i) {
            Some(size) => -size,
            None if stack => 0,
            None => displacement(i, self.facts.legacy.is_some())?,
        };
        let mut held = self.held.delta == Some(group as u8);
        let first = self.room.misses.len();
        if self.room.plan.open >> group & 1 == 0 {
            let own = super::Own {
                above: above as u16,
                size: if stack { stack_bytes(i) } else { i.memory_size().size() } as u8,
                write: self.look.writes,
            };
            self.open_group(i, group, disp.checked_sub(above)?, stack, live_before, own)?;
            held = true;
        }
        let operand = self.member(i, group, disp, held, stack, first)?;
        self.held.hold_delta(group);
        if operand.base == S0 {
            self.held.lose_s0();
        }
        self.kept.hold_delta(group);
        Some(operand)
    }

    /// The check of a group, at its first access. `low`: displacement of its lowest byte from the registers as they are now.
    fn open_group(
        &mut self,
        i: &Instruction,
        group: usize,
        low: i32,
        stack: bool,
        live_before: u32,
        own: super::Own,
    ) -> Option<()> {
        let g = self.room.plan.groups.get(group)?;
        let (len, write, aligned) = ((g.high - g.low) as usize, g.write, g.aligned.is_some());
        self.spill(live_before);
        self.held = Scratch::default();
        let retry = self.asm.here();
        if stack {
            self.stack_address(low, len, write);
        } else if !self.effective(i, low) {
            return None;
        }
        let first = self.check_range(len, write, retry, aligned, own);
        let last = self.room.misses.len();
        self.asm.store(frame::DELTAS + 8 * group as i32, S1);
        for miss in first..last {
            self.room.plain_exits.push(miss);
        }
        self.room.plan.open |= 1 << group;
        Some(())
    }

    fn member(
        &mut self,
        i: &Instruction,
        group: usize,
        disp: i32,
        held: bool,
        stack: bool,
        first: usize,
    ) -> Option<Operand> {
        let slot = frame::DELTAS + 8 * group as i32;
        let (base, index) = (i.memory_base(), i.memory_index());
        if self.facts.legacy.is_some() {
            return self.member_legacy(i, group, disp, held, stack, first);
        }
        if stack {
            if !held {
                self.asm.load(S1, slot);
            }
            return Some(Operand { base: SP, index: Some(S1), disp, first });
        }
        if base == Register::RIP || index != Register::None {
            if !self.effective(i, disp) {
                return None;
            }
            if !held || in_frame(index) {
                self.asm.load(S1, slot);
            }
            return Some(Operand { base: S0, index: Some(S1), disp: 0, first });
        }
        if in_frame(base) && self.held.find(base) != Some(S0) {
            self.register_to(S0, base);
        }
        if !held {
            self.asm.load(S1, slot);
        }
        if in_frame(base) {
            return Some(Operand { base: S0, index: Some(S1), disp, first });
        }
        Some(Operand { base: host_number(base), index: Some(S1), disp, first })
    }

    /// As [`Lowering::member`], in 32-bit code: the offset from the group's first byte holds modulo 4 GiB only, so the address is computed and cut.
    fn member_legacy(
        &mut self,
        i: &Instruction,
        group: usize,
        disp: i32,
        held: bool,
        stack: bool,
        first: usize,
    ) -> Option<Operand> {
        let slot = frame::DELTAS + 8 * group as i32;
        if !held {
            self.asm.load(S1, slot);
        }
        let (base, index) = (i.memory_base(), i.memory_index());
        if disp == 0 && (stack || base != Register::None && index == Register::None) {
            // A 32-bit register is its 64-bit register (INV-LEG-1).
            let base = if stack { SP } else { host_number(base) };
            return Some(Operand { base, index: Some(S1), disp: 0, first });
        }
        if stack {
            self.stack_address(disp, 0, false);
        } else if !self.effective_legacy(i, disp) {
            return None;
        }
        Some(Operand { base: S0, index: Some(S1), disp: 0, first })
    }
}
