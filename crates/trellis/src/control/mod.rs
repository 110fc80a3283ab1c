//! The control socket: how `trellis stat`, `screendump`, `quit` and other programs reach a running machine.
//!
//! Way of the data: [`client`] finds the machine's socket in one of [`directories`] → one line of JSON, a [`Request`] →
//! [`server`], in its own threads inside the machine's process → the machine's `VmHandle` → one line of JSON, an
//! [`Answer`] → [`client`] prints it.
//!
//! The protocol, for other programs: requests are objects with a `command` and its arguments, one a line; each gets one line:
//! `{"ok":true,…}` or `{"ok":false,"error":"…"}`. `{"command":"help"}` lists the commands.
//!
//! `INV-CTL-1`: only the user whose machine it is (and root) gets in: the directory is his own with mode 0700, and the
//! server asks the kernel who is at the other end.

pub mod client;
pub mod server;

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What the name of a socket ends with.
const SUFFIX: &str = ".sock";
/// The longest name of a machine: with the usual directories it fits into a socket's address of 107 bytes.
const MAX_NAME_LEN: usize = 48;
/// The longest path of a socket (`sun_path`, unix(7), less its final zero).
const MAX_PATH_LEN: usize = 107;

/// Where the control socket of a machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ControlTarget {
    /// In the user's own directory, named after the machine.
    #[default]
    Default,
    /// Here.
    Path(PathBuf),
    /// Nowhere.
    None,
}

/// Parses the value of `--control`.
///
/// # Errors
/// One line.
pub fn parse_target(text: &str) -> Result<ControlTarget, String> {
    match text {
        "none" => Ok(ControlTarget::None),
        "" => Err("a control socket needs a path; write --control PATH or --control none".to_owned()),
        path if path.len() > MAX_PATH_LEN => {
            Err(format!("the path of a socket has at most {MAX_PATH_LEN} bytes; give a shorter one"))
        }
        path => Ok(ControlTarget::Path(PathBuf::from(path))),
    }
}

/// Parses the value of `--name`.
///
/// # Errors
/// One line with the rule.
pub fn parse_name(text: &str) -> Result<String, String> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && text.len() <= MAX_NAME_LEN && text.chars().all(is_good) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "'{}' is no name for a machine; use a letter or digit, then letters, digits and ._- up to {MAX_NAME_LEN}",
        text.escape_debug()
    ))
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// The names of the commands.
    Help,
    /// What this machine is.
    Info,
    /// The VGA text screen.
    Screendump,
    /// Counts so far.
    Stats,
    /// Ends the run.
    Quit,
    /// Presses the power button.
    Powerdown,
    /// Sets the size of the balloon, in bytes, if one is given; says what is known of it.
    Balloon {
        /// The size.
        #[serde(default)]
        size: Option<u64>,
    },
    /// A non-maskable interrupt for every CPU.
    Nmi,
    /// Types text.
    Type {
        /// The text.
        text: String,
        /// On the serial line instead of the keyboard.
        #[serde(default)]
        serial: bool,
    },
    /// Stops the machine and its clock.
    Pause,
    /// Lets it go on.
    Resume,
}

/// The commands of [`Request`].
const COMMANDS: &[&str] = &[
    "help",
    "info",
    "screendump",
    "stats",
    "quit",
    "powerdown",
    "balloon",
    "nmi",
    "type",
    "pause",
    "resume",
];

/// What this machine is, for `trellis list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// What it booted.
    pub guest: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Which engine runs it.
    #[serde(default)]
    pub engine: String,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Seconds since its start.
    #[serde(default)]
    pub seconds: u64,
    /// Whether it stands still by `pause`.
    #[serde(default)]
    pub paused: bool,
}

/// One line back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Text for people: a screen, a table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Statistics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<serde_json::Value>,
    /// What this machine is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub info: Option<Info>,
    /// How many characters were taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typed: Option<usize>,
    /// What is known of the balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<vmm::BalloonReport>,
    /// The names of the commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commands: Option<Vec<String>>,
}

impl Answer {
    fn done() -> Self {
        Self { ok: true, ..Self::default() }
    }

    fn failed(error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }
}

/// Where control sockets are: the first that can be used is used, and all are looked into.
/// `$XDG_RUNTIME_DIR/trellis` (XDG Base Directory: only an absolute path counts), then `/tmp/trellis-UID`. Where
/// `$TRELLIS_RUNTIME_DIR` is set, its folder `trellis` is the only one: for tests and tools that want machines of their own.
fn directories() -> Vec<PathBuf> {
    if let Some(only) = std::env::var_os("TRELLIS_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        return vec![PathBuf::from(only).join("trellis")];
    }
    directories_for(std::env::var_os("XDG_RUNTIME_DIR"))
}

fn directories_for(runtime: Option<OsString>) -> Vec<PathBuf> {
    let runtime = runtime.map(PathBuf::from).filter(|path| path.is_absolute());
    let user = rustix::process::geteuid().as_raw();
    let common = PathBuf::from(format!("/tmp/trellis-{user}"));
    runtime.map(|path| path.join("trellis")).into_iter().chain([common]).collect()
}

/// Makes `directory` if it is not there, and opens it if it is ours alone (`INV-CTL-1`): a stranger may have made it.
fn own_directory(directory: &Path) -> io::Result<File> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = File::from(rustix::fs::open(directory, flags, Mode::empty())?);
    let metadata = opened.metadata()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        opened.set_permissions(std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(opened)
}

/// The sockets of `directory` with the names of their machines, by name.
fn sockets(directory: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let socket = |entry: io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        let name = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.to_owned();
        Some((name, path))
    };
    let mut found: Vec<_> = entries.filter_map(socket).collect();
    found.sort();
    found
}

/// Whether nobody listens at this socket any more.
fn is_stale(path: &Path) -> bool {
    matches!(UnixStream::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_files() {
        for good in ["a", "vm-12", "web.1_b"] {
            assert_eq!(parse_name(good).as_deref(), Ok(good));
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "é", "a\n", &"x".repeat(49)] {
            let error = parse_name(bad).unwrap_err();
            assert!(!error.contains('\n') && error.contains("letter"), "{error}");
        }
    }

    #[test]
    fn targets_are_none_or_a_short_path() {
        assert_eq!(parse_target("none"), Ok(ControlTarget::None));
        assert_eq!(parse_target("a"), Ok(ControlTarget::Path("a".into())));
        assert!(parse_target("").is_err() && parse_target(&"x".repeat(108)).is_err());
    }

    #[test]
    fn requests_read_as_documented() {
        let read = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(read(r#"{"command":"screendump"}"#).unwrap(), Request::Screendump);
        let typed = Request::Type { text: "ls\n".to_owned(), serial: false };
        assert_eq!(read(r#"{"command":"type","text":"ls\n"}"#).unwrap(), typed);
        for command in COMMANDS.iter().filter(|command| **command != "type") {
            read(&format!(r#"{{"command":"{command}"}}"#)).unwrap();
        }
        read(r#"{"command":"reboot"}"#).unwrap_err();
    }

    #[test]
    fn runtime_directory_counts_only_when_absolute() {
        assert_eq!(directories_for(Some("/run/user/7".into()))[0], Path::new("/run/user/7/trellis"));
        assert_eq!(directories_for(Some("relative".into())).len(), 1);
        assert_eq!(directories_for(None).len(), 1);
    }

    #[test]
    fn directory_becomes_private_and_a_link_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let (directory, link) = (home.path().join("d"), home.path().join("l"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).unwrap();
        own_directory(&directory).unwrap();
        assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        own_directory(&link).unwrap_err();
    }
}
