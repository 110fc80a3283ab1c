//! `cargo xtask soak`: stress-ng's verifying stressors of the cpu, memory, vm and pipe classes, and those of processes and signals, in a
//! Debian guest for as long as one likes. It fails if a stressor does (its exit status, and operations that its metrics count), if
//! the kernel complains, if the guest's clock leaves the host's, or if the program's memory grows.

mod guest;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::Parser;

use guest::Guest;
use report::{Event, Soak, Verdict};

/// Soaks the guest.
#[derive(Parser)]
#[command(name = "cargo xtask soak", bin_name = "cargo xtask soak", max_term_width = 110)]
pub struct Cli {
    /// How long the stressors run, all together
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: u64,
    /// Engine of the machine
    #[arg(long, default_value = "bt")]
    engine: String,
    /// Processors of the guest, and workers of each stressor
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest
    #[arg(long, default_value = "1G")]
    memory: String,
    /// Only these stressors, by stress-ng's names, with commas
    #[arg(long)]
    only: Option<String>,
    /// The program; by default the release build
    #[arg(long)]
    program: Option<PathBuf>,
}

/// What the guest's clock may differ from the host's: part of the time, and seconds of marks that arrive late.
const CLOCK_PART: f64 = 0.001;
const CLOCK_SECONDS: f64 = 0.5;

/// What the program may have beyond the guest's memory at most, in MiB: 128 of code memory a processor (`engine_bt::Knobs`) with tables of about
/// 0.8 of that when it is full, and the rest.
const fn allowance_mib(cpus: u32) -> u64 {
    240 * cpus as u64 + 100
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The release build, beside this program.
fn beside() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("trellis");
    ensure!(path.is_file(), "{} is not there; build it with cargo build --release", path.display());
    Ok(path)
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    let program = cli.program.as_deref().map_or_else(beside, |path: &Path| Ok(path.to_owned()))?;
    let mut guest = Guest::start(cli, &program)?;
    let mut soak = Soak::default();
    let (mut planned, mut first_memory, mut last_memory) = (0, None, None);
    while let Ok(line) = guest.lines.recv() {
        match soak.take(&line.text, line.when) {
            Event::Plan(count, share) => {
                planned = count;
                println!("{count} stressors of {share} s each on {} processors", cli.cpus);
                first_memory = guest.memory_kib();
            }
            Event::End => {
                last_memory = guest.memory_kib().or(last_memory);
                tell(&soak, planned, last_memory.map(|m| m.0));
            }
            Event::Complaint => println!("kernel: {}", line.text),
            Event::Done => last_memory = guest.memory_kib().or(last_memory),
            Event::Begin(_) | Event::Nothing => {}
        }
    }
    let status = guest.wait()?;
    Ok(summary(cli, &soak, planned, (first_memory, last_memory), status))
}

/// A line for the stressor that ended last.
fn tell(soak: &Soak, planned: usize, memory_kib: Option<u64>) {
    let Some(e) = soak.ended.last() else { return };
    let how = match &e.verdict {
        Verdict::Passed => "ok",
        Verdict::Skipped => "skipped",
        Verdict::Idle => "no operation in its time",
        Verdict::Failed(why) => why,
    };
    println!(
        "[{:3}/{planned}] {:16} {how}, {:.1} s, {} operations, program {} MiB",
        soak.ended.len(),
        e.name,
        e.seconds,
        e.operations.unwrap_or_default(),
        memory_kib.unwrap_or_default() >> 10,
    );
}

type Memory = Option<(u64, u64)>;

fn summary(
    cli: &Cli,
    soak: &Soak,
    planned: usize,
    (first, last): (Memory, Memory),
    status: Option<i32>,
) -> bool {
    let failed = soak.count(|v| matches!(v, Verdict::Failed(_)));
    let idle = soak.count(|v| *v == Verdict::Idle);
    println!(
        "\n{planned} stressors: {} passed, {failed} failed, {} skipped, {idle} without an operation in their time",
        soak.count(|v| *v == Verdict::Passed),
        soak.count(|v| *v == Verdict::Skipped)
    );
    for e in &soak.ended {
        if let Verdict::Failed(why) = &e.verdict {
            println!("  {}: {why}", e.name);
        }
    }
    let mut good = failed == 0 && soak.complaints.is_empty();
    let mut demand = |holds: bool, what: &str| {
        if !holds {
            println!("FAILED: {what}");
        }
        good &= holds;
    };
    println!("kernel complaints: {}", soak.complaints.len());
    demand(idle <= planned / 10, "too many stressors made no progress");
    demand(soak.complete && soak.ended.len() == planned && planned > 0, "the guest did not come to the end");
    demand(status == Some(0), &format!("the program ended with status {status:?}"));
    if let Some((guest, host)) = soak.clocks() {
        println!("guest clock {guest:.2} s, host clock {host:.2} s, difference {:+.3} s", guest - host);
        demand(
            (guest - host).abs() <= host * CLOCK_PART + CLOCK_SECONDS,
            "the guest's clock left the host's",
        );
    }
    if let (Some(first), Some(last)) = (first, last) {
        let (a, b, peak) = (first.0 >> 10, last.0 >> 10, last.1 >> 10);
        println!("program's resident memory: {a} MiB at the start, {b} MiB at the end, {peak} MiB at most");
        let limit = memory_mib(&cli.memory).map(|guest| guest + allowance_mib(cli.cpus));
        demand(limit.is_none_or(|limit| peak <= limit), "the program takes more memory than it may");
    }
    let length = Duration::from_secs_f64(soak.clocks().map_or(0.0, |c| c.1)).as_secs() / 60;
    println!("soak of {length} minutes: {}", if good { "ok" } else { "FAILED" });
    good
}

/// `512M` and `2G` as MiB.
fn memory_mib(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.len().checked_sub(1)?);
    let factor = match unit {
        "M" | "m" => 1,
        "G" | "g" => 1024,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_with_its_unit() {
        assert_eq!(memory_mib("512M"), Some(512));
        assert_eq!(memory_mib("2G"), Some(2048));
        assert_eq!((memory_mib("7"), memory_mib("")), (None, None));
    }
}
