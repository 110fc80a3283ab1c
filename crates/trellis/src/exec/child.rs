//! Between agent and command in the guest: the process that becomes the command. It takes on what a process has of its own
//! before it does: session and terminal, limits, groups, user, working directory.

use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::process::{Resource, Rlimit};

use super::protocol::{Limit, Start};

/// The limits that a command takes along. Others speak of the machine, which is another one.
const CARRIED: [Resource; 3] = [Resource::Nofile, Resource::Core, Resource::Stack];

/// The limits of this process, for [`Start`].
pub fn limits() -> Vec<Limit> {
    CARRIED
        .into_iter()
        .map(|resource| {
            let Rlimit { current, maximum } = rustix::process::getrlimit(resource);
            Limit { current, maximum }
        })
        .collect()
}

/// Becomes the command that `file` describes; comes back only with the status of a failure, told as a shell would.
pub fn run(file: &Path) -> ExitCode {
    let start = std::fs::read(file).ok().and_then(|bytes| serde_json::from_slice::<Start>(&bytes).ok());
    let Some(start) = start else {
        return failed(126, &format!("cannot read {}", file.display()));
    };
    let _there = std::fs::remove_file(file);
    if start.terminal.is_some() {
        // Without them the command has a terminal all the same, but no Ctrl-C.
        let _session = rustix::process::setsid();
        let _controlling = rustix::process::ioctl_tiocsctty(std::io::stdin());
    }
    for (resource, limit) in CARRIED.into_iter().zip(&start.limits) {
        // The guest's kernel may allow less.
        let _most =
            rustix::process::setrlimit(resource, Rlimit { current: limit.current, maximum: limit.maximum });
    }
    let directory = Path::new(OsStr::from_bytes(&start.directory));
    if let Err(error) = std::env::set_current_dir(directory) {
        return failed(126, &format!("cannot change to {}: {error}", directory.display()));
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(start.umask & 0o777));
    if let Err(error) = become_user(&start) {
        return failed(126, &format!("cannot become user {}: {error}", start.user));
    }
    let words: Vec<OsString> = start.command.iter().map(|word| OsString::from_vec(word.clone())).collect();
    let Some((program, arguments)) = words.split_first() else { return failed(127, "no command") };
    let variables = start.environment.iter().map(|(k, v)| (OsStr::from_bytes(k), OsStr::from_bytes(v)));
    let error = Command::new(program).args(arguments).env_clear().envs(variables).exec();
    let shown = program.to_string_lossy();
    match error.kind() {
        std::io::ErrorKind::NotFound => failed(127, &format!("{shown}: command not found")),
        _ => failed(126, &format!("cannot run {shown}: {error}")),
    }
}

/// This process has one thread, so that what is set for the thread is set for the command.
fn become_user(start: &Start) -> rustix::io::Result<()> {
    use rustix::fs::{Gid, Uid};
    use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
    let (user, group) = (Uid::from_raw_unchecked(start.user), Gid::from_raw_unchecked(start.group));
    // Its pipes and its terminal are its own, so that it may open them by their names (/dev/stderr).
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [input.as_fd(), output.as_fd(), errors.as_fd()] {
        rustix::fs::fchown(stream, Some(user), Some(group))?;
    }
    let groups: Vec<Gid> = start.groups.iter().map(|&group| Gid::from_raw_unchecked(group)).collect();
    set_thread_groups(&groups)?;
    set_thread_gid(group)?;
    set_thread_uid(user)
}

fn failed(status: u8, text: &str) -> ExitCode {
    crate::terminal::tell(&format!("trellis: {text}\n"));
    ExitCode::from(status)
}
