//! `cargo xtask lockstep`: runs one guest on QEMU (TCG, stepped through its GDB stub) and on the interpreter, instruction
//! by instruction, and stops at the first difference in a register.
//!
//! Both start from one state: QEMU runs alone to the start address; its registers and all of its memory become ours.
//! QEMU's devices serve both: what an instruction reads from a device, a clock or the CPU's identity is taken over from
//! QEMU. Interrupts are not delivered while QEMU is single-stepped, so a guest that waits for one spins or halts, and
//! there the comparison ends. Undefined flags (iced's table) are taken over too, and the null SS that QEMU loads when an
//! interrupt stack is switched to without a change of privilege (SDM 3A 6.14.4 leaves SS alone there), and the RF that it
//! does not push for faults.
//!
//! Compared after each instruction: RIP, RFLAGS but RF, general and segment registers, FS and GS base, CR0 to CR4,
//! EFER, XMM0 to XMM15, MXCSR. Not compared: x87, hidden parts of segments, MSRs, memory (but at the end, on wish).

mod compare;
mod gdb;
mod ours;
mod qemu;
mod state;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use clap::Parser;
use engine::VcpuExit;
use iced_x86::{FastFormatter, Instruction, Mnemonic};

use compare::{Difference, differences};
use ours::Ours;
use qemu::{Guest, Qemu};
use state::Registers;
use x86::bits::rflags;

/// The most iterations of one repeated string instruction.
const MAX_ITERATIONS: u32 = 10_000_000;

/// Finds the first instruction after which the interpreter and QEMU differ.
#[derive(Parser)]
#[command(name = "cargo xtask lockstep", max_term_width = 110)]
struct Options {
    /// Kernel, as QEMU's -kernel takes it (bzImage, multiboot, PVH ELF) [default: the contract suite]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk or multiboot modules
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    append: Option<String>,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u64,
    /// QEMU's CPU model; it must announce nothing that the interpreter lacks (la57)
    #[arg(long, value_name = "MODEL", default_value = "max,la57=off")]
    cpu: String,
    /// Linear address where the comparison starts, in hex; again for more, the first that is reached counts
    /// [default: entry points of an ELF, 100000 for a bzImage]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    start_at: Vec<u64>,
    /// How often the start address is passed before the comparison starts there
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: u64,
    /// Instructions to compare
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    count: u64,
    /// Instructions to show before a difference
    #[arg(long, value_name = "N", default_value_t = 20)]
    history: usize,
    /// Go on after a difference with QEMU's values (registers that cannot be taken over still end it)
    #[arg(long)]
    keep_going: bool,
    /// Compare memory at the end
    #[arg(long)]
    compare_memory: bool,
}

fn address(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).map_err(|_| format!("'{text}' is no hex address"))
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lockstep: error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Entry points of a kernel file: that of a multiboot header with addresses (multiboot 0.6.96 3.1.3); `e_entry` of an
/// ELF, and the address in its PVH note (18, "Xen"); of anything else 0x100000.
fn entry_points(kernel: &[u8]) -> Vec<u64> {
    let field = |at: usize, len: usize| -> Option<u64> {
        Some(kernel.get(at..at + len)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    let header = (0..0x2000).step_by(4).find(|&at| field(at, 4) == Some(0x1bad_b002));
    let addressed = header.filter(|at| field(at + 4, 4).is_some_and(|flags| flags >> 16 & 1 != 0));
    if let Some(entry) = addressed.and_then(|at| field(at + 28, 4)) {
        return vec![entry]; // QEMU prefers multiboot
    }
    if !kernel.starts_with(b"\x7fELF") {
        return vec![0x10_0000];
    }
    let wide = kernel.get(4) == Some(&2);
    let mut list: Vec<u64> = field(0x18, if wide { 8 } else { 4 }).into_iter().collect();
    // The note: name size 4, descriptor size 4 or 8, type 18, "Xen\0".
    let note = |d: u8| [4, 0, 0, 0, d, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0];
    for size in [4u8, 8] {
        let at = kernel.windows(16).position(|window| window == note(size));
        list.extend(at.and_then(|at| field(at + 16, 4)));
    }
    list
}

/// The run; whether there was no difference.
fn run(options: &Options) -> anyhow::Result<bool> {
    ensure!((1..=3072).contains(&options.memory), "memory must be 1 to 3072 MiB (one piece below the hole)");
    let mut _file = None;
    let kernel: PathBuf = match &options.kernel {
        Some(path) => path.clone(),
        None => {
            let file = tempfile::NamedTempFile::new()?;
            std::fs::write(file.path(), guest_embed::CONTRACT)?;
            let path = file.path().to_owned();
            _file = Some(file);
            path
        }
    };
    let starts = if options.start_at.is_empty() {
        entry_points(&std::fs::read(&kernel).with_context(|| format!("cannot read {}", kernel.display()))?)
    } else {
        options.start_at.clone()
    };
    let mut qemu = Qemu::start(&guest(options, &kernel))?;
    go_to_start(&mut qemu, &starts, options.skip)?;
    let theirs = Registers::from_packet(&qemu.gdb.registers()?)?;
    let text = qemu.gdb.monitor("info registers")?;
    let state = state::from_monitor(&text, &theirs)?;
    let memory = qemu.memory(options.memory << 20)?;
    let mut ours = Ours::new(&memory, &state)?;
    ours.adopt(&theirs);
    println!("lockstep from {:#x}", theirs.rip);
    let mut walk =
        Walk { options, history: VecDeque::new(), done: 0, external: 0, undefined: 0, differing: 0 };
    let outcome = walk.run(&mut ours, &mut qemu);
    let serial = qemu.serial();
    if !serial.is_empty() {
        println!("the guest said on QEMU's serial port:\n{}", serial.trim_end());
    }
    println!(
        "{} instructions compared; {} took QEMU's result (devices, clocks, identity), {} its undefined flags",
        walk.done, walk.external, walk.undefined
    );
    println!("{}", outcome?);
    if options.compare_memory && !qemu.gdb.ended {
        compare_memory(&ours, &mut qemu, memory.len())?;
    }
    Ok(walk.differing == 0)
}

fn guest<'a>(options: &'a Options, kernel: &'a Path) -> Guest<'a> {
    Guest {
        kernel,
        initrd: options.initrd.as_deref(),
        append: options.append.as_deref(),
        memory_mib: options.memory,
        cpu: &options.cpu,
    }
}

/// Lets QEMU run alone to the first of `starts`, past it `skip` times.
fn go_to_start(qemu: &mut Qemu, starts: &[u64], skip: u64) -> anyhow::Result<()> {
    for &start in starts {
        qemu.gdb.breakpoint(start, true)?;
    }
    for _ in 0..=skip {
        qemu.gdb.go_on().with_context(|| format!("QEMU does not reach {starts:#x?}"))?;
    }
    for &start in starts {
        qemu.gdb.breakpoint(start, false)?;
    }
    Ok(())
}

/// An instruction that was executed.
#[derive(Clone)]
struct Executed {
    address: u64,
    instruction: Instruction,
}

/// The comparison under way.
struct Walk<'a> {
    options: &'a Options,
    history: VecDeque<Executed>,
    done: u64,
    external: u64,
    undefined: u64,
    differing: u64,
}

impl Walk<'_> {
    /// Steps both sides; says why it ended.
    fn run(&mut self, ours: &mut Ours, qemu: &mut Qemu) -> anyhow::Result<String> {
        while self.done < self.options.count {
            let (bits, address) = ours.code();
            let instruction = compare::decode(bits, address, &ours.bytes(address));
            let executed = Executed { address, instruction };
            self.remember(executed.clone());
            if compare::is_waiting(&instruction) {
                return Ok(format!("ended: the guest waits for an interrupt at {address:#x}"));
            }
            let before = ours.registers();
            let stepped = ours.step(compare::is_debug_move(&instruction));
            let moved = ours.registers().rip != before.rip;
            let theirs = match self.step_qemu(qemu, &before, &executed, stepped.exceptions, moved) {
                Err(_) if qemu.gdb.ended => return Ok("ended: the guest powered off".to_owned()),
                result => result?,
            };
            self.done += 1;
            let external = stepped.read_device || compare::is_external(&instruction);
            if !self.agree(ours, qemu, &before, &theirs, (external, stepped.exceptions))? {
                return Ok(format!("ended: first difference after instruction {}", self.done));
            }
            match stepped.exit {
                VcpuExit::Budget | VcpuExit::Kicked | VcpuExit::Debug(_) => {}
                VcpuExit::TripleFault => return Ok("ended: triple fault".to_owned()),
                VcpuExit::Failed => return Ok("ended: the engine cannot go on".to_owned()),
                VcpuExit::Halted => return Ok("ended: the guest waits for an interrupt".to_owned()),
            }
        }
        Ok("ended: all compared".to_owned())
    }

    fn remember(&mut self, executed: Executed) {
        if self.history.len() == self.options.history.max(1) {
            self.history.pop_front();
        }
        self.history.push_back(executed);
    }

    /// One instruction of QEMU's: a repeated one is a step an iteration, an exception a step of its own. Now and then a
    /// step of QEMU's comes back without having executed anything; it is repeated.
    fn step_qemu(
        &self,
        qemu: &mut Qemu,
        before: &Registers,
        Executed { address, instruction }: &Executed,
        exceptions: u64,
        ours_moved: bool,
    ) -> anyhow::Result<Registers> {
        let repeated = (instruction.has_rep_prefix() || instruction.has_repne_prefix())
            && instruction.is_string_instruction();
        let (mut steps, mut iterations) = (exceptions + 1, 0);
        loop {
            qemu.gdb.step()?;
            let now = Registers::from_packet(&qemu.gdb.registers()?)?;
            iterations += 1;
            ensure!(iterations < MAX_ITERATIONS, "QEMU does not get past {:#x}", before.rip);
            if now.rip == before.rip && repeated && now.rflags & rflags::IF == 0 {
                // No interrupt can come between, so the rest may run at full speed.
                let next = address.wrapping_add(instruction.len() as u64);
                qemu.gdb.breakpoint(next, true)?;
                qemu.gdb.go_on()?;
                qemu.gdb.breakpoint(next, false)?;
                return Registers::from_packet(&qemu.gdb.registers()?);
            }
            if now.rip == before.rip && (repeated || now == *before && ours_moved) {
                continue;
            }
            steps -= 1;
            if steps == 0 {
                return Ok(now);
            }
        }
    }

    /// Compares after an instruction; takes over what may differ. False at a difference that counts.
    fn agree(
        &mut self,
        ours: &mut Ours,
        qemu: &mut Qemu,
        before: &Registers,
        theirs: &Registers,
        (external, exceptions): (bool, u64),
    ) -> anyhow::Result<bool> {
        let long = ours.code().0 == 64;
        let Some(last) = self.history.back().cloned() else { return Ok(true) };
        if external {
            self.external += 1;
            self.adopt_external(ours, qemu, before, theirs, &last.instruction)?;
        }
        let interrupts = exceptions > 0 || is_interrupt(&last.instruction);
        if interrupts && long && theirs.selectors[1] == 0 {
            ours.forget_stack_segment();
        }
        if exceptions > 0 {
            take_over_resume_flag(ours, qemu, theirs)?;
        }
        let mut mine = ours.registers();
        let undefined = compare::undefined_flags(&last.instruction);
        if (mine.rflags ^ theirs.rflags) & undefined != 0 {
            self.undefined += 1;
            let chosen =
                Registers { rflags: mine.rflags & !undefined | theirs.rflags & undefined, ..mine.clone() };
            ours.adopt(&chosen);
            mine = ours.registers();
        }
        let list = differences(&mine, theirs, long);
        if list.is_empty() {
            return Ok(true);
        }
        self.differing += 1;
        self.report(&list, &mine, theirs);
        if !self.options.keep_going {
            return Ok(false);
        }
        ours.adopt(theirs);
        Ok(differences(&ours.registers(), theirs, long).is_empty())
    }

    /// QEMU's registers after an instruction that asked the outside, and for string input its memory too.
    fn adopt_external(
        &self,
        ours: &mut Ours,
        qemu: &mut Qemu,
        before: &Registers,
        theirs: &Registers,
        instruction: &Instruction,
    ) -> anyhow::Result<()> {
        ours.adopt(theirs);
        if instruction.is_string_instruction() {
            let (from, to) = (before.gpr[7].min(theirs.gpr[7]), before.gpr[7].max(theirs.gpr[7]));
            let len = usize::try_from(to.wrapping_sub(from))?.clamp(8, 1 << 16);
            if let Ok(bytes) = qemu.gdb.memory(from, len) {
                ours.patch(from, &bytes);
            }
        }
        Ok(())
    }

    fn report(&self, list: &[Difference], ours: &Registers, qemu: &Registers) {
        println!("\nafter instruction {} these differ:", self.done);
        for d in list {
            println!(
                "  {:<8} ours {:#x}  QEMU {:#x}  (exclusive or {:#x})",
                d.name,
                d.ours,
                d.qemu,
                d.ours ^ d.qemu
            );
        }
        println!("the last {} instructions:", self.history.len());
        let mut formatter = FastFormatter::new();
        for Executed { address, instruction } in &self.history {
            let mut text = String::new();
            formatter.format(instruction, &mut text);
            println!("  {address:016x}  {text}");
        }
        show("ours", ours);
        show("QEMU", qemu);
    }
}

/// Takes over the frame of an exception where it differs in RFLAGS.RF only: QEMU pushes 0, the architecture 1 for faults
/// (SDM 3B 17.3.1.1). Other differences show when the handler reads them.
fn take_over_resume_flag(ours: &mut Ours, qemu: &mut Qemu, theirs: &Registers) -> anyhow::Result<()> {
    let Ok(frame) = qemu.gdb.memory(theirs.gpr[4], 48) else { return Ok(()) };
    let mine = ours.data(theirs.gpr[4], 48);
    let only_rf = mine.iter().zip(&frame).enumerate().all(|(i, (a, b))| a == b || a ^ b == 1 && i % 4 == 2);
    if only_rf {
        ours.patch(theirs.gpr[4], &frame);
    }
    Ok(())
}

/// INT n and its short forms.
fn is_interrupt(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Int | M::Int1 | M::Int3 | M::Into)
}

/// One side's general registers.
fn show(side: &str, r: &Registers) {
    println!(
        "{side}: rip {:016x} rflags {:08x} cr0 {:08x} cr3 {:x} cr4 {:x} efer {:x}",
        r.rip, r.rflags, r.cr[0], r.cr[2], r.cr[3], r.efer
    );
    for (names, values) in state::NAMES.chunks(4).zip(r.gpr.chunks(4)) {
        let line: Vec<String> = names.iter().zip(values).map(|(n, v)| format!("{n:>3} {v:016x}")).collect();
        println!("      {}", line.join("  "));
    }
}

/// Says in which pages memory differs.
fn compare_memory(ours: &Ours, qemu: &mut Qemu, len_bytes: usize) -> anyhow::Result<()> {
    let (mine, theirs) = (ours.memory(len_bytes)?, qemu.memory(len_bytes as u64)?);
    let pages = mine.chunks(4096).zip(theirs.chunks(4096)).enumerate();
    let differing: Vec<usize> =
        pages.filter(|(i, (a, b))| a != b && !(0xa0..0x100).contains(i)).map(|(i, _)| i).collect();
    println!("memory differs in {} pages (0xa0000 to 0xfffff left out)", differing.len());
    for &page in differing.iter().take(8) {
        let at = page * 4096;
        let offset = (at..at + 4096).find(|&i| mine[i] != theirs[i]).unwrap_or(at);
        println!(
            "  {offset:#x}: ours {:02x?}  QEMU {:02x?}",
            &mine[offset..(offset + 8).min(len_bytes)],
            &theirs[offset..(offset + 8).min(len_bytes)]
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_is_the_multiboot_headers_or_the_files() {
        assert_eq!(entry_points(guest_embed::CONTRACT).len(), 1);
        let mut elf = b"\x7fELF\x02".to_vec();
        elf.resize(0x18, 0);
        elf.extend([0x34, 0x12, 0, 0, 0, 0, 0, 0]);
        assert_eq!(entry_points(&elf), [0x1234]);
        assert_eq!(entry_points(b"MZ"), [0x10_0000]);
        assert_eq!(address("0x10"), Ok(16));
    }
}
