//! The interpreter, stepped: it says how a program ends, and follows which flags are undefined on the way.
//!
//! Undefined flags are followed along the instructions that are really executed, so that any control flow may be generated. A program that
//! reads an undefined flag proves nothing and is left out.

use std::collections::BTreeSet;

use engine::Vcpu as _;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic as M, RflagsBits};
use x86::CpuState;
use x86::bits::rflags;
use x86_interp::Interp;
use x86_interp::cpu::CodeSize;

use crate::machine::{
    Alias, COMPARED, HANDLERS, HIGH, Image, Machine, STACK_TOP, compared_address, data_physical,
    is_data_entry, physical,
};
use crate::undefined_flags;

/// Instructions that a program may take.
const STEPS: u32 = 3000;
/// Where the flags are in an exception's stack frame.
const FRAME_FLAGS: u64 = STACK_TOP - 24;

/// How a program ended.
pub struct End {
    pub state: CpuState,
    pub memory: Vec<u8>,
    /// Flags not to be compared in RFLAGS.
    pub undefined: u64,
    /// Flags not to be compared in the exception frame.
    pub frame_undefined: u64,
    /// Where an indirect CALL to a non-canonical address may have left its return address: it ends with #GP, and whether it pushes first is
    /// the processor's choice (AMD's do).
    pub refused_push: Option<u64>,
    pub steps: u32,
}

/// Why a program is not compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unfit {
    /// It takes too long.
    Endless,
    /// It reads an undefined flag, or makes an undefined result.
    Undefined,
}

/// The interpreter and its machine.
pub struct Oracle {
    machine: Machine,
    vcpu: Interp,
    /// Every encoding that was executed.
    pub executed: BTreeSet<Code>,
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

/// Instructions that may leave flags alone that they are said to write.
fn may_keep_flags(i: &Instruction) -> bool {
    let shift = matches!(
        i.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    // MOV of control and debug registers: undefined by the manual, kept by every processor.
    shift || i.mnemonic() == M::Mov || i.has_rep_prefix() || i.has_repne_prefix()
}

/// Instructions that copy the flags somewhere.
fn shows_flags(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Pushf | M::Pushfd | M::Pushfq | M::Lahf | M::Syscall)
}

fn is_handler(rip: u64) -> bool {
    (HIGH + HANDLERS..HIGH + HANDLERS + 0x200).contains(&rip)
}

impl Oracle {
    pub fn new() -> Self {
        let machine = Machine::new();
        let vcpu = Interp::new(machine.parts());
        Self { machine, vcpu, executed: BTreeSet::new() }
    }

    fn fetch(&mut self, rip: u64) -> Option<Instruction> {
        let cpu = self.vcpu.cpu();
        let bits = cpu.code_size.bits();
        let linear = if bits == 64 { rip } else { cpu.s.seg[1].base.wrapping_add(rip) & 0xffff_ffff };
        let at = physical(linear)?;
        let mut bytes = [0; 15];
        self.machine.mem.read(guestmem::Gpa(at), &mut bytes).ok()?;
        let i = Decoder::with_ip(bits, &bytes, rip, DecoderOptions::NONE).decode();
        (!i.is_invalid()).then_some(i)
    }

    /// Flags that the code at `rip` may overwrite before it reads them.
    ///
    /// The translator (`docs/deviations.md`): such flags are not kept (`bt::unit::live_at`), so an exception's stack frame may show others. What the
    /// interrupted code itself sees is the same. At conditional jumps this looks only at the way that goes on, which makes it a superset.
    fn dead_flags(&mut self, mut rip: u64) -> u64 {
        let (mut dead, mut open) = (0, rflags::STATUS);
        for _ in 0..64 {
            let Some(i) = self.fetch(rip) else { return dead };
            open &= !if shows_flags(&i) { rflags::STATUS } else { status(i.rflags_read()) };
            dead |= open & status(i.rflags_modified());
            open &= !dead;
            rip = match i.flow_control() {
                FlowControl::Next | FlowControl::ConditionalBranch => i.next_ip(),
                FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => i.near_branch_target(),
                _ => return dead,
            };
        }
        dead
    }

    /// [`Oracle::dead_flags`] of code that was left for a handler.
    fn dead_before(&mut self, (size, base): &(CodeSize, u64), rip: u64) -> u64 {
        let cpu = self.vcpu.cpu();
        let now = (cpu.code_size, cpu.s.seg[1].base);
        (cpu.code_size, cpu.s.seg[1].base) = (*size, *base);
        let dead = self.dead_flags(rip);
        let cpu = self.vcpu.cpu();
        (cpu.code_size, cpu.s.seg[1].base) = now;
        dead
    }

    /// Runs a program to its end.
    pub fn run(&mut self, image: &Image<'_>) -> Result<End, Unfit> {
        let state = self.machine.lay(image);
        self.vcpu.restore(&state);
        self.vcpu.cpu().holder.enter();
        let end = self.run_steps();
        self.vcpu.cpu().holder.leave();
        let mut end = end?;
        if end.refused_push.is_some() && image.setup.alias != Alias::None {
            return Err(Unfit::Undefined);
        }
        end.memory = self.machine.snapshot();
        // The translator (`docs/deviations.md`): code that makes flags live by patching what follows finds those that were dead.
        let code = snapshot_of_code(&end.memory);
        if code != image.code {
            end.undefined |= rflags::STATUS;
            end.frame_undefined |= rflags::STATUS;
        }
        end.state = self.vcpu.save();
        Ok(end)
    }

    /// The end without state and memory.
    fn run_steps(&mut self) -> Result<End, Unfit> {
        let (mut undefined, mut framed, mut refused_push) = (0u64, 0u64, None);
        for steps in 0..STEPS {
            if self.vcpu.attend().is_some() {
                let rip = self.vcpu.cpu().rip;
                undefined |= self.dead_flags(rip);
                let (state, memory) = (CpuState::reset(), Vec::new());
                return Ok(End { state, memory, undefined, frame_undefined: framed, refused_push, steps });
            }
            let cpu = self.vcpu.cpu();
            let (rip, cl, sp) = (cpu.rip, cpu.gpr[1] as u8, cpu.gpr[4]);
            let i = self.fetch(rip);
            let before = undefined;
            let saved = (self.vcpu.cpu().code_size, self.vcpu.cpu().s.seg[1].base);
            if let Some(i) = &i {
                let reads = if shows_flags(i) { rflags::STATUS } else { status(i.rflags_read()) };
                if reads & undefined != 0 || undefined_flags::result(i, Some(cl)) {
                    return Err(Unfit::Undefined);
                }
                if !may_keep_flags(i) {
                    undefined &= !status(i.rflags_modified());
                }
                undefined |= undefined_flags::flags(i, Some(cl));
                match i.mnemonic() {
                    // Out of the exception's stack frame, or out of one that somebody made.
                    M::Iretq if (HIGH + HANDLERS..HIGH + HANDLERS + 0x1000).contains(&rip) => {
                        // What goes on may read what was pushed.
                        if refused_push.is_some() {
                            return Err(Unfit::Undefined);
                        }
                        undefined = framed;
                    }
                    M::Iretq | M::Iretd | M::Iret | M::Sysret | M::Sysretq => undefined = 0,
                    _ => {}
                }
            }
            self.vcpu.step();
            // A repeated instruction that overwrites itself: a processor may go on with it as it was, or see what it is now.
            if i.is_some_and(|i| i.is_string_instruction())
                && self.vcpu.cpu().rip == rip
                && self.fetch(rip) != i
            {
                return Err(Unfit::Undefined);
            }
            if is_handler(self.vcpu.cpu().rip) && !is_handler(rip) {
                let dead = self.dead_before(&saved, rip);
                undefined |= before | dead;
                framed = undefined;
                let vector = (self.vcpu.cpu().rip - HIGH - HANDLERS) / 16;
                if vector == 13 && saved.0 == CodeSize::Bits64 && i.is_some_and(|i| i.is_call_near_indirect())
                {
                    refused_push = data_physical(sp.wrapping_sub(8));
                }
            } else if let Some(i) = &i {
                self.executed.insert(i.code());
            }
        }
        Err(Unfit::Endless)
    }
}

/// The code in a snapshot.
fn snapshot_of_code(memory: &[u8]) -> &[u8] {
    let at = COMPARED[0].1;
    &memory[at..at + COMPARED[1].1]
}

/// The differences between the ends of both engines, one a line; empty if there are none.
pub fn differences(oracle: &End, translated: &CpuState, memory: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let mut a = oracle.state.clone();
    let mut b = translated.clone();
    let mut line = |name: &str, x: u64, y: u64| {
        if x != y {
            let _ = writeln!(out, "  {name:10} interp {x:#018x}  bt {y:#018x}");
        }
    };
    a.rflags &= !oracle.undefined;
    b.rflags &= !oracle.undefined;
    line("rip", a.rip, b.rip);
    line("rflags", a.rflags, b.rflags);
    line("cr2", a.cr2, b.cr2);
    line("cr0", a.cr0, b.cr0);
    for n in 0..16 {
        line(&format!("{:?}", iced_x86::Register::RAX + n as u32), a.gpr[n], b.gpr[n]);
    }
    for s in [&mut a, &mut b] {
        // FOP, FIP and FDP are not kept by translated code.
        s.fpu.0[6..24].fill(0);
        crate::state::normalise(&mut s.fpu.0, crate::state::Mode::Long);
    }
    for (at, (x, y)) in a.fpu.0.iter().zip(&b.fpu.0).enumerate().filter(|(_, (x, y))| x != y).take(24) {
        line(&crate::state::area_name(at), (*x).into(), (*y).into());
    }
    b.fpu = a.fpu.clone();
    let frame_at = FRAME_FLAGS - COMPARED[0].0;
    let mask = oracle.frame_undefined.to_le_bytes();
    for (at, (x, y)) in oracle.memory.iter().zip(memory).enumerate().filter(|(_, (x, y))| x != y).take(400) {
        let address = compared_address(at);
        // Accessed bits may be set for accesses that are not made in the end (SDM 3A 4.8). The translator (`docs/deviations.md`): so may dirty bits, of
        // pages that may be written, because accesses share a check (`bt::lower::group`), and misaligned ones are looked at afterwards.
        let accessed = is_data_entry(address) && (x | 0x20 == *y || x | 0x60 == *y);
        let pushed = oracle.refused_push.is_some_and(|s| (s..s + 8).contains(&address));
        if accessed || pushed {
            continue;
        }
        let in_frame = (at as u64).checked_sub(frame_at).filter(|o| *o < 8);
        if in_frame.is_none_or(|o| (x ^ y) & !mask[o as usize] != 0) {
            line(&format!("[{address:#x}]"), (*x).into(), (*y).into());
        }
    }
    if out.is_empty() && a != b {
        let _ = writeln!(out, "  other state:\n  interp {a:?}\n  bt     {b:?}");
    }
    out
}
