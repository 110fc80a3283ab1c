//! `cargo xtask crash`: kill -9 at any moment loses nothing that the guest had flushed.
//!
//! A victim process writes numbered blocks through the virtio disk that a machine has (real queues, the same threads and
//! images), flushes, and says so on its standard output. It is killed at a random moment. Then every block must be what the
//! last flush left, or, where a later write was under way, that. The next victim goes on with the same image, so that damage
//! that shows only later shows, too.

mod driver;
mod model;
mod victim;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use devices::virtio::block::{Image, ImageFormat, ImageOptions};
use devices::virtio::rng::SplitMix64;

use model::{Blocks, Round};

/// Kills disks.
#[derive(Parser)]
#[command(name = "cargo xtask crash", bin_name = "cargo xtask crash", max_term_width = 110)]
struct Cli {
    /// How often, for each format
    #[arg(long, default_value_t = 1000)]
    kills: u32,
    /// raw, qcow2, or both
    #[arg(long, default_value = "both")]
    format: String,
    /// Where moments and blocks come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the images are made; by default the temporary directory
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Be the victim: image, format, seed, round
    #[arg(long, num_args = 4, hide = true)]
    victim: Option<Vec<String>>,
}

/// After so many kills the image is made anew: the first writes to an image make tables that later ones find there.
const FRESH_EVERY: u32 = 25;

/// The longest that a victim lives, in microseconds.
const LONGEST_US: u64 = 40_000;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.victim {
        Some(words) => victim::run(words),
        None => run(&cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crash: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The format that a name stands for.
fn format(name: &str) -> anyhow::Result<ImageFormat> {
    match name {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => bail!("there is no format '{name}'; raw, qcow2 and both there are"),
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let names: &[&str] = match &cli.format[..] {
        "both" => &["raw", "qcow2"],
        one => &[one],
    };
    let directory = match &cli.directory {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };
    for name in names {
        let format = format(name)?;
        let path = directory.path().join(format!("disk.{name}"));
        let tally = kill_often(cli, &path, format).with_context(|| {
            format!("{name}, seed {}; the moments of the kills are not repeatable", cli.seed)
        })?;
        println!(
            "{name}: {} kills, {} of them in mid-write; {} flushes reported, {} blocks compared; nothing flushed was lost{}",
            cli.kills,
            tally.in_mid_write,
            tally.flushes,
            tally.compared,
            check_by_qemu(&path, format)?
        );
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    flushes: u64,
    compared: u64,
    in_mid_write: u64,
}

fn kill_often(cli: &Cli, path: &Path, format: ImageFormat) -> anyhow::Result<Tally> {
    let mut rng = SplitMix64::new(cli.seed);
    let (mut blocks, mut tally) = (Blocks::default(), Tally::default());
    for number in 0..cli.kills {
        if number % FRESH_EVERY == 0 {
            model::make_image(path, format)?;
            blocks = Blocks::default();
        }
        let round = Round { seed: cli.seed, number };
        let reported = kill_one(path, format, round, Duration::from_micros(rng.next() % LONGEST_US))?;
        let image =
            Image::open(&ImageOptions { read_only: true, format: Some(format), ..ImageOptions::new(path) })?;
        let news = blocks.judge(&image, round, reported).with_context(|| format!("after kill {number}"))?;
        tally.flushes += u64::from(reported);
        tally.compared += model::SLOTS;
        tally.in_mid_write += u64::from(news);
    }
    ensure!(tally.flushes > 0 || cli.kills == 0, "no victim lived long enough to flush; this shows nothing");
    Ok(tally)
}

/// Lets a victim live for `life`; says how many flushes it reported.
fn kill_one(path: &Path, format: ImageFormat, round: Round, life: Duration) -> anyhow::Result<u32> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--victim").arg(path).arg(format.name());
    command.args([round.seed.to_string(), round.number.to_string()]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    std::thread::sleep(life);
    // SIGKILL: nothing of the process runs any more.
    let early = child.try_wait()?;
    child.kill()?;
    let mut said = String::new();
    child.stdout.take().context("its output is a pipe")?.read_to_string(&mut said)?;
    child.wait()?;
    ensure!(early.is_none(), "the victim ended by itself");
    // A last line without its end was not said.
    Ok(u32::try_from(said.matches('\n').count())?)
}

/// What `qemu-img check` says, where there is one: leaked clusters may be, errors may not.
fn check_by_qemu(path: &Path, format: ImageFormat) -> anyhow::Result<&'static str> {
    if format != ImageFormat::Qcow2 {
        return Ok("");
    }
    let program = std::env::var_os("QEMU_IMG").unwrap_or_else(|| "qemu-img".into());
    match Command::new(program).args(["check", "-q"]).arg(path).output() {
        // qemu-img(1): 0 sound, 2 corrupt, 3 leaked clusters only.
        Ok(output) if matches!(output.status.code(), Some(0 | 3)) => Ok("; qemu-img finds the image sound"),
        Ok(output) => bail!("qemu-img check: {}", String::from_utf8_lossy(&output.stdout)),
        Err(_absent) => Ok("; no qemu-img here to look at the image"),
    }
}
