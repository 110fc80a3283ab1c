//! mmdebstrap: found or fetched, run as root or in a user namespace, its talk turned into progress.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::Progress;
use super::super::apt::{self, Apt};
use super::super::error::{ImageError, IoContext as _};

/// What every image has. Without recommended packages; `--include` brings more.
const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "libpam-systemd",
    "dbus",
    "udev",
    "kmod",
    "iproute2",
    "iputils-ping",
    "openssh-server",
    "ca-certificates",
    "procps",
    "less",
    "nano",
];
/// How many packages that is with all that they depend on, about: for the bar.
const ABOUT_PACKAGES: f64 = 150.0;
/// Where ordinary users do not look for programs.
const SYSTEM_PATHS: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// How files get owners that are not us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Root,
    Unshare,
    Fakechroot,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Unshare => "unshare",
            Self::Fakechroot => "fakechroot",
        }
    }
}

/// The programs that building takes.
#[derive(Debug)]
pub(super) struct Tools {
    path: std::ffi::OsString,
    mode: Mode,
}

/// What is to be built.
pub(super) struct Plan<'a> {
    /// mmdebstrap.
    pub tool: &'a Path,
    /// The directory of what the hook takes.
    pub work: &'a Path,
    /// `sources.list` for this host.
    pub lines: &'a Path,
    /// The release.
    pub suite: &'a str,
    /// Lines of `apt.conf`.
    pub proxies: Vec<String>,
    /// More packages.
    pub include: &'a [String],
    /// The last hook, a shell script.
    pub hook: &'a str,
    /// For the hook.
    pub environment: [(&'a str, &'a str); 2],
}

impl Tools {
    /// Looks for everything, before anything is begun.
    pub fn find() -> Result<Self, ImageError> {
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":");
        path.push(SYSTEM_PATHS);
        let has = |program: &str| std::env::split_paths(&path).any(|place| place.join(program).is_file());
        for (program, package) in [("perl", "perl"), ("mke2fs", "e2fsprogs"), ("tar", "tar")] {
            if !has(program) {
                return Err(ImageError::NoTool { program, package });
            }
        }
        let mode = choose_mode(
            rustix::process::geteuid().is_root(),
            has("newuidmap") && has("newgidmap") && has_subordinate_ids(),
            has("fakechroot") && has("fakeroot"),
        );
        Ok(Self { path, mode: mode.ok_or(ImageError::NoRights)? })
    }

    /// mmdebstrap: this host's, or fetched. It is one Perl program that needs no installation.
    pub fn mmdebstrap(&self, apt: &Apt, scratch: &Path, progress: &Progress) -> Result<PathBuf, ImageError> {
        let installed = std::env::split_paths(&self.path).map(|place| place.join("mmdebstrap"));
        if let Some(found) = installed.into_iter().find(|path| path.is_file()) {
            return Ok(found);
        }
        let package = apt.first_of(&["mmdebstrap".to_owned()])?;
        progress.stage(&format!("fetching {} {}", package.name, package.version));
        let file = apt.download(&package, scratch, progress)?;
        let tree = scratch.join("tools");
        apt::unpack(&file, &tree)?;
        let found = tree.join("usr/bin/mmdebstrap");
        if found.is_file() {
            Ok(found)
        } else {
            Err(ImageError::BadPackage { package: package.name, what: "mmdebstrap" })
        }
    }

    /// Builds the system on `disk`.
    pub fn run(&self, plan: &Plan<'_>, disk: &File, progress: &Progress) -> Result<(), ImageError> {
        progress.stage(&format!("building {} (mmdebstrap, mode {})", plan.suite, self.mode.name()));
        let work = OpenWork::new(plan.work)?;
        let mut command = Command::new(plan.tool);
        command.env("PATH", &self.path).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command.envs(plan.environment).env("TRELLIS_WORK", &work.0);
        command
            .args(["--variant=minbase", "--format=null", "--verbose", "--dpkgopt=force-unsafe-io"])
            .arg(format!("--mode={}", self.mode.name()))
            .args(plan.proxies.iter().map(|line| format!("--aptopt={line}")))
            .arg(format!("--include={}", packages(plan.include)))
            .arg(format!("--customize-hook={}", plan.hook))
            .args([plan.suite, "-"])
            .arg(plan.lines);
        command.stdin(disk.try_clone().at("duplicating", plan.work)?);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().at("running", plan.tool)?;
        let stderr = child.stderr.take().expect("stderr is piped");
        let mut talk = Talk::default();
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).at("reading from", plan.tool)? > 0 {
            talk.hear(String::from_utf8_lossy(&line).trim_end(), progress);
            line.clear();
        }
        let status = child.wait().at("waiting for", plan.tool)?;
        if status.success() { Ok(()) } else { Err(talk.error(&status.to_string())) }
    }
}

/// A copy of the working directory that everybody may read; gone at the end.
struct OpenWork(PathBuf, #[expect(dead_code, reason = "removes the directory")] tempfile::TempDir);

impl OpenWork {
    fn new(from: &Path) -> Result<Self, ImageError> {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().at("creating a directory in", &std::env::temp_dir())?;
        let path = directory.path().to_owned();
        let open = |path: &Path, mode: u32| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).at("opening up", path)
        };
        open(&path, 0o755)?;
        for name in ["modules.tar", "sources.list", "apt.conf", "authorized_keys"] {
            let (from, to) = (from.join(name), path.join(name));
            if from.is_file() {
                std::fs::copy(&from, &to).at("copying", &from)?;
                open(&to, 0o644)?;
            }
        }
        Ok(Self(path, directory))
    }
}

/// The best way that there is.
fn choose_mode(is_root: bool, may_map_users: bool, may_fake: bool) -> Option<Mode> {
    match (is_root, may_map_users, may_fake) {
        (true, ..) => Some(Mode::Root),
        (_, true, _) => Some(Mode::Unshare),
        (.., true) => Some(Mode::Fakechroot),
        _ => None,
    }
}

/// Whether this user has ids to give away (subuid(5)), and the kernel lets him.
fn has_subordinate_ids() -> bool {
    let uid = rustix::process::getuid().as_raw().to_string();
    let name = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_default();
    let mine = |file: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let owner = line.split(':').next().unwrap_or_default();
            !owner.is_empty() && (owner == uid || owner == name)
        })
    };
    let closed = |file: &str| std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "0");
    let namespaces = !closed("/proc/sys/kernel/unprivileged_userns_clone")
        && !closed("/proc/sys/user/max_user_namespaces");
    namespaces && mine("/etc/subuid") && mine("/etc/subgid")
}

fn packages(more: &[String]) -> String {
    let all = PACKAGES.iter().copied().chain(more.iter().map(String::as_str));
    all.collect::<Vec<_>>().join(",")
}

/// What mmdebstrap, and apt and dpkg in it, say.
#[derive(Debug, Default)]
struct Talk {
    set_up: u32,
    /// Lines of errors; of those that fail because of others, the first tell most.
    errors: Vec<String>,
    last: String,
}

impl Talk {
    fn hear(&mut self, line: &str, progress: &Progress) {
        if let Some(stage) = line.strip_prefix("I: ") {
            // Paths of temporary directories help nobody.
            let stage = stage.split(['/', ':']).next().unwrap_or(stage).trim_end_matches("...").trim();
            if ["running apt-get", "downloading", "extracting", "installing", "cleaning"]
                .iter()
                .any(|word| stage.starts_with(word))
            {
                progress.stage(stage);
            } else if stage.starts_with("running --customize-hook") {
                progress.stage("setting the system up, and making its file system");
            }
        } else if let Some(package) = line.strip_prefix("Setting up ") {
            self.set_up += 1;
            progress.percent(f64::from(self.set_up) * 100.0 / ABOUT_PACKAGES);
            progress.at(&format!("setting up {}", package.split(' ').next().unwrap_or(package)));
        } else if let Some(fetched) = line.strip_prefix("Get:") {
            progress.at(&format!("fetching {}", fetched.split(' ').nth(4).unwrap_or("package lists")));
        }
        let wrong = ["E: ", "dpkg: error", "mke2fs:", "mkdir:", "tar:"];
        if wrong.iter().any(|word| line.starts_with(word)) || line.contains("No space left on device") {
            self.errors.truncate(64);
            self.errors.push(line.to_owned());
        }
        if !line.trim().is_empty() {
            line.clone_into(&mut self.last);
        }
    }

    fn error(&self, status: &str) -> ImageError {
        if self.errors.iter().any(|line| line.contains("No space left on device")) {
            return ImageError::Full;
        }
        if apt::is_network_trouble(&self.errors) {
            return ImageError::NoNetwork { detail: apt::first_line(&self.errors) };
        }
        let detail = if self.errors.is_empty() { self.last.clone() } else { apt::first_line(&self.errors) };
        ImageError::Tool { program: "mmdebstrap", status: status.to_owned(), detail }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_comes_before_namespaces_and_these_before_pretence() {
        assert_eq!(choose_mode(true, false, false), Some(Mode::Root));
        assert_eq!(choose_mode(false, true, true), Some(Mode::Unshare));
        assert_eq!(choose_mode(false, false, true), Some(Mode::Fakechroot));
        assert_eq!(choose_mode(false, false, false), None);
    }

    fn heard(lines: &[&str]) -> String {
        let mut talk = Talk::default();
        lines.iter().for_each(|line| talk.hear(line, &Progress::hidden()));
        talk.error("exit status: 1").to_string()
    }

    #[test]
    fn failures_are_one_line_that_names_the_cause() {
        let full = heard(&["dpkg: error processing x: No space left on device", "E: setup failed"]);
        assert!(full.contains("full") && full.contains("TMPDIR"), "{full}");
        let net =
            heard(&["E: Failed to fetch http://m/x  Could not resolve 'm'", "E: apt-get update failed"]);
        assert!(net.contains("cannot be reached"), "{net}");
        let other = heard(&["I: x", "E: Unable to locate package nosuch", "E: setup failed"]);
        assert!(other.contains("Unable to locate package nosuch") && !other.contains('\n'), "{other}");
        assert!(heard(&["something odd"]).contains("something odd"));
    }
}
