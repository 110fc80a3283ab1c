//! The thread of a card: carries frames between queues and backend, and sleeps when there are none.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hostnet::{Backend, PollFd, PollFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd, poll};
use rustix::io::{read, write};

use super::Plug;
use super::transfer::{Round, Transfer};
use crate::bus::lock;

/// The longest sleep: what a backend forgot to ask for is looked at then.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Bell {
    event: OwnedFd,
    stop: AtomicBool,
}

/// The thread, and how to wake it.
pub(super) struct Worker {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn start(name: &str, transfer: &Arc<Transfer>, plug: &Plug) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(Bell { event, stop: AtomicBool::new(false) });
        let (mine, transfer, plug) = (Arc::clone(&bell), Arc::clone(transfer), Arc::clone(plug));
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            // For life: a card that takes another's place waits here until that one has let go.
            let mut backend = lock(&plug);
            run(&mine, &transfer, backend.as_mut());
        })?;
        Ok(Self { bell, thread: Some(thread) })
    }

    /// There may be work.
    pub fn wake(&self) {
        // It cannot fail for long: only a full counter refuses, and that one wakes, too.
        let _ = write(&self.bell.event, &1u64.to_ne_bytes());
    }

    /// Ends the thread. Idempotent.
    pub fn stop(&mut self) {
        self.bell.stop.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a network card panicked");
        }
    }
}

/// The thread's life.
fn run(bell: &Bell, transfer: &Transfer, backend: &mut dyn Backend) {
    while !bell.stop.load(Ordering::SeqCst) {
        let sent = transfer.transmit(backend);
        backend.work();
        let received = transfer.receive(backend);
        transfer.note_link(backend.is_up());
        if sent == Round::More || received == Round::More {
            continue;
        }
        sleep(bell, backend, received != Round::NoRoom);
    }
}

fn sleep(bell: &Bell, backend: &dyn Backend, room: bool) {
    let mut list = vec![PollFd::new(&bell.event, PollFlags::IN)];
    let wanted = backend.sleep_on(room, &mut list).unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP);
    let limit = Timespec {
        tv_sec: i64::try_from(wanted.as_secs()).unwrap_or(1),
        tv_nsec: i64::from(wanted.subsec_nanos()),
    };
    // An error is a signal, or no memory: then the round is done again.
    let _ = poll(&mut list, Some(&limit));
    let _ = read(&bell.event, &mut [0; 8]);
}
