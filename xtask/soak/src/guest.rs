//! The guest: Debian's cloud kernel with stress-ng, started by the release build of the program.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use trellis::image::cpio::Archive;
use trellis::image::programs::{self, BINARIES, LIBRARIES, Programs};
use trellis::image::{self, Progress};

use crate::Cli;

/// What runs in the guest.
const SCRIPT: &str = include_str!("soak.sh");

/// How long a guest may take beyond the time asked for: stressors that end late, boot, and a slow engine.
const GRACE: Duration = Duration::from_secs(900);

/// A line that the machine wrote, and when it arrived.
pub struct Line {
    /// Without its end.
    pub text: String,
    /// Arrival.
    pub when: Instant,
}

/// A machine that runs.
pub struct Guest {
    child: Child,
    /// Its serial console, and the program's own errors.
    pub lines: Receiver<Line>,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Fetches what is missing, lays the initramfs and starts the machine.
    ///
    /// # Errors
    /// Nothing to fetch from, or the program does not start.
    pub fn start(cli: &Cli, program: &Path) -> anyhow::Result<Self> {
        let image = image::ensure_debian(Progress::new)?;
        let stress = programs::ensure(&programs::STRESS, Progress::new)?;
        let directory = tempfile::TempDir::with_prefix("trellis-soak-")?;
        let initrd = directory.path().join("initrd");
        let base = image.initrd.context("the image has no initramfs")?;
        let mut bytes = fs::read(&base).with_context(|| format!("reading {}", base.display()))?;
        // The kernel unpacks one archive after another.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(added(&stress, &script(cli))?);
        fs::write(&initrd, bytes)?;
        let timeout = Duration::from_secs(60 * cli.minutes) + GRACE;
        let mut command = Command::new(program);
        command
            .args(["boot", "--engine", &cli.engine, "--cpus", &cli.cpus.to_string(), "--memory", &cli.memory])
            .args(["--timeout", &timeout.as_secs().to_string(), "--stats"])
            .args(["--append", "console=ttyS0 quiet trellis.run=\"sh /soak.sh\""])
            .arg("--kernel")
            .arg(&image.kernel)
            .arg("--initrd")
            .arg(&initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let stdout = child.stdout.take().context("the output is a pipe")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut bytes = Vec::new();
            while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                if sender.send(Line { text, when: Instant::now() }).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        Ok(Self { child, lines, _directory: directory })
    }

    /// Resident memory of the program in KiB, now and at most.
    pub fn memory_kib(&self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let field = |name: &str| -> Option<u64> {
            text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
        };
        Some((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// The program's exit status, once its output has ended.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&mut self) -> std::io::Result<Option<i32>> {
        self.child.wait().map(|status| status.code())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Gone already, unless the soak was broken off.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn script(cli: &Cli) -> String {
    SCRIPT
        .replace("@MINUTES@", &cli.minutes.to_string())
        .replace("@WORKERS@", &cli.cpus.to_string())
        .replace("@ONLY@", cli.only.as_deref().unwrap_or_default())
}

/// The archive behind the image's own: stress-ng, its libraries, the script.
fn added(stress: &Programs, script: &str) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["usr", BINARIES, "usr/lib", LIBRARIES, "usr/lib64"] {
        archive.directory(directory);
    }
    archive.symlink("lib64", "usr/lib64");
    for (path, content) in stress.read()? {
        archive.file(&path, 0o755, &content);
    }
    archive.file("soak.sh", 0o755, script.as_bytes());
    Ok(archive.finish())
}
