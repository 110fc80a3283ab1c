//! Programs of the root: where it is, how one of them is run, and what it gave.
//!
//! All paths are relative: the root is the working directory, `/` in a guest and after `chroot`, and somewhere in the
//! host's files where a process may not change its root. There the root's own loader is named on the command line of each
//! program, so that it is the root's libraries that are used everywhere.

use core::ffi::CStr;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{output, sys};

/// What stands before a program where the root is not this process's root.
const LOADER: [&CStr; 3] = [c"lib64/ld-linux-x86-64.so.2", c"--library-path", c"usr/lib/x86_64-linux-gnu"];
/// Words of a command line at most, the loader's three among them.
const MAX_WORDS: usize = 24;
/// What programs read; empty.
const INPUT: &CStr = c"work/empty";
/// What programs print.
pub const OUTPUT: &CStr = c"work/out";

/// prctl(2): the signal that comes when the parent ends.
const PR_SET_PDEATHSIG: usize = 1;
const SIGKILL: usize = 9;

static IN_ROOT: AtomicBool = AtomicBool::new(false);
static BY_LOADER: AtomicBool = AtomicBool::new(false);
/// The status of the first program that failed.
static FAILURE: AtomicU64 = AtomicU64::new(0);

/// Process 1 of a guest is in its root from the beginning.
pub fn be_in_root() {
    IN_ROOT.store(true, Ordering::Relaxed);
}

/// Makes the directory whose name is at `path` the root: as a superuser, else as one of a user namespace of its own, else
/// by the loader.
pub fn enter_root(path: usize) -> bool {
    if sys::call3(sys::SYS_CHDIR, path, 0, 0) != 0 {
        return false;
    }
    let change = || sys::call3(sys::SYS_CHROOT, c".".as_ptr() as usize, 0, 0) == 0;
    let separate = || sys::call3(sys::SYS_UNSHARE, sys::CLONE_NEWUSER, 0, 0) == 0;
    if !change() && !(separate() && change()) {
        BY_LOADER.store(true, Ordering::Relaxed);
        output::line(format_args!(
            "NOTE this host lets no process change its root: native programs are started by their loader"
        ));
    }
    be_in_root();
    true
}

/// Whether the root with the programs is there.
pub fn has_programs() -> bool {
    IN_ROOT.load(Ordering::Relaxed)
        && sys::call3(sys::SYS_ACCESS, c"usr/bin/cc1".as_ptr() as usize, 0, 0) == 0
}

/// Whether what is below `/` is the root's alone.
pub fn is_in_own_root() -> bool {
    IN_ROOT.load(Ordering::Relaxed) && !BY_LOADER.load(Ordering::Relaxed)
}

/// The words that start a program, before its own.
pub fn prefix() -> &'static [&'static CStr] {
    if BY_LOADER.load(Ordering::Relaxed) { &LOADER } else { &[] }
}

/// Runs a program of the root, its output into [`OUTPUT`]: the words `command`, of which the first is its path.
pub fn run(command: &[&CStr]) {
    run_to(command, OUTPUT);
}

/// The same, its output into the file `output`.
pub fn run_to(command: &[&CStr], output: &CStr) {
    let mut argv = [0usize; MAX_WORDS + 1];
    let words = prefix().iter().chain(command).take(MAX_WORDS);
    argv.iter_mut().zip(words).for_each(|(slot, word)| *slot = word.as_ptr() as usize);
    let environment = [c"LC_ALL=C".as_ptr() as usize, c"PATH=bin".as_ptr() as usize, 0];
    let pid = sys::fork();
    if pid == 0 {
        // It is not to outlive a session that is given up.
        sys::call3(sys::SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0);
        redirect(INPUT, 0, sys::O_RDONLY);
        redirect(output, 1, sys::O_WRONLY | sys::O_CREAT | sys::O_TRUNC);
        sys::call3(sys::SYS_EXECVE, argv[0], argv.as_ptr() as usize, environment.as_ptr() as usize);
        sys::exit(127);
    }
    note_status(if pid > 0 { sys::wait(pid) } else { u64::MAX });
}

/// Runs the program whose path is at `path`, with the words at `argv` (the last is 0), in the directory at `directory`.
pub fn run_words(path: usize, argv: &[usize], directory: usize, input: &CStr, output: &CStr) {
    let environment = [
        c"LC_ALL=C".as_ptr() as usize,
        c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".as_ptr() as usize,
        c"HOME=/".as_ptr() as usize,
        c"TERM=dumb".as_ptr() as usize,
        0,
    ];
    let pid = sys::fork();
    if pid == 0 {
        sys::call3(sys::SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0);
        redirect(input, 0, sys::O_RDONLY);
        redirect(output, 1, sys::O_WRONLY | sys::O_CREAT | sys::O_TRUNC);
        if sys::call3(sys::SYS_CHDIR, directory, 0, 0) != 0 {
            sys::exit(125);
        }
        sys::call3(sys::SYS_EXECVE, path, argv.as_ptr() as usize, environment.as_ptr() as usize);
        sys::exit(127);
    }
    note_status(if pid > 0 { sys::wait(pid) } else { u64::MAX });
}

/// Starts a program that is to run beside others, as process 1 of a PID namespace: whatever it starts ends with it, and it with this
/// process. Returns what [`stop`] wants, or a negative number.
pub fn start_apart(command: &[&CStr], output: &CStr) -> isize {
    let mut argv = [0usize; MAX_WORDS + 1];
    argv.iter_mut().zip(command.iter().take(MAX_WORDS)).for_each(|(slot, word)| *slot = word.as_ptr() as usize);
    let environment = [c"LC_ALL=C".as_ptr() as usize, 0];
    let guardian = sys::fork();
    if guardian != 0 {
        return guardian;
    }
    sys::call3(sys::SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0);
    if sys::call3(sys::SYS_UNSHARE, sys::CLONE_NEWPID, 0, 0) != 0 {
        sys::exit(124);
    }
    let pid = sys::fork();
    if pid == 0 {
        sys::call3(sys::SYS_PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0);
        redirect(INPUT, 0, sys::O_RDONLY);
        redirect(output, 1, sys::O_WRONLY | sys::O_CREAT | sys::O_TRUNC);
        sys::call3(sys::SYS_EXECVE, argv[0], argv.as_ptr() as usize, environment.as_ptr() as usize);
        sys::exit(127);
    }
    sys::wait(pid);
    sys::exit(0)
}

/// Ends what [`start_apart`] started.
pub fn stop(guardian: isize) {
    sys::kill(guardian, SIGKILL);
    sys::wait(guardian);
}

/// What a program said shows that it failed, whatever its status.
pub fn fail() {
    note_status(0x100);
}

/// The first failure is the one to tell.
fn note_status(status: u64) {
    if status != 0 {
        let _ = FAILURE.compare_exchange(0, status, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// The wait status of the first program that failed since this was last asked.
pub fn take_failure() -> Option<u64> {
    Some(FAILURE.swap(0, Ordering::Relaxed)).filter(|status| *status != 0)
}

fn redirect(path: &CStr, fd: usize, flags: usize) {
    let file = sys::open(path, flags);
    if file < 0 {
        sys::exit(126);
    }
    sys::call3(sys::SYS_DUP2, file as usize, fd, 0);
    sys::close(file);
}
