//! `cargo xtask net`: iperf3 between a Debian guest and this host, and between two guests, for each card and network and with
//! each of the cards' switches; where QEMU is installed, its TCG in turn with the same kernel, files and card. A table in
//! Markdown: throughput as the receiver counts it, and what each packet cost in touches of the device and in interrupts.

mod guest;
mod measure;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::ensure;
use clap::Parser;

use guest::{Bench, Monitor};
use measure::{Case, Load, Outcome, Plug};

/// Measures networks.
#[derive(Parser)]
#[command(name = "cargo xtask net", bin_name = "cargo xtask net", max_term_width = 110)]
pub struct Cli {
    /// How long each measurement lasts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Engine of the machine
    #[arg(long, default_value = "bt")]
    engine: String,
    /// Only cases whose name contains this, as in 'e1000' or 'tcp up'
    #[arg(long)]
    only: Option<String>,
    /// An interface made for this (ip tuntap add NAME mode tap; an address on it); without one TAP is left out
    #[arg(long, value_name = "NAME,ADDRESS")]
    tap: Option<String>,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
    /// The program; by default the release build
    #[arg(long)]
    program: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("net: error: {error:#}");
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

/// What is measured: cards on every network, then virtio with each switch on the user network.
fn cases(tap: Option<&str>) -> anyhow::Result<Vec<Case>> {
    let tap = tap.map(Plug::parse_tap).transpose()?;
    let mut cases = Vec::new();
    let case = |model, switches, load, plug: &Plug| Case { model, switches, load, plug: plug.clone() };
    for model in ["virtio", "e1000"] {
        for load in Load::ALL {
            cases.push(case(model, "", load, &Plug::User));
        }
        cases.push(case(model, "", Load::TcpUp, &Plug::Link));
        for load in [Load::TcpUp, Load::TcpDown] {
            cases.extend(tap.iter().map(|plug| case(model, "", load, plug)));
        }
    }
    for switches in ["combine=off", "suppress=off", "offload=off", "doorbell=vcpu"] {
        for load in Load::ALL {
            cases.push(case("virtio", switches, load, &Plug::User));
        }
    }
    for switches in ["suppress=off", "offload=off", "doorbell=vcpu"] {
        for load in Load::ALL {
            cases.push(case("e1000", switches, load, &Plug::User));
        }
    }
    Ok(cases)
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    let program = cli.program.as_deref().map_or_else(beside, |path: &Path| Ok(path.to_owned()))?;
    let bench = Bench::prepare(cli, program)?;
    let qemu = !cli.no_qemu && bench.has_qemu();
    println!(
        "| card | iperf3 | Mbit/s | packets out, in | touches per packet | interrupts per packet | QEMU TCG, Mbit/s | times |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut good = true;
    for case in cases(cli.tap.as_deref())? {
        if cli.only.as_ref().is_some_and(|only| !case.to_string().contains(only.as_str())) {
            continue;
        }
        let ours = bench.measure(&case, Monitor::Trellis)?;
        // Switches are ours alone.
        let other =
            if qemu && case.switches.is_empty() { Some(bench.measure(&case, Monitor::Qemu)?) } else { None };
        good &= ours.mbits.is_some();
        println!("{}", row(&case, &ours, other.as_ref()));
    }
    Ok(good)
}

fn row(case: &Case, ours: &Outcome, other: Option<&Outcome>) -> String {
    let mbits = |outcome: &Outcome| outcome.mbits.map_or("failed".to_owned(), |mbits| format!("{mbits:.0}"));
    let per_packet = |count: u64| match ours.packets() {
        0 => "-".to_owned(),
        #[expect(clippy::cast_precision_loss, reason = "counts of seconds")]
        packets => format!("{:.2}", count as f64 / packets as f64),
    };
    let (theirs, times) = match other {
        None => ("-".to_owned(), "-".to_owned()),
        Some(other) => {
            let times = ours.mbits.zip(other.mbits).map_or("-".to_owned(), |(a, b)| format!("{:.1}", a / b));
            (mbits(other), times)
        }
    };
    format!(
        "| {} | {} | {} | {}, {} | {} | {} | {theirs} | {times} |",
        case.card(),
        case.what(),
        mbits(ours),
        ours.packets_out,
        ours.packets_in,
        per_packet(ours.touches),
        per_packet(ours.interrupts),
    )
}
