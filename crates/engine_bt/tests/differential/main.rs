//! Differential tests: random programs in the translator and in the interpreter must come to the same state and memory, under every
//! stress knob. The interpreter itself is compared with the host by `x86_interp`'s differential tests, whose generator this uses.
//!
//! `TRELLIS_SEED=0x… cargo test -p engine_bt --test differential` replays one program under every knob; `TRELLIS_CASES=n` runs n programs
//! per knob from a seed of the clock (`TRELLIS_FIRST=0x…`: from that), all mismatches being reported at the end; `TRELLIS_TRACE=1` prints each seed before it runs.

#![allow(
    dead_code,
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test, whose random numbers are cut to size; the shared generator has more than is used here"
)]

#[path = "../../../x86_interp/tests/differential/excluded.rs"]
mod excluded;
#[path = "../../../x86_interp/tests/differential/generate.rs"]
mod generate;
mod handlers;
mod hostile;
#[path = "../../../x86_interp/tests/differential/initial.rs"]
mod initial;
mod machine;
mod oracle;
mod program;
#[path = "../../../x86_interp/tests/differential/rng.rs"]
mod rng;
mod segments;
mod special;
#[path = "../../../x86_interp/tests/differential/state.rs"]
mod state;
mod subject;
#[path = "../../../x86_interp/tests/differential/undefined_flags.rs"]
mod undefined_flags;

use std::collections::BTreeMap;

use engine_bt::Knobs;
use generate::Catalogue;
use machine::Image;
use oracle::{Oracle, Unfit, differences};
use program::{Layout, Program};
use rng::Rng;
use state::{CODE, Mode};
use subject::Subject;

/// Programs per knob in the ordinary test run.
const CASES: u64 = 2_500;
/// Where the ordinary run starts: the same programs on every run.
const FIRST_SEED: u64 = 0x7472_656c_6c69_7301;

/// The program of a seed. Where adapted forms are tested, half of them are accesses that cross pages.
fn program(seed: u64, catalogue: &Catalogue, knobs: Knobs) -> Program {
    if matches!(knobs.adapt, 1 | u32::MAX) && seed & 1 == 0 {
        Program::of_crossing_accesses(seed, catalogue)
    } else {
        Program::generate(seed, catalogue)
    }
}

/// How a program came out.
enum Verdict {
    Same(u32),
    Unfit(Unfit),
    Different(String),
}

fn judge(program: &Program, oracle: &mut Oracle, subject: &mut Subject) -> Verdict {
    let Some(layout) = program.layout() else { return Verdict::Unfit(Unfit::Endless) };
    judge_layout(program, &layout, oracle, subject, false)
}

/// The same with code that need not be the program's. `always`: the translator runs also what is not compared.
fn judge_layout(
    program: &Program,
    layout: &Layout,
    oracle: &mut Oracle,
    subject: &mut Subject,
    always: bool,
) -> Verdict {
    let resume = layout.starts[program.resume.min(layout.starts.len() - 1)];
    let image = Image {
        setup: &program.setup,
        regs: &program.regs,
        code: &layout.code,
        data: &program.data,
        read_only: &program.read_only,
        resume,
    };
    let end = match oracle.run(&image) {
        Ok(end) => end,
        Err(unfit) => {
            if always {
                subject.run(&image);
            }
            return Verdict::Unfit(unfit);
        }
    };
    let (state, memory, stuck) = subject.run(&image);
    let mut text = differences(&end, &state, &memory);
    if stuck {
        text = format!("  bt does not come to an end\n{text}");
    }
    if text.is_empty() {
        return Verdict::Same(end.steps);
    }
    Verdict::Different(format!(
        "seed {:#x}, {} steps, resumes at {resume:#x}, {:?}\n{}differences:\n{text}registers before: rflags {:#x}, {:#x?}\n",
        program.seed,
        end.steps,
        program.setup,
        program.listing(layout),
        program.regs.rflags,
        program
            .regs
            .gpr
            .iter()
            .zip(&end.state.gpr)
            .zip(&state.gpr)
            .map(|((a, b), c)| (*a, *b, *c))
            .collect::<Vec<_>>(),
    ))
}

/// Drops instructions while the program still differs.
fn shrink(program: &Program, oracle: &mut Oracle, subject: &mut Subject) -> String {
    let mut best = program.clone();
    let mut text = String::new();
    let mut n = 0;
    while n < best.items.len() {
        let smaller = best.without(n);
        match judge(&smaller, oracle, subject) {
            Verdict::Different(t) => {
                (best, text) = (smaller, t);
                n = 0;
            }
            _ => n += 1,
        }
    }
    text
}

struct Tally {
    same: u64,
    steps: u64,
    unfit: BTreeMap<Unfit, u64>,
    failures: Vec<String>,
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(parsed.unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

fn run_cases(mode: Mode, knobs: Knobs, cases: u64, first: u64, patience: usize) -> Tally {
    let catalogue = Catalogue::new(mode);
    let (mut oracle, mut subject) = (Oracle::new(), Subject::new(knobs));
    let mut seeds = Rng::new(first);
    let mut tally = Tally { same: 0, steps: 0, unfit: BTreeMap::new(), failures: Vec::new() };
    let trace = std::env::var_os("TRELLIS_TRACE").is_some();
    for _ in 0..cases {
        let seed = seeds.next();
        if trace {
            eprintln!("{seed:#x}");
        }
        let program = program(seed, &catalogue, knobs);
        match judge(&program, &mut oracle, &mut subject) {
            Verdict::Same(steps) => {
                tally.same += 1;
                tally.steps += u64::from(steps);
            }
            Verdict::Unfit(why) => *tally.unfit.entry(why).or_default() += 1,
            Verdict::Different(text) => {
                let small = shrink(&program, &mut oracle, &mut subject);
                tally.failures.push(if small.is_empty() { text } else { small });
                if tally.failures.len() >= patience {
                    break;
                }
            }
        }
    }
    println!(
        "{knobs:?}: first seed {first:#x}: {} programs agree ({} instructions, {} encodings), not compared: {:?}; {}",
        tally.same,
        tally.steps,
        oracle.executed.len(),
        tally.unfit,
        subject.report(),
    );
    tally
}

/// Programs under `knobs`, which must all agree.
fn check(name: &str, text: &str, mode: Mode) {
    let knobs = Knobs::parse(&format!("warm=0,{text}"));
    if let Some(seed) = number("TRELLIS_SEED") {
        let program = program(seed, &Catalogue::new(mode), knobs);
        let (mut oracle, mut subject) = (Oracle::new(), Subject::new(knobs));
        if let Verdict::Different(text) = judge(&program, &mut oracle, &mut subject) {
            println!("{text}shrunk to:\n{}", shrink(&program, &mut oracle, &mut subject));
            panic!("{name}: {seed:#x} differs");
        }
        return;
    }
    let long_run = number("TRELLIS_CASES");
    let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    let own = name.bytes().fold(FIRST_SEED, |n, b| n.rotate_left(7) ^ u64::from(b));
    let first = number("TRELLIS_FIRST").unwrap_or_else(|| if long_run.is_some() { clock() } else { own });
    let patience = if long_run.is_some() { 60 } else { 4 };
    let tally = run_cases(mode, knobs, long_run.unwrap_or(CASES), first, patience);
    for text in &tally.failures {
        println!("---- {name}: {text}");
        println!("replay: TRELLIS_SEED=… cargo test -p engine_bt --test differential {name} -- --nocapture");
    }
    assert!(tally.failures.is_empty(), "{} mismatches", tally.failures.len());
    assert!(tally.same > 0, "no program was compared");
}

macro_rules! under {
    ($mode:ident; $($name:ident: $knobs:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            check(stringify!($name), $knobs, Mode::$mode);
        })*
    };
}

under! {
    Long;
    programs_agree: "",
    programs_agree_in_warm_code: "warm=3",
    programs_agree_instruction_by_instruction: "unit=1",
    programs_agree_in_short_units: "unit=3",
    programs_agree_without_links: "chain=off",
    programs_agree_with_interpreted_vectors: "fp=off",
    programs_agree_in_a_tiny_cache: "code=64K",
    programs_agree_adapted_at_once: "adapt=1",
    programs_agree_in_adapted_forms: "adapt=all",
    programs_agree_in_adapted_forms_one_by_one: "adapt=all,unit=1",
    programs_agree_in_adapted_forms_with_a_tlb_of_one_entry: "adapt=all,tlb=one",
    programs_agree_when_all_is_forgotten: "tlb=off,forget=1,chain=off",
    programs_agree_with_a_tlb_of_one_entry: "tlb=one",
    programs_agree_with_fragments_made_again: "again=2",
    programs_agree_with_full_logs: "log=1",
    programs_agree_without_trust_in_address_spaces: "context=off",
}

under! {
    Compat;
    legacy_programs_agree: "",
    legacy_programs_agree_in_warm_code: "warm=3",
    legacy_programs_agree_instruction_by_instruction: "unit=1",
    legacy_programs_agree_in_short_units: "unit=3",
    legacy_programs_agree_without_links: "chain=off",
    legacy_programs_agree_with_interpreted_vectors: "fp=off",
    legacy_programs_agree_in_a_tiny_cache: "code=64K",
    legacy_programs_agree_when_all_is_forgotten: "tlb=off,forget=1,chain=off",
}

#[test]
fn generated_code_starts_where_the_machine_does() {
    let program = Program::generate(1, &Catalogue::new(Mode::Long));
    assert!(program.regs.rip >= CODE && program.layout().is_some());
}
