//! Differential tests: random user instructions on the host CPU and in the interpreter must come to the same state.
//!
//! `TRELLIS_SEED=0x… cargo test -p x86_interp --test differential` replays one case (`TRELLIS_MODE=compat` for a 32-bit
//! one); `TRELLIS_CASES=n` runs n cases of each mode from a seed of the clock, all mismatches being reported at the end.

#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test, whose random numbers are cut to size"
)]

mod case;
#[path = "../common/mod.rs"]
mod common;
mod excluded;
mod generate;
mod guest;
mod initial;
mod known;
mod native;
mod rng;
mod state;
mod undefined_flags;

use std::collections::{BTreeMap, BTreeSet};

use case::{Case, Verdict};
use generate::{Catalogue, GROUPS};
use guest::Guest;
use native::Native;
use rng::Rng;
use state::Mode;

/// Cases of each mode in the ordinary test run.
const CASES: u64 = 60_000;
/// Where the ordinary run starts: the same cases on every run.
const FIRST_SEED: u64 = 0x7265_6c6c_6973;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
    Some(parsed.unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

struct Tally {
    same: u64,
    endless: u64,
    known: BTreeMap<&'static str, u64>,
    vectors: BTreeMap<u8, u64>,
    codes: BTreeSet<u32>,
    failures: Vec<(String, String)>,
}

fn run_cases(mode: Mode, cases: u64, first_seed: u64, patience: usize) -> Tally {
    let (mut native, mut guest) = (Native::new(), Guest::new());
    let catalogue = Catalogue::new(mode);
    let mut seeds = Rng::new(first_seed);
    let mut tally = Tally {
        same: 0,
        endless: 0,
        known: BTreeMap::new(),
        vectors: BTreeMap::new(),
        codes: BTreeSet::new(),
        failures: Vec::new(),
    };
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let trace = std::env::var_os("TRELLIS_TRACE").is_some();
    for _ in 0..cases {
        let seed = seeds.next();
        if trace {
            eprintln!("{seed:#x}");
        }
        let case = Case::generate(seed, &catalogue);
        match case.judge(&mut native, &mut guest) {
            Verdict::Same(outcome) => {
                tally.same += 1;
                *tally.vectors.entry(outcome.vector).or_default() += 1;
                tally.codes.extend(case.codes().map(|c| c as u32));
            }
            Verdict::Endless => tally.endless += 1,
            Verdict::Known(reason) => *tally.known.entry(reason).or_default() += 1,
            Verdict::Different(_) => {
                let small = case.shrink(&mut native, &mut guest);
                let Verdict::Different(text) = small.judge(&mut native, &mut guest) else { continue };
                let names: Vec<_> = small.codes().map(|c| format!("{c:?}")).collect();
                let name = names.join(" ");
                let times = seen.entry(name.clone()).or_default();
                *times += 1;
                if *times == 1 {
                    tally.failures.push((name, text));
                }
                if tally.failures.len() >= patience {
                    break;
                }
            }
        }
    }
    tally
}

fn check(mode: Mode) {
    if let Some(seed) = number("TRELLIS_SEED") {
        let wanted =
            if std::env::var("TRELLIS_MODE").as_deref() == Ok("compat") { Mode::Compat } else { Mode::Long };
        if mode == wanted {
            replay(mode, seed);
        }
        return;
    }
    let long_run = number("TRELLIS_CASES");
    let first = number("TRELLIS_FIRST").unwrap_or_else(|| match long_run {
        Some(_) => std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        None => FIRST_SEED,
    });
    let patience = if long_run.is_some() { 200 } else { 5 };
    let tally = run_cases(mode, long_run.unwrap_or(CASES), first, patience);
    println!(
        "{mode:?}: first seed {first:#x}: {} cases agree, {} took too long, {} encodings, ended with (vector: cases) {:?}",
        tally.same,
        tally.endless,
        tally.codes.len(),
        tally.vectors
    );
    for (reason, times) in &tally.known {
        println!("    accepted {times} times: {reason}");
    }
    for (name, text) in &tally.failures {
        println!("---- {name}\n{text}");
        let compat = if mode == Mode::Compat { "TRELLIS_MODE=compat " } else { "" };
        println!(
            "replay: {compat}TRELLIS_SEED=… cargo test -p x86_interp --test differential -- --nocapture"
        );
    }
    assert!(tally.failures.is_empty(), "{} kinds of mismatch", tally.failures.len());
}

fn replay(mode: Mode, seed: u64) {
    let (mut native, mut guest) = (Native::new(), Guest::new());
    let case = Case::generate(seed, &Catalogue::new(mode));
    match case.judge(&mut native, &mut guest) {
        Verdict::Same(outcome) => println!("{seed:#x}: both end with vector {}", outcome.vector),
        Verdict::Endless => println!("{seed:#x}: takes too long"),
        Verdict::Known(reason) => println!("{seed:#x}: known difference: {reason}"),
        Verdict::Different(text) => {
            let small = case.shrink(&mut native, &mut guest);
            if let Verdict::Different(text) = small.judge(&mut native, &mut guest) {
                println!("shrunk to:\n{text}");
            }
            panic!("{text}");
        }
    }
}

#[test]
fn long_mode_instructions_agree_with_the_host() {
    check(Mode::Long);
}

#[test]
fn compatibility_mode_instructions_agree_with_the_host() {
    check(Mode::Compat);
}

#[test]
fn catalogue_covers_every_group() {
    for mode in [Mode::Long, Mode::Compat] {
        let catalogue = Catalogue::new(mode);
        for group in GROUPS {
            println!("{mode:?} {group:?}: {} encodings", catalogue.codes(group).len());
        }
        assert!(catalogue.codes(generate::Group::Integer).len() > 400);
    }
}

/// Runs `bytes` on some random states changed by `set`, and compares.
fn agree(mode: Mode, bytes: &[u8], set: impl Fn(&mut state::Registers)) {
    let (mut native, mut guest) = (Native::new(), Guest::new());
    for seed in 0..40 {
        let mut case = Case::of_bytes(mode, bytes, seed);
        set(&mut case.regs);
        if let Verdict::Different(text) = case.judge(&mut native, &mut guest) {
            panic!("{text}");
        }
    }
}

#[test]
fn sse_with_an_x87_exception_pending_is_no_x87_error() {
    // pand xmm2, xmm4; aesdec xmm1, xmm2: opcodes 0F DB and 0F 38 DE are no x87 escapes.
    agree(Mode::Long, &[0x66, 0x0f, 0xdb, 0xd4, 0x66, 0x0f, 0x38, 0xde, 0xca], |r| {
        r.fpu[..4].copy_from_slice(&[0x41, 0x03, 0xdd, 0xc8]);
    });
}

#[test]
fn string_compare_with_wide_lengths_needs_no_alignment() {
    // pcmpestri xmm4, [rbx], 0 with REX.W.
    agree(Mode::Long, &[0x66, 0x48, 0x0f, 0x3a, 0x61, 0x23, 0], |r| r.gpr[3] = state::DATA + 0x1003);
}

#[test]
fn arpl_that_changes_nothing_writes_nothing() {
    // arpl [ebx], bp in the read-only page.
    agree(Mode::Compat, &[0x63, 0x2b], |r| {
        r.gpr[3] = state::DATA + state::DATA_BYTES as u64;
        r.gpr[5] &= !3;
    });
}

#[test]
fn segment_overrides_of_64_bit_code_do_not_choose_the_exception() {
    // mov eax, ss:[rdx]; and mov eax, es:[rbp], non-canonical; the same for fld.
    for code in [&[0x36, 0x8b, 0x02][..], &[0x26, 0x8b, 0x45, 0], &[0x36, 0xdd, 0x02], &[0x26, 0xdd, 0x45, 0]]
    {
        agree(Mode::Long, code, |r| {
            r.gpr[2] = 1 << 63;
            r.gpr[5] = 1 << 63;
            r.fpu[..4].copy_from_slice(&[0x7f, 0x03, 0, 0]);
        });
    }
}

#[test]
fn suppressed_exceptions_do_not_flush_results_to_zero() {
    if !is_x86_feature_detected!("avx512f") {
        println!("skipped: this host has no AVX-512");
        return;
    }
    // vdivps zmm4, zmm1, zmm0, {rz-sae} with underflow unmasked.
    for mxcsr in [0x1780u32, 0x9780] {
        agree(Mode::Long, &[0x62, 0xf1, 0x74, 0x78, 0x5e, 0xe0], |r| {
            r.fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
            // Small by large: denormal results.
            r.fpu[160..176].copy_from_slice(&[0, 0, 0x80, 0x4b].repeat(4));
            r.fpu[176..192].copy_from_slice(&[1, 0, 0, 1].repeat(4));
        });
        // vrcp14ps zmm4, zmm0 of large values: the results are denormal.
        agree(Mode::Long, &[0x62, 0xf2, 0x7d, 0x48, 0x4c, 0xe0], |r| {
            r.fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
            r.fpu[160..176].copy_from_slice(&[1, 0, 0x7f, 0x7f].repeat(4));
        });
    }
}
