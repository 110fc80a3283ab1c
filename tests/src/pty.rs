//! A child on a pseudo-terminal of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Starts `program`; the terminal's master side is returned with it. `setsid` makes the terminal its controlling one.
///
/// # Panics
/// When the host gives no pseudo-terminal or the program does not start.
#[must_use]
pub fn spawn(program: &Path, arguments: &[&str]) -> (Child, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("its other side can be opened");
    let name = ptsname(&master, Vec::new()).expect("its other side has a name");
    let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other side");
    let size = Winsize { ws_row: 25, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&slave, size).expect("a terminal has a size");
    let stdio = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("a descriptor can be duplicated"));
    let mut command = Command::new("setsid");
    command.args(["--ctty", "--wait"]).arg(program).args(arguments).env_remove("TRELLIS_LOG");
    command.stdin(stdio(&slave)).stdout(stdio(&slave)).stderr(stdio(&slave));
    (command.spawn().expect("setsid starts"), File::from(master))
}
