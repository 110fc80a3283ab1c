//! `trellis bench`: the same programs natively and under each engine, side by side in one run.
//!
//! The way of the data: [`args`] says what is wanted → [`catalog`] names benchmarks and [`mode`] names modes → a
//! [`session`] is one running copy of the program (`guest_bench`), as a process or as process 1 of a guest that [`guest`]
//! puts together, for real programs in the [`root`] that holds them → [`matrix`] calibrates and measures in turn → [`stats`] → [`report`] as JSON or, by [`table`], as text, beside an older one by [`compare`], and as a page for a browser by
//! [`html`].
//!
//! Durations are taken on the host's clock when marks arrive; the guest's own clock is only checked against it.

pub mod args;
pub mod catalog;
pub mod compare;
pub mod guest;
pub mod host;
pub mod html;
pub mod matrix;
pub mod mode;
pub mod predict;
pub mod report;
pub mod root;
pub mod session;
pub mod stats;
pub mod table;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};

pub use args::BenchArgs;
use args::Plan;
use compare::Old;
use matrix::Matrix;
use report::Report;

use crate::image;
use crate::progress::Progress;
use crate::terminal::tell;

/// Runs `trellis bench`; returns what is for standard output, and the exit status.
///
/// # Errors
/// What keeps the whole run from happening; what befalls one benchmark or mode is a line of the result.
pub fn run(args: &BenchArgs) -> anyhow::Result<(String, ExitCode)> {
    if args.list {
        return Ok((catalog::list(), ExitCode::SUCCESS));
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot watch for signals")?;
    }
    // Before anything is measured: it would be a pity afterwards.
    let old = args.compare.as_deref().map(Old::read).transpose()?;
    let mut plan = args.plan();
    let mut place = guest::Place::prepare(plan.needs_kernel() || args.predict, args.kernel.as_deref())?;
    for group in [catalog::REAL_PROGRAMS, catalog::MACRO] {
        if plan.has(group) {
            add_programs(&mut plan, &mut place, group);
        }
    }
    let progress = Progress::of_steps(plan.steps());
    let mut matrix = Matrix::new(&plan, &place, &progress, &interrupted);
    let measured = matrix.run();
    drop(matrix);
    let mut report = Report::new(&plan, &place, measured?);
    if args.predict {
        let (predictions, notes) = predict::predict(&plan, &place, &report, &progress, &interrupted)?;
        report.predictions = predictions;
        report.notes.extend(notes);
    }
    drop(progress);
    report.comparison = old.map(|old| old.compare(&report));
    let written = write_files(args, &report);
    let text = if args.json { report.json() } else { table::render(&report) };
    let status = if report.is_good() && written { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok((text, status))
}

/// Writes what was asked for and says where; what cannot be written is a line, and the table is printed nevertheless.
/// Returns whether all that was asked for is there.
fn write_files(args: &BenchArgs, report: &Report) -> bool {
    let mut complete = true;
    let mut write = |file: &Path, text: String, what: &str, asked_for: bool| match fs::write(file, text) {
        Ok(()) => tell(&format!("trellis: {what}: {}\n", file.display())),
        Err(error) => {
            tell(&format!("trellis: cannot write the {what} {}: {error}\n", file.display()));
            complete &= !asked_for;
        }
    };
    if let Some(file) = &args.save {
        write(file, report.json(), "result", true);
    }
    if let Some((file, asked_for)) = args.report_file() {
        write(&file, html::page(report), "report", asked_for);
    }
    complete
}

/// Puts the programs of a group into their root, or leaves them out with a line that says why.
fn add_programs(plan: &mut Plan, place: &mut guest::Place, group: &str) {
    let natively = plan.modes.iter().any(|mode| !mode.needs_kernel());
    let is_macro = group == catalog::MACRO;
    let selection = if is_macro { &image::programs::MACRO } else { &image::programs::BENCH };
    let laid = image::programs::ensure(selection, Progress::new)
        .map_err(|error| anyhow::anyhow!(error.cause()))
        .and_then(|programs| root::ProgramRoot::lay(&programs, natively, place.guest.is_some()));
    match laid {
        Ok(root) if is_macro => place.jobs = Some(root),
        Ok(root) => place.programs = Some(root),
        Err(error) => eprintln!("trellis: {}", plan.leave_out(group, &format!("{error:#}"))),
    }
}
