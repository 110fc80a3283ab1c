//! INV-BT-3: translated code touches guest memory only where the TLB let it, the frame, and the host's stack as we left it.
//!
//! Precisely, for every instruction of a fragment:
//! - It is no privileged or system instruction, far branch, interrupt, or access by FS; it changes no segment or control register; it names
//!   host RSP in PUSH RAX, POP RAX, calls of the engine, and what [`pairs`] follows.
//! - It calls and jumps only through engine fields and jump caches of the frame, and to instructions of the fragment; it returns only where a pair says so.
//! - An access by GS is to a constant place within the frame, or is the TLB or a jump cache indexed by R15 behind the mask that bounds it.
//! - Any other access is by a host address that was derived from the guest address by a TLB entry whose tag was compared on every way
//!   there, for at least as many bytes in the page as the access (with its displacement) takes, and in the tag for writes if it writes.
//!
//! - In 16- and 32-bit code, the upper halves of RAX to RDI and of the guest's RSP are clear wherever control leaves the straight line (INV-LEG-1). There,
//!   forms hold modulo 4 GiB, and an address is looked up only if it was cut to 32 bits.
//!
//! The last but one is proved by running the straight line abstractly. A register holds a linear form of symbols and a constant, or one of the
//! steps from a guest address to a host address. At a label, what the ways there disagree on is forgotten; engine calls forget R14 and R15. The
//! interpreter does what the instruction itself would do to registers, so forms of the guest's registers stand (that is what
//! the differential tests are for). Of repeated string instructions only the start is proved, the count is `bt::lower::string`'s arithmetic.

use std::collections::HashMap;

use super::pairs::{self, Does, Pairs};
use bt::Fragment;
use bt::frame;
use bt::listing::{Part, frame_field, text};
use bt::unit::Unit;
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind, Register,
};

/// Where guest RSP is.
const R13: usize = 13;
const R14: usize = 14;
const R15: usize = 15;
/// Where RAX to RDI are.
const GUEST_32: [usize; 8] = [0, 1, 2, 3, 5, 6, 7, R13];

/// `base + index * scale + offset`, of symbols.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Form {
    base: Option<u32>,
    index: Option<(u32, u32)>,
    offset: i64,
}

impl Form {
    const fn symbol(n: u32) -> Self {
        Self { base: Some(n), index: None, offset: 0 }
    }

    const fn constant(offset: i64) -> Self {
        Self { base: None, index: None, offset }
    }

    fn plus(self, n: i64) -> Self {
        Self { offset: self.offset.wrapping_add(n), ..self }
    }

    /// How far this is above another.
    fn above(&self, other: &Self) -> Option<i64> {
        let same = self.base == other.base && self.index == other.index;
        same.then(|| self.offset.wrapping_sub(other.offset))
    }
}

/// What was compared: so many bytes from a guest address on lie in a page that may be read, or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Checked {
    from: Form,
    room: i64,
    write: bool,
    /// Of which variant's TLB.
    table: i32,
}

/// What a register holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Value {
    Unknown,
    Linear(Form),
    /// In 16- and 32-bit code: 64 bits, the lower of which are a form.
    Wide(Form),
    /// An address, rotated for the TLB's index; then masked.
    Rotated(Form),
    Index(Form),
    /// An address XORed with a tag; after the comparison its offset in the page, of which the room is known.
    Offset(Checked),
    /// The host page of such an address.
    Page(Checked),
    /// Host minus guest address.
    Delta(Checked),
    /// A host address with so much room behind it.
    Host {
        room: i64,
        write: bool,
    },
    /// Masked for the jump cache.
    Target,
}

#[derive(Clone, PartialEq, Debug)]
struct State {
    registers: [Value; 16],
    slots: HashMap<i32, Value>,
    /// RAX on the host's stack.
    pushed: Option<Value>,
    pairs: Pairs,
}

struct Verifier<'a> {
    /// 16- or 32-bit code.
    legacy: bool,
    unit: &'a Unit,
    fragment: &'a Fragment,
    parts: &'a [Part],
    state: State,
    /// States that jumps bring to offsets ahead.
    arriving: HashMap<u64, Vec<State>>,
    symbols: u32,
    /// R15 before the instruction, if it is a constant.
    split_size: Option<i64>,
    info: InstructionInfoFactory,
}

/// Checks INV-BT-3.
pub fn verify(unit: &Unit, fragment: &Fragment, parts: &[Part], legacy: bool) {
    let mut v = Verifier {
        legacy,
        unit,
        fragment,
        parts,
        state: State {
            registers: [Value::Unknown; 16],
            slots: HashMap::new(),
            pushed: None,
            pairs: Pairs::default(),
        },
        arriving: HashMap::new(),
        symbols: 0,
        split_size: None,
        info: InstructionInfoFactory::new(),
    };
    for r in 0..16 {
        v.forget(r);
    }
    v.run();
}

/// Fields of the frame whose contents are followed.
fn followed(slot: i32) -> bool {
    let registers = frame::GPR + 8 * 13..frame::GPR + 8 * 16;
    let temporaries = frame::TEMP..frame::TEMP + 8 * 4;
    let deltas = frame::DELTAS..frame::DELTAS + 8 * 24;
    slot == frame::PAGE_RIP
        || [registers, temporaries, deltas].iter().any(|r| r.contains(&slot)) && slot % 8 == 0
}

fn is_jump(i: &Instruction) -> bool {
    i.is_jcc_short_or_near() || i.is_jmp_short_or_near() || bt::unit::count(i).is_some()
}

/// A call that does not come back.
fn is_way_out(i: &Instruction) -> bool {
    let lookups = [frame::LOOKUP, frame::LOOKUP_LEGACY, frame::RETURN].map(|at| at..at + 8 * frame::VARIANTS);
    i.is_call_near_indirect()
        && frame_field(i).is_some_and(|f| f == frame::TAKE_EXIT || lookups.iter().any(|l| l.contains(&f)))
}

/// Fields that hold addresses of code.
fn is_engine_code(field: i32) -> bool {
    let rights = frame::VARIANTS;
    let tables = [
        frame::REFILL..frame::REFILL + 16 * rights,
        frame::REFILL_GROUP..frame::REFILL_GROUP + 16 * rights,
        frame::LOOKUP..frame::LOOKUP + 8 * rights,
        frame::LOOKUP_LEGACY..frame::LOOKUP_LEGACY + 8 * rights,
        frame::RETURN..frame::RETURN + 8 * rights,
        frame::SPLIT..frame::SPLIT + 16 * rights,
    ];
    matches!(field, frame::JOIN | frame::LEAVE | frame::CALLOUT | frame::FP_LOAD | frame::TAKE_EXIT)
        || tables.iter().chain([&frame::HELPERS]).any(|t| t.contains(&field)) && field % 8 == 0
        || is_jump_host(field)
}

/// The host addresses of a jump cache.
fn is_jump_host(field: i32) -> bool {
    let at = field - frame::JUMPS;
    (0..frame::JUMP_CLASSES * frame::JUMP_STRIDE).contains(&at) && at & frame::JUMP_HOSTS != 0 && at % 8 == 0
}

const fn writes(a: OpAccess) -> bool {
    matches!(a, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// What an instruction adds to a 64-bit register.
fn constant_change(i: &Instruction, r: Register) -> Option<i64> {
    let own = i.op0_kind() == OpKind::Register && i.op0_register() == r;
    match i.code() {
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 if own => Some(i.immediate(1).cast_signed()),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if own => {
            Some(i.immediate(1).cast_signed().wrapping_neg())
        }
        Code::Inc_rm64 if own => Some(1),
        Code::Dec_rm64 if own => Some(-1),
        // Of 32-bit code.
        Code::Inc_rm32 if i.op0_register().full_register() == r => Some(1),
        Code::Dec_rm32 if i.op0_register().full_register() == r => Some(-1),
        _ => None,
    }
}

fn memory_operand(i: &Instruction) -> bool {
    i.op_kinds().any(|k| k == OpKind::Memory)
}

impl Verifier<'_> {
    fn fresh(&mut self) -> Value {
        self.symbols += 1;
        Value::Linear(Form::symbol(self.symbols))
    }

    fn forget(&mut self, r: usize) {
        self.state.registers[r] = self.fresh();
    }

    fn fail(&self, i: &Instruction, why: &str) -> ! {
        for part in self.parts {
            match part {
                Part::Instruction(i) => eprintln!("{:4x}  {}", i.ip(), text(i)),
                Part::Number(at, n) => eprintln!("{at:4x}  .number {n}"),
            }
        }
        panic!(
            "INV-BT-3 at {:#x} ({}): {why}; R14 {:?}, R15 {:?}",
            i.ip(),
            text(i),
            self.state.registers[R14],
            self.state.registers[R15]
        )
    }

    fn run(&mut self) {
        let instructions: Vec<Instruction> = self
            .parts
            .iter()
            .filter_map(|p| if let Part::Instruction(i) = p { Some(*i) } else { None })
            .collect();
        // Second forms of accesses stand behind the straight line.
        let (seconds, straight) = (self.fragment.straight as u64, self.fragment.accesses as u64);
        let starts: Vec<u64> = instructions.iter().map(Instruction::ip).collect();
        let passes = self.passes(&instructions, straight);
        // A second form does what the first does, as the interpreter does: forms of the guest's registers stand.
        let returns = |i: &Instruction| i.ip() >= seconds && i.near_branch_target() < seconds;
        let outside: Vec<u64> = instructions
            .iter()
            .filter(|i| {
                is_jump(i)
                    && (i.ip() >= straight && !passes.contains(&i.ip()) || returns(i) && i.ip() < straight)
            })
            .map(Instruction::near_branch_target)
            .chain(self.fragment.sites.iter().map(|s| u64::from(s.done)).filter(|at| *at != 0))
            .collect();
        let backward: Vec<(u64, u64)> = instructions
            .iter()
            .filter(|i| i.ip() < straight && is_jump(i) && i.near_branch_target() <= i.ip() && !returns(i))
            .map(|i| (i.near_branch_target(), i.ip()))
            .collect();
        let mut reachable = true;
        for (n, i) in instructions.iter().enumerate() {
            self.kind(i, &starts);
            if self.legacy && reachable && i.ip() < straight {
                self.check_halves(i, straight);
            }
            if i.ip() >= straight {
                self.out_of_line(i);
                continue;
            }
            for state in self.arriving.remove(&i.ip()).unwrap_or_default() {
                if reachable {
                    self.meet(&state);
                } else {
                    self.state = state;
                    reachable = true;
                }
            }
            if outside.contains(&i.ip()) {
                reachable = true;
                if i.ip() >= seconds {
                    // Whoever comes here does so from elsewhere: nothing is known.
                    self.state.slots.clear();
                    (0..16).for_each(|r| self.forget(r));
                }
                self.state.registers[R14] = Value::Unknown;
                self.state.registers[R15] = Value::Unknown;
                if self.state.pairs.is_half() {
                    self.fail(i, "half a pair where others come");
                }
            }
            for (_, from) in backward.iter().filter(|(to, _)| *to == i.ip()) {
                let body: Vec<Instruction> =
                    instructions[n..].iter().take_while(|j| j.ip() <= *from).copied().collect();
                self.forget_written(&body);
            }
            if reachable {
                self.step(i, instructions.get(n + 1));
                if let Some(state) = self.brought_together(i) {
                    // It comes back behind a jump and a number.
                    self.arriving.entry(i.next_ip() + 9).or_default().push(state);
                }
                reachable = !matches!(
                    i.flow_control(),
                    FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
                ) && !is_way_out(i);
            }
        }
    }

    /// The jumps back of calls that found no room for a pair, and those by which writes beside code go on: directly behind the load that ends their check, as if it had not missed. The engine
    /// has made R14 and R15 what they are there.
    fn passes(&self, instructions: &[Instruction], straight: u64) -> Vec<u64> {
        let mut passes = Vec::new();
        for pair in instructions.windows(2).filter(|p| p[0].ip() >= straight) {
            if pairs::drops_all(&pair[0]) {
                // A call found no room for its pair: it goes on with the registers that it had.
                let to = pair[1].near_branch_target();
                let no_room = instructions.iter().any(|i| {
                    i.next_ip() == to
                        && i.code() == Code::Jbe_rel32_64
                        && i.near_branch_target() == pair[0].ip()
                });
                if !is_jump(&pair[1]) || !no_room {
                    self.fail(&pair[0], "pairs are dropped where there was room");
                }
                passes.push(pair[1].ip());
                continue;
            }
            if pair[0].code() != Code::Test_AL_imm8 || !is_jump(&pair[1]) {
                continue;
            }
            let to = pair[1].near_branch_target();
            let behind_load = instructions.iter().any(|i| {
                i.next_ip() == to
                    && i.code() == Code::Mov_r64_rm64
                    && i.op0_register() == Register::R15
                    && i.memory_segment() == Register::GS
                    && i.memory_base() == Register::R15
            });
            if !behind_load {
                self.fail(&pair[1], "a write goes on where its check does not end");
            }
            passes.push(pair[1].ip());
        }
        passes
    }

    /// What nothing in translated code may be.
    fn kind(&mut self, i: &Instruction, starts: &[u64]) {
        if i.is_privileged() && !matches!(i.mnemonic(), M::Rdtsc | M::Rdtscp) {
            self.fail(i, "a privileged instruction");
        }
        let engine = frame_field(i).is_some_and(is_engine_code);
        let by_cache = i.memory_segment() == Register::GS
            && i.memory_index() == Register::R15
            && i32::try_from(i.memory_displacement64()).is_ok_and(is_jump_host);
        let fine = match i.flow_control() {
            FlowControl::Next => true,
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                is_jump(i) && starts.binary_search(&i.near_branch_target()).is_ok()
            }
            FlowControl::IndirectCall => {
                i.is_call_near_indirect() && memory_operand(i) && (engine || by_cache)
            }
            FlowControl::Call => {
                i.code() == Code::Call_rel32_64 && starts.binary_search(&i.near_branch_target()).is_ok()
            }
            FlowControl::Return => i.code() == Code::Retnq,
            FlowControl::IndirectBranch => {
                i.is_jmp_near_indirect() && memory_operand(i) && (engine || by_cache)
            }
            _ => false,
        };
        if !fine {
            self.fail(i, "control leaves the fragment");
        }
        let system = matches!(
            i.mnemonic(),
            M::Syscall
                | M::Sysenter
                | M::Sysret
                | M::Cpuid
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Wrfsbase
                | M::Wrgsbase
                | M::In
                | M::Out
                | M::Insb
                | M::Insw
                | M::Insd
                | M::Outsb
                | M::Outsw
                | M::Outsd
                | M::Popf
                | M::Popfq
                | M::Pushf
                | M::Pushfq
                | M::Std
                | M::Xsave
                | M::Xsave64
                | M::Xrstor
                | M::Xrstor64
                | M::Wrpkru
                | M::Rdpkru
                | M::Rdpmc
                | M::Rdpid
                | M::Clflush
                | M::Xgetbv
                | M::Enter
                | M::Leave
                | M::Monitor
        );
        let segments = (0..i.op_count()).any(|n| {
            let r = i.op_register(n);
            i.op_kind(n) == OpKind::Register && (r.is_segment_register() || r.is_cr() || r.is_dr())
        });
        if system || segments {
            self.fail(i, "a system instruction");
        }
        let stack =
            self.info.info(i).used_registers().iter().any(|u| u.register().full_register() == Register::RSP);
        let allowed = matches!(i.code(), Code::Push_r64 | Code::Pop_r64) && i.op0_register() == Register::RAX
            || i.is_call_near_indirect()
            || pairs::follows(i);
        if stack && !allowed {
            self.fail(i, "the host's stack");
        }
    }

    /// Behind the straight line there are calls of the engine and jumps, and what takes them there.
    fn out_of_line(&mut self, i: &Instruction) {
        if pairs::follows(i) && !pairs::drops_all(i) {
            self.fail(i, "pairs behind the straight line");
        }
        let there = i.memory_segment() == Register::GS && frame_field(i).is_some();
        if memory_operand(i) && i.mnemonic() != M::Lea && !there {
            self.fail(i, "an access behind the straight line");
        }
    }

    /// Whether the engine may lead a jump or call to another fragment.
    fn is_link(&self, i: &Instruction) -> bool {
        let place = i.next_ip().wrapping_sub(4);
        self.fragment.exits.iter().any(|e| e.place.is_some_and(|at| u64::from(at) == place))
    }

    fn forget_written(&mut self, body: &[Instruction]) {
        for i in body {
            let written: Vec<usize> = self.written(i);
            for r in written {
                self.forget(r);
            }
            if let Some(slot) = frame_field(i)
                && i.op0_kind() == OpKind::Memory
            {
                self.state.slots.remove(&slot);
            }
        }
    }

    fn written(&mut self, i: &Instruction) -> Vec<usize> {
        let used = self.info.info(i).used_registers();
        used.iter()
            .filter(|u| writes(u.access()) && u.register().is_gpr())
            .map(|u| u.register().full_register().number())
            .collect()
    }

    fn meet(&mut self, other: &State) {
        for r in 0..16 {
            let (a, b) = (self.state.registers[r], other.registers[r]);
            if a != b {
                self.state.registers[r] = match (a, b) {
                    (Value::Linear(_), Value::Linear(_)) => self.fresh(),
                    _ if self.legacy && GUEST_32.contains(&r) => {
                        panic!("INV-LEG-1: register {r} is {a:?} on one way and {b:?} on another")
                    }
                    _ => Value::Unknown,
                };
            }
        }
        self.state.slots.retain(|slot, value| other.slots.get(slot) == Some(value));
        if let Err(why) = self.state.pairs.meet(&other.pairs) {
            panic!("INV-BT-3: {why}");
        }
    }

    fn get(&self, r: Register) -> Value {
        self.state.registers[r.full_register().number() & 15]
    }

    fn slot(&mut self, slot: i32) -> Value {
        if let Some(value) = self.state.slots.get(&slot) {
            return *value;
        }
        let value = self.fresh();
        if followed(slot) {
            self.state.slots.insert(slot, value);
        }
        value
    }

    fn step(&mut self, i: &Instruction, next: Option<&Instruction>) {
        self.check_access(i);
        self.split_size = match self.state.registers[R15] {
            Value::Linear(Form { base: None, index: None, offset }) => Some(offset),
            _ => None,
        };
        let found = self.state.pairs;
        let link = self.is_link(i);
        match self.state.pairs.step(i, link) {
            Err(why) => self.fail(i, why),
            Ok(Does::Nothing) => {}
            Ok(_) if self.state.pushed.is_some() => self.fail(i, "a pair above a word"),
            Ok(Does::Moves) => return,
            Ok(Does::Calls) => {
                // Whatever ran has come back.
                self.state.slots.clear();
                return (0..16).for_each(|r| self.forget(r));
            }
        }
        if i.code() == Code::Push_r64 {
            if self.state.pushed.is_some() {
                self.fail(i, "two words on the host's stack");
            }
            self.state.pushed = Some(self.state.registers[0]);
            return;
        }
        if self.state.pushed.is_some() && i.flow_control() != FlowControl::Next {
            self.fail(i, "a word is left on the host's stack");
        }
        if is_jump(i) {
            // LOOP counts RCX down, whichever way it goes.
            if bt::unit::count(i).is_some_and(|(opcode, _)| opcode != 0xe3) {
                self.state.registers[1] = self.fresh();
            }
            if i.near_branch_target() > i.ip() {
                let state = State { pairs: found.jumped(), ..self.state.clone() };
                self.arriving.entry(i.near_branch_target()).or_default().push(state);
            }
            return;
        }
        let registers = i.op0_kind() == OpKind::Register;
        let to = if registers { i.op0_register() } else { Register::None };
        let wide = to.is_gpr64();
        let result = match i.code() {
            Code::Mov_r64_rm64 if i.op1_kind() == OpKind::Register => Some(self.get(i.op1_register())),
            Code::Mov_r64_rm64 => self.load(i),
            Code::Pop_r64 => self.state.pushed.take(),
            Code::Mov_rm64_r64 if registers => Some(self.get(i.op1_register())),
            Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 if registers => {
                Some(Value::Linear(Form::constant(i.immediate(1).cast_signed())))
            }
            Code::Mov_r32_imm32 => Some(Value::Linear(Form::constant(i64::from(i.immediate32())))),
            Code::Lea_r64_m => Some(self.lea(i)),
            _ if self.legacy && self.cut(i).is_some() => self.cut(i),
            Code::Xchg_rm64_r64 if registers => {
                let (a, b) = (i.op0_register(), i.op1_register());
                let (x, y) = (self.get(a), self.get(b));
                self.state.registers[a.full_register().number() & 15] = y;
                self.state.registers[b.full_register().number() & 15] = x;
                return;
            }
            Code::Shr_rm64_imm8 if self.legacy && registers && i.immediate8() >= 32 => Some(self.fresh()),
            Code::VEX_Rorx_r64_rm64_imm8 if i.op1_kind() == OpKind::Register => {
                match self.get(i.op1_register()) {
                    Value::Linear(f) if i.immediate8() == 7 => Some(Value::Rotated(f)),
                    _ => None,
                }
            }
            Code::Ror_rm64_imm8 if registers => match self.get(to) {
                Value::Linear(f) if i.immediate8() == 7 => Some(Value::Rotated(f)),
                _ => None,
            },
            Code::And_rm32_imm32 if registers => match (self.get(to), i.immediate32()) {
                (Value::Rotated(f), mask) if mask == (frame::TLB_ENTRIES - 1) << 5 => Some(Value::Index(f)),
                (_, mask) if mask == frame::JUMP_MASK => Some(Value::Target),
                _ => None,
            },
            Code::Xor_r64_rm64 if memory_operand(i) => self.compare_tag(i),
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 if wide => self.plus(to, i.immediate(1).cast_signed()),
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 if wide => {
                self.plus(to, i.immediate(1).cast_signed().wrapping_neg())
            }
            Code::Inc_rm64 if wide => self.plus(to, 1),
            Code::Dec_rm64 if wide => self.plus(to, -1),
            Code::Cmp_rm64_imm32 | Code::Test_rm64_imm32 if registers => return self.compared(i, next),
            _ => None,
        };
        self.store(i);
        for r in self.written(i) {
            if self.legacy && self.is_widened(i, r) {
                self.state.registers[r] = Value::Unknown;
            } else {
                self.forget(r);
            }
        }
        if let (Some(value), true) = (result, registers) {
            let r = to.full_register().number() & 15;
            // A guest register is a symbol of its own, or one and a constant: what forms can be made of.
            let simple = matches!(value, Value::Linear(f) if f.index.is_none());
            self.state.registers[r] = if r == R14 || r == R15 || simple || !matches!(value, Value::Linear(_))
            {
                value
            } else {
                self.fresh()
            };
        }
        if i.is_call_near_indirect() {
            self.state.registers[R14] = Value::Unknown;
            self.state.registers[R15] = Value::Unknown;
            // Helpers do the guest's instruction, as the interpreter does.
            if frame_field(i).is_some_and(|f| f == frame::CALLOUT || frame::HELPERS.contains(&f)) {
                self.interpreted(i.ip());
            }
        }
    }

    /// Behind a call of `SPLIT` with the size in R15: R14 + R15 is a copy of so many bytes.
    fn brought_together(&mut self, i: &Instruction) -> Option<State> {
        let field = frame_field(i).filter(|_| i.is_call_near_indirect())?;
        let splits = frame::SPLIT..frame::SPLIT + 16 * frame::VARIANTS;
        if !splits.contains(&field) {
            return None;
        }
        let room = self.split_size.take().unwrap_or_else(|| self.fail(i, "a copy of unknown size"));
        if !(1..=64).contains(&room) {
            self.fail(i, "a copy that is too long");
        }
        self.symbols += 1;
        let copy = Checked {
            from: Form::symbol(self.symbols),
            room,
            write: field & 8 != 0,
            table: (field - frame::SPLIT) / 16,
        };
        let mut state = self.state.clone();
        state.registers[R14] = Value::Offset(copy);
        state.registers[R15] = Value::Page(copy);
        Some(state)
    }

    /// The interpreter did the guest instruction whose host code is at `at`.
    fn interpreted(&mut self, at: u64) {
        let number = self.fragment.map.iter().rposition(|p| u64::from(p.host) <= at).unwrap_or(0);
        let guest = self.unit.instructions[number];
        let used = self.info.info(&guest).used_registers().to_vec();
        for u in used.iter().filter(|u| writes(u.access()) && u.register().is_gpr()) {
            let r = u.register().full_register();
            let change = if r == Register::RSP && guest.is_stack_instruction() && guest.mnemonic() != M::Leave
            {
                Some(i64::from(guest.stack_pointer_increment()))
            } else {
                constant_change(&guest, r)
            };
            let old = match r.number() {
                n @ 13..=15 => self.slot(frame::GPR + 8 * n as i32),
                4 => self.state.registers[R13],
                n => self.state.registers[n],
            };
            let new = match (old, change) {
                (Value::Linear(f), Some(n)) => Value::Linear(f.plus(n)),
                _ => self.fresh(),
            };
            match r.number() {
                n @ 13..=15 => drop(self.state.slots.insert(frame::GPR + 8 * n as i32, new)),
                4 => self.state.registers[R13] = new,
                n => self.state.registers[n] = new,
            }
        }
        self.state.slots.retain(|slot, _| !(frame::TEMP..frame::TEMP + 32).contains(slot));
    }

    /// In 16- and 32-bit code: what an instruction that writes 32 bits of a register makes of it, if that is a form.
    fn cut(&self, i: &Instruction) -> Option<Value> {
        let registers = i.op0_kind() == OpKind::Register;
        let low = |v| match v {
            Value::Linear(f) | Value::Wide(f) => Some(f),
            _ => None,
        };
        let own = |n: i64| low(self.get(i.op0_register())).map(|f| f.plus(n));
        let form = match i.code() {
            Code::Mov_r32_rm32 if i.op1_kind() == OpKind::Register => low(self.get(i.op1_register())),
            Code::Mov_rm32_r32 if registers => low(self.get(i.op1_register())),
            Code::Lea_r32_m => self.form_of(i),
            Code::Add_rm32_imm8 | Code::Add_rm32_imm32 if registers => own(i.immediate(1).cast_signed()),
            Code::Sub_rm32_imm8 | Code::Sub_rm32_imm32 if registers => {
                own(i.immediate(1).cast_signed().wrapping_neg())
            }
            Code::Inc_rm32 if registers => own(1),
            Code::Dec_rm32 if registers => own(-1),
            _ => None,
        };
        form.map(Value::Linear)
    }

    /// Whether an instruction may leave something in the upper half of a register that it writes.
    fn is_widened(&self, i: &Instruction, r: usize) -> bool {
        let operands = (0..i.op_count()).filter(|n| i.op_kind(*n) == OpKind::Register);
        let sizes: Vec<usize> = operands
            .map(|n| i.op_register(n))
            .filter(|x| x.is_gpr() && x.full_register().number() == r)
            .map(Register::size)
            .collect();
        match sizes.iter().max() {
            Some(8) => true,
            Some(4) => false,
            // Less than 32 bits keep the upper half.
            Some(_) => !matches!(self.state.registers[r], Value::Linear(_)),
            None => {
                let wide = (0..i.op_count())
                    .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr64());
                wide || i.is_string_instruction() || matches!(i.mnemonic(), M::Cqo | M::Cdqe)
            }
        }
    }

    /// INV-LEG-1, where control leaves the straight line.
    fn check_halves(&self, i: &Instruction, straight: u64) {
        let leaves = i.is_call_near_indirect()
            || i.flow_control() == FlowControl::IndirectBranch
            || is_jump(i) && i.near_branch_target() >= straight;
        if !leaves {
            return;
        }
        for r in GUEST_32 {
            if !matches!(self.state.registers[r], Value::Linear(_)) {
                self.fail(i, &format!("the upper half of register {r} is {:?}", self.state.registers[r]));
            }
        }
    }

    fn plus(&self, r: Register, n: i64) -> Option<Value> {
        match self.get(r) {
            Value::Linear(f) => Some(Value::Linear(f.plus(n))),
            _ => None,
        }
    }

    /// `mov r64, [memory]`.
    fn load(&mut self, i: &Instruction) -> Option<Value> {
        if i.memory_segment() != Register::GS {
            return None;
        }
        if let Some(slot) = frame_field(i) {
            if slot == frame::SIGNALS {
                // The engine's word of pending signals.
                return Some(Value::Host { room: 4, write: false });
            }
            return followed(slot).then(|| self.slot(slot));
        }
        let Value::Index(f) = self.get(Register::R15) else { return None };
        let at = i32::try_from(i.memory_displacement64()).ok()? - frame::TLB;
        let (table, field) = (at / frame::TLB_STRIDE, at % frame::TLB_STRIDE);
        match (self.state.registers[R14], field) {
            (Value::Offset(c), 16) if c.from == f && c.table == table => Some(Value::Page(c)),
            (Value::Offset(c), 24) if c.from == f && c.table == table => Some(Value::Delta(c)),
            _ => None,
        }
    }

    /// `xor r14, gs:[r15 + tag]`.
    fn compare_tag(&self, i: &Instruction) -> Option<Value> {
        let at = i32::try_from(i.memory_displacement64()).ok()? - frame::TLB;
        let (table, field) = (at / frame::TLB_STRIDE, at % frame::TLB_STRIDE);
        match (self.get(i.op0_register()), self.get(Register::R15)) {
            (Value::Linear(from), Value::Index(f)) if from == f && matches!(field, 0 | 8) => {
                Some(Value::Offset(Checked { from, room: 0, write: field == 8, table }))
            }
            _ => None,
        }
    }

    /// `cmp r14, n; ja miss` and `test r14, mask; jne miss`.
    fn compared(&mut self, i: &Instruction, next: Option<&Instruction>) {
        let r = i.op0_register().full_register().number() & 15;
        let Value::Offset(c) = self.state.registers[r] else { return };
        let n = i.immediate(1).cast_signed();
        let branch = next.map(Instruction::code);
        let room = match (i.code(), branch) {
            (Code::Cmp_rm64_imm32, Some(Code::Ja_rel32_64)) if (0..4096).contains(&n) => 4096 - n,
            // No bit above the offset, and none of those below the size: the operand is aligned, so it ends in the page.
            (Code::Test_rm64_imm32, Some(Code::Jne_rel32_64)) if n & -4096 == -4096 => (n & 0xfff) + 1,
            _ => return,
        };
        let room = room.max(c.room);
        self.state.registers[r] = Value::Offset(Checked { room, ..c });
    }

    fn form_of(&self, i: &Instruction) -> Option<Form> {
        let linear = |r| match self.get(r) {
            Value::Linear(f) => Some(f),
            _ => None,
        };
        let disp = i.memory_displacement64().cast_signed();
        let base = match i.memory_base() {
            Register::None => Form::constant(0),
            r => linear(r)?,
        };
        match i.memory_index() {
            Register::None => Some(base.plus(disp)),
            r => {
                let (x, scale) = (linear(r)?, i.memory_index_scale());
                if base.index.is_some() || x.index.is_some() {
                    return None;
                }
                let moved = base.plus(disp).plus(x.offset.wrapping_mul(i64::from(scale)));
                Some(Form { index: x.base.map(|symbol| (symbol, scale)), ..moved })
            }
        }
    }

    /// The host address of a memory operand and what was checked of it, if one of its registers is on the way to a host address.
    fn host(&self, i: &Instruction) -> Option<(i64, bool)> {
        let disp = i.memory_displacement64().cast_signed();
        let (base, index) = (i.memory_base(), i.memory_index());
        let value = |r| if r == Register::None { None } else { Some(self.get(r)) };
        match (value(base)?, value(index)) {
            (Value::Host { room, write }, None) if disp >= 0 => Some((room - disp, write)),
            (Value::Offset(a), Some(Value::Page(b))) if a.from == b.from && a.table == b.table => {
                let scaled = i.memory_index_scale() == 1 && disp >= 0;
                scaled.then_some((a.room - disp, a.write))
            }
            (Value::Linear(f), Some(Value::Delta(c))) if self.legacy => {
                // Modulo 4 GiB; the group's page does not wrap.
                #[expect(clippy::cast_possible_truncation, reason = "modulo 4 GiB")]
                let above = i64::from(f.above(&c.from)? as i32);
                let fits = i.memory_index_scale() == 1 && above >= 0 && disp >= 0 && above + disp <= c.room;
                fits.then_some((c.room - above - disp, c.write))
            }
            (Value::Linear(f), Some(Value::Delta(c))) if i.memory_index_scale() == 1 => {
                let above = f.plus(disp).above(&c.from)?;
                (0..=c.room).contains(&above).then_some((c.room - above, c.write))
            }
            _ => None,
        }
    }

    fn lea(&mut self, i: &Instruction) -> Value {
        if let Some((room, write)) = self.host(i) {
            return Value::Host { room, write };
        }
        if self.legacy {
            return self.form_of(i).map_or(Value::Unknown, Value::Wide);
        }
        self.form_of(i).map_or_else(|| self.fresh(), Value::Linear)
    }

    /// Stores to fields of the frame that are followed.
    fn store(&mut self, i: &Instruction) {
        let Some(slot) = frame_field(i) else { return };
        if i.op0_kind() != OpKind::Memory || !followed(slot) {
            return;
        }
        let mut value = match i.code() {
            Code::Mov_rm64_r64 => self.get(i.op1_register()),
            _ => self.fresh(),
        };
        if value == Value::Unknown || matches!(value, Value::Linear(f) if f.index.is_some()) {
            value = self.fresh();
        }
        self.state.slots.insert(slot, value);
    }

    fn check_access(&mut self, i: &Instruction) {
        if i.is_string_instruction() {
            return self.check_string(i);
        }
        if !memory_operand(i) || matches!(i.mnemonic(), M::Lea | M::Nop) || pairs::compares_top(i) {
            return;
        }
        let size = i.memory_size();
        let size = if size.is_broadcast() { size.element_size() } else { size.size() };
        let size = i64::try_from(size.max(1)).unwrap_or(i64::MAX);
        match i.memory_segment() {
            Register::GS => self.check_frame(i, size),
            Register::DS | Register::SS | Register::ES | Register::CS => self.check_guest(i, size),
            _ => self.fail(i, "an access by FS"),
        }
    }

    fn check_frame(&mut self, i: &Instruction, size: i64) {
        let disp = i.memory_displacement64().cast_signed();
        let last = match (i.memory_base(), i.memory_index()) {
            (Register::None, Register::None) => 0,
            (Register::R15, Register::None) => match self.state.registers[R15] {
                Value::Index(_) => 32 * i64::from(frame::TLB_ENTRIES - 1),
                _ => self.fail(i, "the TLB by an index that is not masked"),
            },
            (Register::None, Register::R15) => match self.state.registers[R15] {
                Value::Target => 8 * i64::from(frame::JUMP_MASK),
                _ => self.fail(i, "the jump cache by an index that is not masked"),
            },
            _ => self.fail(i, "the frame by a guest register"),
        };
        let end = i64::try_from(frame::SIZE).unwrap_or(0);
        if disp < 0 || disp + last + size > end {
            self.fail(i, "outside of the frame");
        }
    }

    fn check_guest(&mut self, i: &Instruction, size: i64) {
        let writes = self.info.info(i).used_memory().iter().any(|m| {
            !matches!(
                m.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None
            )
        });
        match self.host(i) {
            None => self.fail(i, "an address that is not derived from a checked one"),
            Some((room, _)) if room < size => {
                self.fail(i, &format!("{size} bytes where {room} were checked"))
            }
            Some((_, false)) if writes => self.fail(i, "a write where only reads were checked"),
            Some(_) => {}
        }
    }

    fn check_string(&mut self, i: &Instruction) {
        let host = |v: Value, writes: bool| matches!(v, Value::Host { room, write } if room > 0 && (write || !writes));
        let to = |writes| host(self.get(Register::RDI), writes);
        let from = host(self.get(Register::RSI), false);
        let fine = match i.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => to(true) && from,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => to(false) && from,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => to(true),
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => to(false),
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => from,
            _ => false,
        };
        if !fine {
            self.fail(i, "a string instruction off its checked pages");
        }
    }
}
