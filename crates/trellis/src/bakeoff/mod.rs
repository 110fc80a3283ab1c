//! `trellis bakeoff`: the user's own workload in each mode, side by side, with the reason why.
//!
//! The way of the data: [`args`] → [`workload`] lays the command and its files as a root, for the host and for guests → [`mod@run`] (a command) or
//! [`machine`] (a machine of the user's) gives times and statistics → [`account`] takes the differences → [`explain`] → [`hot`] names code by
//! [`crate::symbols`] → [`report`], with [`crate::model`]'s prediction and [`advice`] → [`text`], JSON, [`page`].
//!
//! What befalls one mode is a line of the result; the rest runs.

pub mod account;
pub mod advice;
pub mod args;
pub mod explain;
pub mod hot;
pub mod machine;
pub mod page;
pub mod report;
pub mod run;
pub mod text;
pub mod workload;

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};

pub use args::BakeoffArgs;
use hot::{Names, PIE_BASE};
use report::Bakeoff;
use workload::Workload;

use crate::bench::guest::{CMDLINE, GuestSize, Place};
use crate::bench::root::ProgramRoot;
use crate::bench::session::SessionError;
use crate::model::table::Predicted;
use crate::prepare::PrepareError;
use crate::progress::Progress;
use crate::symbols::Symbols;
use crate::terminal::tell;

/// What asks the translator for samples.
const PROFILE: &[&str] = &["--profile"];
/// Code stays where symbols say, in guests of ours.
const FIXED: &str = " nokaslr norandmaps";

/// Runs `trellis bakeoff`; returns what is for standard output, and the exit status.
///
/// # Errors
/// What keeps the whole run from happening.
pub fn run(args: &BakeoffArgs) -> anyhow::Result<(String, ExitCode)> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot watch for signals")?;
    }
    let mut bakeoff =
        if args.is_machine() { own_machine(args, &interrupted)? } else { command(args, &interrupted)? };
    for mode in &bakeoff.modes {
        let reason = mode.error.as_ref().map(|error| format!("{} failed: {error}", mode.name));
        let reason =
            reason.or_else(|| mode.skipped.as_ref().map(|why| format!("{} is left out: {why}", mode.name)));
        bakeoff.notes.extend(reason);
    }
    bakeoff.advice = advice::advise(&bakeoff);
    let written = write_report(args, &bakeoff);
    let text = if args.json { bakeoff.json() } else { text::render(&bakeoff) };
    let good = bakeoff.is_good() && written;
    Ok((text, if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }))
}

/// Writes the report and says where. Returns whether it is there, if it was asked for.
fn write_report(args: &BakeoffArgs, bakeoff: &Bakeoff) -> bool {
    let Some((file, asked_for)) = args.report_file() else { return true };
    match fs::write(&file, page::page(bakeoff)) {
        Ok(()) => tell(&format!("trellis: report: {}\n", file.display())),
        Err(error) => {
            tell(&format!("trellis: cannot write the report {}: {error}\n", file.display()));
            return !asked_for;
        }
    }
    true
}

/// A command of this host.
fn command(args: &BakeoffArgs, interrupted: &Arc<AtomicBool>) -> anyhow::Result<Bakeoff> {
    let workload = Workload::new(args)?;
    let room = crate::options::parse_memory(&args.memory).map_err(PrepareError::Usage)? / 3;
    if workload.len() > room {
        let needed = workload.len().div_ceil(1 << 20);
        return Err(PrepareError::Usage(format!(
            "the command's files have {needed} MiB, which lie in the guest's memory; give it more with --memory {}M",
            needed * 4
        ))
        .into());
    }
    let modes = args.modes();
    let with_guest = modes.iter().any(|mode| mode.needs_kernel());
    let mut place = Place::prepare(with_guest, args.kernel.as_deref())?;
    let natively = modes.iter().any(|mode| !mode.needs_kernel());
    place.programs = Some(ProgramRoot::of_entries(&workload.entries, natively, with_guest)?);
    place.size =
        GuestSize { memory: args.memory.clone(), cpus: args.cpus, cmdline: format!("{CMDLINE}{FIXED}") };
    let steps = modes.len() as u64 * u64::from(args.runs() + 1) + 1;
    let progress = Progress::of_steps(steps);
    let outcomes = run::all(args, &place, &progress, interrupted)?;
    let (names, mut notes) =
        names(args, place.guest.as_ref().map(|guest| guest.kernel.as_path()), Some(&workload));
    let counts = modes.iter().any(|mode| mode.engine() == Some("interp"));
    let mut bakeoff = Bakeoff::new(workload.name, outcomes, false, &names);
    let interpreted = bakeoff.modes.iter().any(|mode| mode.name == "interp" && mode.seconds.is_some());
    if let (true, true, Some(native)) = (counts, interpreted, bakeoff.native_cpu_seconds) {
        progress.at("counting for the prediction");
        match run::count(args, &place, interrupted) {
            Ok(events) => {
                let hz = bakeoff.host.as_ref().map_or(0.0, |host| host.tsc_hz);
                bakeoff.predicted = Some(Predicted::new("command", "run", events, native * hz));
            }
            Err(SessionError::Interrupted) => return Err(SessionError::Interrupted.into()),
            Err(error) => notes.push(format!("nothing is predicted: {error}")),
        }
    }
    progress.advance(1);
    bakeoff.notes.extend(notes);
    bakeoff.notes.extend(place.programs.iter().flat_map(|programs| programs.notes.clone()));
    Ok(bakeoff)
}

/// A machine of the user's own.
fn own_machine(args: &BakeoffArgs, interrupted: &Arc<AtomicBool>) -> anyhow::Result<Bakeoff> {
    if args.kernel.is_none() && args.disk.is_empty() {
        return Err(PrepareError::Usage(
            "what is to be run? Give a command behind --, or a machine by --kernel or --disk".to_owned(),
        )
        .into());
    }
    for file in args.kernel.iter().chain(&args.initrd).chain(&args.disk) {
        if !file.is_file() {
            return Err(PrepareError::Usage(format!("there is no file {}", file.display())).into());
        }
    }
    let progress = Progress::of_steps(args.modes().len() as u64 * u64::from(args.runs()));
    let outcomes = machine::all(args, &progress, interrupted)?;
    let (names, notes) = names(args, args.kernel.as_deref(), None);
    let what = args
        .kernel
        .as_ref()
        .or(args.disk.first())
        .map_or_else(String::new, |file| file.display().to_string());
    let mut bakeoff = Bakeoff::new(format!("machine: {what}"), outcomes, true, &names);
    bakeoff.notes.extend(notes);
    Ok(bakeoff)
}

/// The names that there are, and what could not be read of them.
fn names(
    args: &BakeoffArgs,
    kernel: Option<&std::path::Path>,
    workload: Option<&Workload>,
) -> (Names, Vec<String>) {
    let (mut names, mut notes) = (Names::default(), Vec::new());
    if let Some(kernel) = kernel {
        match Symbols::read(kernel) {
            Ok(symbols) => names.kernel = symbols,
            Err(error) => notes.push(format!("kernel functions have no names: {error}")),
        }
    }
    if let Some(workload) = workload
        && let Ok(symbols) = Symbols::parse(&workload.program)
    {
        names.program = if symbols.is_relative() { symbols.shifted(PIE_BASE) } else { symbols };
    }
    for file in &args.symbols {
        match Symbols::read(file) {
            Ok(symbols) if symbols.is_of_kernel() => names.kernel = symbols,
            Ok(symbols) => names.program = symbols,
            Err(error) => notes.push(format!("no symbols: {error}")),
        }
    }
    (names, notes)
}
