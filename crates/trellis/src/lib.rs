//! The command-line program `trellis`; a library so that its parts can be tested.
//!
//! The way of the data: [`cli`] and [`config`] read what the user wrote → [`options`] gives it one form and its defaults →
//! [`prepare`] opens files and fetches an [`image`] if need be → [`launch`] assembles and runs the machine on the
//! [`terminal`].

pub mod bakeoff;
pub mod bench;
pub mod choice;
pub mod cli;
pub mod config;
pub mod control;
pub mod display;
pub mod dump;
pub mod exec;
pub mod extras;
pub mod gdb;
pub mod host;
pub mod image;
pub mod inside;
pub mod launch;
pub mod metrics;
pub mod model;
pub mod net;
pub mod options;
pub mod prepare;
pub mod progress;
pub mod suggest;
pub mod symbols;
pub mod terminal;
pub mod top;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;

use cli::{Cli, Command, ImageCommand};
use control::{Request, client};
use image::{Cache, ImageError, ImageSpec, Progress, Sources};
use options::VmFlags;
use prepare::PrepareError;

/// Exit status of a wrong command line or file.
const USAGE: u8 = 2;

/// Runs the program with `arguments` (the first is its name) and returns its exit status.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // Before everything else: this is the inside of a guest, where each instruction is dear.
    if let [_, word, rest @ ..] = &arguments[..]
        && word == exec::AGENT
    {
        return exec::agent::run(rest);
    }
    start_logging();
    survive_file_size_limit();
    let code = match Cli::try_parse_from(arguments) {
        Ok(cli) => execute(cli.command).unwrap_or_else(|error| report(&error)),
        Err(error)
            if !error.use_stderr()
                || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            let status = if error.use_stderr() { USAGE } else { 0 };
            match error.print() {
                // Who closes the pipe has read enough.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => report(&error.into()),
                _ => ExitCode::from(status),
            }
        }
        Err(error) => report(&usage(cli::one_line(&error))),
    };
    terminal::restore();
    code
}

/// A mistake of the user's.
fn usage(text: String) -> anyhow::Error {
    PrepareError::Usage(text).into()
}

/// Prints `error` as one line and returns its status.
fn report(error: &anyhow::Error) -> ExitCode {
    terminal::restore();
    // An error that shows its cause already must not show it twice.
    let mut parts: Vec<String> = Vec::new();
    for part in error.chain().map(ToString::to_string) {
        if parts.last().is_none_or(|last| !last.contains(&part)) {
            parts.push(part);
        }
    }
    let text = parts.join(": ");
    let text = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
    terminal::tell(&format!("trellis: error: {text}\n"));
    match error.downcast_ref::<PrepareError>() {
        Some(PrepareError::Usage(_)) => ExitCode::from(USAGE),
        _ => ExitCode::FAILURE,
    }
}

/// Log lines go to standard error, chosen by `TRELLIS_LOG` (as in `TRELLIS_LOG=debug` or `devices=trace`).
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TRELLIS_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // Only a second call in one process (tests) fails.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .log_internal_errors(false)
        .try_init();
}

/// A limit to the size of files (setrlimit(2), RLIMIT_FSIZE) gives errors where it bites, instead of killing us by SIGXFSZ.
/// Guest memory is a file, too.
fn survive_file_size_limit() {
    // Without the handler things are as they would be.
    let _ = signal_hook::flag::register(libc::SIGXFSZ, Arc::default());
}

/// Carries out a command.
fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Boot { image, machine } => boot(machine.into_flags(image)),
        Command::Run { file, machine } => {
            let file = file.map(|file| config::read(&file)).transpose().map_err(usage)?;
            boot(machine.into_flags(None).or(file.unwrap_or_default()))
        }
        Command::Exec { exec } => exec::run(&exec),
        Command::Image { command } => image_command(command),
        Command::List { json } => print_out(client::list(json).as_bytes()),
        Command::Stat { vm, json: true } => tell(client::stats_json(vm.as_deref())),
        Command::Stat { vm, json: false } => ask(vm, Request::Stats),
        Command::Top { top } => top::run(&top),
        Command::Screendump { vm } => ask(vm, Request::Screendump),
        Command::Quit { vm } => ask(vm, Request::Quit),
        Command::Balloon { vm, size } => ask(vm, Request::Balloon { size }),
        Command::Powerdown { vm } => ask(vm, Request::Powerdown),
        Command::Nmi { vm } => ask(vm, Request::Nmi),
        Command::Pause { vm } => ask(vm, Request::Pause),
        Command::Resume { vm } => ask(vm, Request::Resume),
        Command::Type { mut words, serial } => {
            let text = client::unescape(&words.pop().unwrap_or_default()).map_err(usage)?;
            let vm = words.pop();
            ask(vm, Request::Type { text, serial })
        }
        Command::Bench { bench } => {
            let (text, status) = bench::run(&bench)?;
            print_out(text.as_bytes())?;
            Ok(status)
        }
        Command::Bakeoff { bakeoff } => {
            let (text, status) = bakeoff::run(&bakeoff)?;
            print_out(text.as_bytes())?;
            Ok(status)
        }
        Command::Host { json } => print_out(host::run(json).as_bytes()),
        Command::Dump { dump } => print_out(dump::run(&dump)?.as_bytes()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            cli::completions(shell, &mut script);
            print_out(&script)
        }
        Command::Man { output } => {
            let mut page = Vec::new();
            let place = || output.as_deref().map_or("memory".into(), std::path::Path::to_string_lossy);
            cli::man(output.as_deref(), &mut page)
                .with_context(|| format!("cannot write manual pages to {}", place()))?;
            print_out(&page)
        }
    }
}

/// Prepares and runs a machine.
fn boot(flags: VmFlags) -> anyhow::Result<ExitCode> {
    if flags.cpu.as_deref() == Some("help") {
        return print_out(format!("{}\n", x86::cpuid::CpuModel::help().join("\n")).as_bytes());
    }
    launch::launch(prepare::prepare(flags.resolve())?)
}

/// Asks a running machine for something.
fn ask(vm: Option<String>, request: Request) -> anyhow::Result<ExitCode> {
    tell(client::ask(vm.as_deref(), &request))
}

/// Prints what a machine answered.
fn tell(answer: Result<String, String>) -> anyhow::Result<ExitCode> {
    print_out(answer.map_err(anyhow::Error::msg)?.as_bytes())
}

/// `trellis image …`.
fn image_command(command: ImageCommand) -> anyhow::Result<ExitCode> {
    match command {
        ImageCommand::List { json: false } => print_out(image::list::table(&Cache::of_user()?).as_bytes()),
        ImageCommand::List { json: true } => {
            print_out(format!("{:#}\n", image::list::json(&Cache::of_user()?)).as_bytes())
        }
        ImageCommand::Fetch { image, mirror, suite, arch, flavour, disk } => {
            let spec =
                image_spec(&image, arch, flavour.as_deref()).map_err(|error| usage(error.to_string()))?;
            let sources = mirror.map_or(Sources::Host, |url| Sources::Mirror { url, suite });
            let explain = |error| match error {
                ImageError::Unknown(text) => usage(text),
                other => other.into(),
            };
            let wants_disk = disk.rootfs || spec.rootfs;
            let spec = if wants_disk { spec.with_rootfs().map_err(explain)? } else { spec };
            let progress = Progress::new();
            let fetched = if wants_disk {
                image::rootfs::fetch(&spec, &sources, &disk.into_options(), &progress)
            } else {
                image::fetch(&spec, &sources, &progress)
            };
            drop(progress);
            let fetched = fetched.map_err(explain)?;
            let (manifest, directory) = (&fetched.manifest, fetched.directory.display());
            let mut text = format!("{} {} is in {directory}\n", manifest.name, manifest.version());
            if wants_disk {
                text += &image::rootfs::greeting(&fetched, manifest);
            }
            print_out(text.as_bytes())
        }
    }
}

/// The image that `trellis image fetch IMAGE --arch --flavour` means.
fn image_spec(name: &str, arch: Option<image::Arch>, flavour: Option<&str>) -> Result<ImageSpec, ImageError> {
    if name == "debian" {
        return ImageSpec::from_options(arch, flavour);
    }
    let spec = ImageSpec::from_name(name)?;
    if arch.is_some_and(|arch| arch != spec.arch) || flavour.is_some_and(|flavour| flavour != spec.flavour) {
        return Err(ImageError::Unknown(format!(
            "'{name}' already names flavour and architecture; drop --flavour and --arch"
        )));
    }
    Ok(spec)
}

/// Writes to standard output; a reader that has gone away is no error.
fn print_out(bytes: &[u8]) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}
