//! A thread of a device that sleeps until somebody rings: its vCPU, or a file descriptor that it waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{read, write};

/// What the thread sleeps on.
#[derive(Debug)]
pub(crate) struct Bell {
    event: OwnedFd,
    stop: AtomicBool,
}

impl Bell {
    /// Whether the thread is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn ring(&self) {
        // It cannot fail for long: only a full counter refuses, and that one wakes, too.
        let _ = write(&self.event, &1u64.to_ne_bytes());
    }

    /// Forgets that it rang: behind a sleep on the descriptor.
    pub fn hush(&self) {
        let _ = read(&self.event, &mut [0; 8]);
    }

    /// Sleeps until the bell rings, one of `list` has what it waits for, or `limit` is over.
    pub fn sleep<'a>(&'a self, list: &mut Vec<PollFd<'a>>, limit: Duration) {
        list.push(PollFd::new(&self.event, PollFlags::IN));
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(1),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        // An error is a signal, or no memory: then the round is done again.
        if poll(list, Some(&limit)).is_err() {
            list.iter_mut().for_each(PollFd::clear_revents);
        }
        list.pop();
        self.hush();
    }
}

/// Ready when the bell has rung: for threads that sleep by other means than [`Bell::sleep`].
impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The thread, and how to wake it.
pub(crate) struct BellThread {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl BellThread {
    /// Starts a thread that lives `life`, which must look at [`Bell::is_stopped`] and sleep by [`Bell::sleep`], or on the bell's descriptor.
    pub fn start(name: &str, life: impl FnOnce(&Bell) + Send + 'static) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(Bell { event, stop: AtomicBool::new(false) });
        let mine = Arc::clone(&bell);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || life(&mine))?;
        Ok(Self { bell, thread: Some(thread) })
    }

    /// There may be work.
    pub fn ring(&self) {
        self.bell.ring();
    }

    /// Ends the thread. Idempotent.
    pub fn stop(&mut self) {
        self.bell.stop.store(true, Ordering::SeqCst);
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of a device panicked");
        }
    }
}
