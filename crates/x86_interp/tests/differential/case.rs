//! One case: initial state and instructions, all derived from a seed; how it is laid out, run, judged and shrunk.

use std::fmt::Write;

use iced_x86::{
    Code, Encoder, FastFormatter, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register, RflagsBits,
};
use x86::bits::rflags;

use crate::generate::{Catalogue, Group, instance};
use crate::guest::Guest;
use crate::initial::{initial, memory, roles, start};
use crate::known;
use crate::native::Native;
use crate::rng::Rng;
use crate::state::{
    CODE, CODE_BYTES, DATA_BYTES, Mode, Outcome, READ_ONLY_BYTES, Registers, differences, print_registers,
};
use crate::undefined_flags;

/// One instruction; a branch goes over the next `over` ones.
#[derive(Clone)]
pub struct Item {
    pub instruction: Instruction,
    pub over: usize,
}

/// A case.
#[derive(Clone)]
pub struct Case {
    pub seed: u64,
    pub mode: Mode,
    pub regs: Registers,
    pub data: Vec<u8>,
    pub read_only: Vec<u8>,
    pub items: Vec<Item>,
}

/// A case in memory.
struct Layout {
    code: Vec<u8>,
    /// Address of each instruction, and of the INT3 behind the last.
    starts: Vec<u64>,
    /// Status flags that may be undefined before each of those.
    undefined: Vec<u64>,
}

/// How a case came out.
pub enum Verdict {
    Same(Outcome),
    /// It takes too long in the interpreter; it was not run on the host.
    Endless,
    /// They differ in a way that is listed in `known`.
    Known(&'static str),
    Different(String),
}

fn status(bits: u32) -> u64 {
    let map = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    map.iter().filter(|(b, _)| bits & b != 0).fold(0, |all, (_, f)| all | f)
}

/// Follows which status flags are undefined, and whether CL is known.
struct Taint {
    flags: u64,
    cl: Option<u8>,
    /// Instructions that a branch may have skipped.
    conditional: usize,
}

impl Taint {
    fn admits(&self, i: &Instruction) -> bool {
        status(i.rflags_read()) & self.flags == 0 && !undefined_flags::result(i, self.cl)
    }

    fn step(&mut self, item: &Item, infos: &mut InstructionInfoFactory) {
        let i = &item.instruction;
        let undefined = undefined_flags::flags(i, self.cl);
        let variable = i.op_count() > 0 && i.op_register(i.op_count() - 1) == Register::CL
            || has_masked_count(i)
            || i.has_rep_prefix()
            || i.has_repne_prefix();
        if self.conditional == 0 && !variable {
            self.flags &= !status(i.rflags_modified());
        }
        self.flags |= undefined;
        self.conditional = self.conditional.saturating_sub(1).max(item.over);
        let writes_cl = infos.info(i).used_registers().iter().any(|u| {
            u.register().full_register() == Register::RCX
                && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
        });
        if writes_cl {
            self.cl = None;
        }
    }
}

/// Shifts by an immediate that may be zero modulo 32.
fn has_masked_count(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

impl Case {
    /// The case of a seed.
    pub fn generate(seed: u64, catalogue: &Catalogue) -> Self {
        let rng = &mut Rng::new(seed);
        let mode = catalogue.mode;
        let roles = roles(rng, mode);
        let mut regs = initial(rng, &roles);
        let (data, read_only) = (memory(rng, &regs, DATA_BYTES), memory(rng, &regs, READ_ONLY_BYTES));
        let flavour = match rng.below(100) {
            0..50 => Group::Integer,
            50..62 => Group::X87,
            62..76 => Group::Sse,
            76..88 => Group::Avx,
            _ => Group::Avx512,
        };
        let wanted = if rng.chance(40) { 1 } else { 1 + rng.below(12) as usize };
        let mut items: Vec<Item> = Vec::new();
        let mut infos = InstructionInfoFactory::new();
        let mut taint = Taint { flags: 0, cl: Some(regs.gpr[1] as u8), conditional: 0 };
        let mut calls = false;
        for _ in 0..wanted * 20 {
            if items.len() == wanted {
                break;
            }
            let group = if flavour != Group::Integer && rng.chance(25) { Group::Integer } else { flavour };
            let codes = catalogue.codes(group);
            if codes.is_empty() {
                continue;
            }
            let code = *rng.pick(codes);
            let instruction = instance(rng, &roles, code);
            let branch = matches!(
                instruction.flow_control(),
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
            ) && instruction.near_branch_target() == 0
                && instruction.op0_kind() as u32 <= iced_x86::OpKind::NearBranch64 as u32
                && instruction.op0_kind() != iced_x86::OpKind::Register;
            let over = if branch { rng.below(3) as usize } else { 0 };
            // A RET to behind a CALL would run instructions twice, which the analysis of flags does not see.
            let is_return = instruction.flow_control() == FlowControl::Return;
            if is_return && calls || !taint.admits(&instruction) {
                continue;
            }
            let item = Item { instruction, over };
            if encode(&item.instruction, CODE, CODE, mode).is_none() {
                continue;
            }
            calls |= instruction.flow_control() == FlowControl::Call;
            taint.step(&item, &mut infos);
            items.push(item);
        }
        regs.rip = CODE + start(rng);
        Self { seed, mode, regs, data, read_only, items }
    }

    /// Given instructions on a random state.
    pub fn of_bytes(mode: Mode, bytes: &[u8], seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let roles = roles(rng, mode);
        let mut regs = initial(rng, &roles);
        regs.rip = CODE + 0x40;
        regs.rflags &= !(rflags::AC | rflags::TF);
        let (data, read_only) = (memory(rng, &regs, DATA_BYTES), memory(rng, &regs, READ_ONLY_BYTES));
        let decoder = iced_x86::Decoder::with_ip(mode.bits(), bytes, regs.rip, 0);
        let items = decoder.into_iter().map(|instruction| Item { instruction, over: 0 }).collect();
        Self { seed, mode, regs, data, read_only, items }
    }

    fn layout(&self) -> Option<Layout> {
        let mut starts = vec![self.regs.rip];
        for item in &self.items {
            let at = *starts.last()?;
            starts.push(at + encode(&item.instruction, at, at, self.mode)?.len() as u64);
        }
        let mut code = vec![0xcc; CODE_BYTES];
        for (n, item) in self.items.iter().enumerate() {
            let target = starts[(n + 1 + item.over).min(self.items.len())];
            let bytes = encode(&item.instruction, starts[n], target, self.mode)?;
            // What does not fit lies beyond the mapped pages.
            for (k, byte) in bytes.iter().enumerate() {
                if let Some(to) = code.get_mut((starts[n] - CODE) as usize + k) {
                    *to = *byte;
                }
            }
        }
        let mut infos = InstructionInfoFactory::new();
        let mut taint = Taint { flags: 0, cl: Some(self.regs.gpr[1] as u8), conditional: 0 };
        let mut undefined = vec![0];
        for item in &self.items {
            taint.step(item, &mut infos);
            undefined.push(taint.flags);
        }
        Some(Layout { code, starts, undefined })
    }

    /// Runs both and compares.
    pub fn judge(&self, native: &mut Native, guest: &mut Guest) -> Verdict {
        let Some(layout) = self.layout() else { return Verdict::Endless };
        let Some(interp) = guest.run(self.mode, &self.regs, &layout.code, &self.data, &self.read_only) else {
            return Verdict::Endless;
        };
        let mut host = native.run(self.mode, &self.regs, &layout.code, &self.data, &self.read_only);
        let mut interp = interp;
        known::smooth(&mut host, &mut interp);
        let index = |o: &Outcome| layout.starts.iter().position(|&s| s == o.regs.rip);
        let at = index(&host);
        // Somewhere else: behind a RET, or in the middle of things.
        let undefined =
            at.map_or_else(|| layout.undefined.iter().fold(0, |all, u| all | u), |n| layout.undefined[n]);
        let text = differences(&host, &interp, undefined);
        if text.is_empty() {
            return Verdict::Same(host);
        }
        let earlier = [at, index(&interp)].into_iter().flatten().min();
        let instruction = earlier.and_then(|n| self.items.get(n)).map(|i| &i.instruction);
        match known::reason(self.mode, instruction, &host, &interp) {
            Some(reason) => Verdict::Known(reason),
            None => Verdict::Different(self.describe(&layout, &host, &interp, &text)),
        }
    }

    /// Drops instructions while the case still differs.
    pub fn shrink(&self, native: &mut Native, guest: &mut Guest) -> Self {
        let mut best = self.clone();
        let mut n = 0;
        while n < best.items.len() && best.items.len() > 1 {
            let mut smaller = best.clone();
            smaller.items.remove(n);
            for (k, item) in smaller.items.iter_mut().enumerate() {
                if k < n && k + item.over >= n {
                    item.over -= 1;
                }
            }
            if matches!(smaller.judge(native, guest), Verdict::Different(_)) && smaller.admissible() {
                best = smaller;
                n = 0;
            } else {
                n += 1;
            }
        }
        best
    }

    /// Whether no instruction reads an undefined flag: dropping the one that defined it would make a false alarm.
    fn admissible(&self) -> bool {
        let mut infos = InstructionInfoFactory::new();
        let mut taint = Taint { flags: 0, cl: Some(self.regs.gpr[1] as u8), conditional: 0 };
        self.items.iter().all(|item| {
            let ok = taint.admits(&item.instruction);
            taint.step(item, &mut infos);
            ok
        })
    }

    fn describe(&self, layout: &Layout, host: &Outcome, interp: &Outcome, differences: &str) -> String {
        let mut out = format!("{:?} case, seed {:#x}:\n", self.mode, self.seed);
        let mut formatter = FastFormatter::new();
        for n in 0..self.items.len() {
            let (at, end) = (layout.starts[n], layout.starts[n + 1]);
            let from = (at - CODE) as usize;
            let bytes = layout.code.get(from..(end - CODE) as usize).unwrap_or(&[]);
            let hex: String = bytes.iter().map(|b| format!("{b:02x} ")).collect();
            let decoder = iced_x86::Decoder::with_ip(self.mode.bits(), bytes, at, 0).decode();
            let mut text = String::new();
            formatter.format(&decoder, &mut text);
            let _ = writeln!(out, "  {at:#x}  {hex:45} {text}");
        }
        let _ =
            writeln!(out, "differences (host: vector {}, interp: vector {}):", host.vector, interp.vector);
        out.push_str(differences);
        let columns = [("before", &self.regs), ("host", &host.regs), ("interp", &interp.regs)];
        out.push_str(&print_registers("registers:", &columns));
        out
    }

    /// The encodings in this case.
    pub fn codes(&self) -> impl Iterator<Item = Code> + '_ {
        self.items.iter().map(|i| i.instruction.code())
    }
}

/// The bytes of an instruction at `at`; a branch goes to `target`.
fn encode(i: &Instruction, at: u64, target: u64, mode: Mode) -> Option<Vec<u8>> {
    let mut i = *i;
    if (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), iced_x86::OpKind::NearBranch64 | iced_x86::OpKind::NearBranch32))
    {
        i.set_near_branch64(target);
    }
    let mut encoder = Encoder::new(mode.bits());
    encoder.encode(&i, at).ok()?;
    Some(encoder.take_buffer())
}
