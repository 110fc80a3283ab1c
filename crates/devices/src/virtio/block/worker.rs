//! Who executes a disk's requests: a thread of its own, so that a slow disk never stops a vCPU, or, for runs that must be
//! reproducible, the notifying vCPU itself.
//!
//! The thread owns the queue while it works and gives it back when it rests:
//! - INV-BLK-1: while `busy` is false nobody but the holder of the lock touches the queue, guest memory or the image. So who
//!   waits for it (reset, save, shutdown) finds every request either finished, completion and all, or not begun.
//! - INV-BLK-2: `kicked` is set after the driver's notification and cleared before the queue is looked at, so that no
//!   notification is lost.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::request::{Counters, Executor};
use crate::bus::lock;
use crate::virtio::active::ActiveQueue;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Position;

#[derive(Default)]
struct State {
    queue: Option<ActiveQueue>,
    busy: bool,
    kicked: bool,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Asks the thread to rest before the next request.
    pause: AtomicBool,
    /// Every write is to be durable before it completes.
    write_through: AtomicBool,
    counters: Arc<Counters>,
}

/// Serves requests until there are none, a pause is asked for, or `budget` are done.
fn serve(
    shared: &Shared,
    queue: &mut ActiveQueue,
    executor: &mut Executor,
    chain: &mut Chain,
    budget: usize,
) {
    let mut left = budget;
    loop {
        queue.suppress();
        while left > 0 && !shared.pause.load(Ordering::SeqCst) && queue.pop(chain) {
            left -= 1;
            let durable = shared.write_through.load(Ordering::SeqCst);
            let memory = Arc::clone(queue.memory());
            let written = executor.execute(&memory, chain, durable, &shared.counters);
            queue.push(chain.head, written);
            // At once: the next request may take its time.
            queue.signal();
        }
        if !queue.listen() || left == 0 || shared.pause.load(Ordering::SeqCst) {
            return;
        }
    }
}

impl Shared {
    fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's life.
    fn run(&self, executor: &mut Executor) {
        let mut chain = Chain::default();
        let mut state = lock(&self.state);
        loop {
            if state.stop {
                return;
            }
            if !state.kicked || state.queue.is_none() {
                state = self.wait(state);
                continue;
            }
            let Some(mut queue) = state.queue.take() else { continue };
            state.kicked = false;
            state.busy = true;
            drop(state);
            serve(self, &mut queue, executor, &mut chain, usize::MAX);
            state = lock(&self.state);
            state.queue = Some(queue);
            state.busy = false;
            self.changed.notify_all();
        }
    }

    /// Waits for the request in flight, and no more than that.
    fn rest(&self) -> MutexGuard<'_, State> {
        self.pause.store(true, Ordering::SeqCst);
        let mut state = lock(&self.state);
        while state.busy {
            state = self.wait(state);
        }
        self.pause.store(false, Ordering::SeqCst);
        state
    }
}

enum Who {
    Thread(Option<JoinHandle<Executor>>),
    Notifier(Box<(Executor, Chain)>),
}

/// Executes a disk's requests, one after the other.
pub(super) struct Worker {
    shared: Arc<Shared>,
    who: Who,
}

impl Worker {
    /// `synchronous`: requests complete within [`Worker::kick`].
    pub fn new(executor: Executor, synchronous: bool, name: &str) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            pause: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
            counters: Arc::default(),
        });
        let who = if synchronous {
            Who::Notifier(Box::new((executor, Chain::default())))
        } else {
            let theirs = Arc::clone(&shared);
            let mut executor = executor;
            let body = move || {
                theirs.run(&mut executor);
                executor
            };
            Who::Thread(Some(std::thread::Builder::new().name(name.to_owned()).spawn(body)?))
        };
        Ok(Self { shared, who })
    }

    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    pub fn set_write_through(&self, on: bool) {
        self.shared.write_through.store(on, Ordering::SeqCst);
    }

    /// Takes over a queue and looks for work in it.
    pub fn start(&mut self, queue: Option<ActiveQueue>) {
        self.shared.rest().queue = queue;
        self.kick();
    }

    /// Lets go of the queue; no request is in flight afterwards.
    pub fn reset(&mut self) {
        let mut state = self.shared.rest();
        state.queue = None;
        state.kicked = false;
    }

    /// There may be work.
    pub fn kick(&mut self) {
        let mut state = lock(&self.shared.state);
        if state.stop {
            return;
        }
        match &mut self.who {
            Who::Thread(_) => {
                state.kicked = true;
                self.shared.changed.notify_all();
            }
            Who::Notifier(tools) => {
                let (executor, chain) = &mut **tools;
                if let Some(queue) = &mut state.queue {
                    // A guest that keeps adding requests must not keep its vCPU in here for ever.
                    let budget = 16 * usize::from(queue.size());
                    serve(&self.shared, queue, executor, chain, budget);
                }
            }
        }
    }

    /// Waits until all that was notified is done; says how far the queue has come.
    pub fn drain(&self) -> Option<Position> {
        let mut state = lock(&self.shared.state);
        if let Who::Thread(Some(_)) = &self.who {
            while state.busy || (state.kicked && state.queue.is_some()) {
                state = self.shared.wait(state);
            }
        }
        state.queue.as_ref().map(ActiveQueue::position)
    }

    /// Finishes the request in flight, begins no other, and makes everything durable. Later kicks do nothing.
    pub fn stop(&mut self) -> io::Result<()> {
        {
            let mut state = self.shared.rest();
            state.stop = true;
            state.queue = None;
            self.shared.changed.notify_all();
        }
        match &mut self.who {
            Who::Thread(thread) => match thread.take().map(JoinHandle::join) {
                Some(Ok(executor)) => executor.image().sync(),
                Some(Err(_)) => Err(io::Error::other("the disk's thread panicked")),
                None => Ok(()),
            },
            Who::Notifier(tools) => tools.0.image().sync(),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a disk could not be closed cleanly");
        }
    }
}
