//! Who executes requests that may take their time (disks, shared directories): a few threads, so that a slow host stops
//! neither a vCPU nor the requests behind; or, for runs that must be reproducible, the notifying vCPU itself.
//!
//! The queues lie under one lock, which is held to take a request and to give it back, not while it is executed. Requests
//! may complete in any order, as 5.2.6 allows for disks: a flush covers what completed before it was made available.
//! - INV-BLK-1: a thread uses guest memory and the host's file only between taking a request and giving it back, and `in_flight`
//!   counts these. So who waits for 0 with the lock held and `paused` set (reset, save, stop) finds every request either
//!   finished, completion and all, or not begun.
//! - INV-BLK-2: a queue is `ready` from the driver's notification until a look at it found nothing and the driver was asked
//!   to notify again, so that no notification is lost.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use guestmem::GuestMemory;

use super::active::ActiveQueue;
use super::chain::Chain;
use super::queue::Position;
use crate::bus::lock;

/// What executes requests; each thread has one.
pub(super) trait Work: Send {
    /// Executes the request in `chain`; says how many bytes of it were written.
    fn execute(&mut self, memory: &GuestMemory, chain: &Chain) -> u32;
}

/// One queue.
#[derive(Default)]
struct Lane {
    queue: Option<ActiveQueue>,
    ready: bool,
}

#[derive(Default)]
struct State {
    lanes: Vec<Lane>,
    /// The lane that is looked at first, so that none starves.
    next: usize,
    in_flight: usize,
    idle: usize,
    paused: bool,
    stop: bool,
}

/// A request taken: where it goes back to, and the memory that it speaks of.
struct Job {
    lane: usize,
    memory: Arc<GuestMemory>,
}

impl State {
    /// Takes the next request of any queue into `chain`.
    fn take(&mut self, chain: &mut Chain) -> Option<Job> {
        let lanes = self.lanes.len();
        for lane in (0..lanes).map(|n| (self.next + n) % lanes) {
            let Lane { queue: Some(queue), ready } = &mut self.lanes[lane] else { continue };
            // Twice at most: a guest that plays with the index from another vCPU must not hold the lock by it.
            for _ in 0..2 {
                if !*ready {
                    break;
                }
                let taken = queue.pop(chain);
                // Asked for at once: while this request is executed, another thread could execute the next.
                *ready = queue.listen();
                if taken {
                    self.next = lane + 1;
                    self.in_flight += 1;
                    return Some(Job { lane, memory: Arc::clone(queue.memory()) });
                }
            }
        }
        None
    }

    fn give_back(&mut self, job: &Job, head: u16, written: u32) {
        self.in_flight -= 1;
        if let Some(Lane { queue: Some(queue), .. }) = self.lanes.get_mut(job.lane) {
            queue.push(head, written);
            // At once: the next request may take its time.
            queue.signal();
        }
    }

    fn is_ready(&self) -> bool {
        !self.paused && self.lanes.iter().any(|lane| lane.ready && lane.queue.is_some())
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is work, or the end.
    work: Condvar,
    /// A request came back.
    rested: Condvar,
}

fn wait<'a>(condition: &Condvar, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// A thread's life.
    fn run(&self, executor: &mut dyn Work) {
        let mut chain = Chain::default();
        let mut state = lock(&self.state);
        while !state.stop {
            let job = if state.paused { None } else { state.take(&mut chain) };
            let Some(job) = job else {
                state = self.idle(state);
                continue;
            };
            if state.idle > 0 && state.is_ready() {
                self.work.notify_one();
            }
            drop(state);
            let written = executor.execute(&job.memory, &chain);
            state = lock(&self.state);
            state.give_back(&job, chain.head, written);
            if state.in_flight == 0 {
                self.rested.notify_all();
            }
        }
    }

    /// Nothing could be taken: sleeps until there may be something.
    fn idle<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if state.in_flight == 0 {
            self.rested.notify_all();
        }
        if state.is_ready() {
            drop(state);
            std::thread::yield_now();
            return lock(&self.state);
        }
        state.idle += 1;
        state = wait(&self.work, state);
        state.idle -= 1;
        state
    }

    /// Serves up to `budget` requests in the calling thread.
    fn serve(&self, state: &mut State, executor: &mut dyn Work, chain: &mut Chain, budget: usize) {
        for _ in 0..budget {
            let Some(job) = state.take(chain) else { return };
            let written = executor.execute(&job.memory, chain);
            state.give_back(&job, chain.head, written);
        }
    }

    /// Waits for the requests in flight, and no more than that (INV-BLK-1).
    fn rest(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        state.paused = true;
        while state.in_flight > 0 {
            state = wait(&self.rested, state);
        }
        state.paused = false;
        state
    }
}

enum Who {
    Threads(Vec<JoinHandle<()>>),
    Notifier(Box<dyn Work>, Chain),
}

/// Executes a device's requests.
pub(super) struct Pool {
    shared: Arc<Shared>,
    who: Who,
}

impl Pool {
    /// A thread for each of `workers`.
    pub fn threads(workers: Vec<Box<dyn Work>>, name: &str) -> io::Result<Self> {
        // Whole before the first thread starts: should a later one fail, dropping this ends the earlier.
        let mut pool = Self { shared: Arc::default(), who: Who::Threads(Vec::with_capacity(workers.len())) };
        if let Who::Threads(threads) = &mut pool.who {
            for (n, mut worker) in workers.into_iter().enumerate() {
                let (shared, thread) = (Arc::clone(&pool.shared), std::thread::Builder::new());
                threads.push(thread.name(format!("{name}/{n}")).spawn(move || shared.run(worker.as_mut()))?);
            }
        }
        Ok(pool)
    }

    /// Requests complete within [`Pool::kick`].
    pub fn synchronous(worker: Box<dyn Work>) -> Self {
        Self { shared: Arc::default(), who: Who::Notifier(worker, Chain::default()) }
    }

    /// Takes over the queues and looks for work in them.
    pub fn start(&mut self, queues: Vec<Option<ActiveQueue>>) {
        let count = queues.len();
        let mut state = self.shared.rest();
        state.lanes = queues.into_iter().map(|queue| Lane { queue, ready: false }).collect();
        state.next = 0;
        drop(state);
        (0..count).for_each(|queue| self.kick(queue));
    }

    /// Lets go of the queues; no request is in flight afterwards.
    pub fn reset(&mut self) {
        self.shared.rest().lanes.clear();
    }

    /// There may be work in a queue.
    pub fn kick(&mut self, queue: usize) {
        let mut state = lock(&self.shared.state);
        if state.stop {
            return;
        }
        let Some(lane) = state.lanes.get_mut(queue).filter(|lane| lane.queue.is_some()) else { return };
        lane.ready = true;
        match &mut self.who {
            Who::Threads(_) => self.shared.work.notify_one(),
            Who::Notifier(worker, chain) => {
                // A guest that keeps adding requests must not keep its vCPU in here for ever.
                let budget = lane.queue.as_ref().map_or(0, |queue| 16 * usize::from(queue.size()));
                self.shared.serve(&mut state, worker.as_mut(), chain, budget);
            }
        }
    }

    /// Waits until all that was notified is done; says how far each queue has come.
    pub fn drain(&self) -> Vec<Option<Position>> {
        let mut state = lock(&self.shared.state);
        if let Who::Threads(_) = &self.who {
            while state.in_flight > 0 || state.is_ready() {
                state = wait(&self.shared.rested, state);
            }
        }
        state.lanes.iter().map(|lane| lane.queue.as_ref().map(ActiveQueue::position)).collect()
    }

    /// Finishes the requests in flight and begins no other. Later kicks do nothing.
    pub fn stop(&mut self) -> io::Result<()> {
        {
            let mut state = self.shared.rest();
            state.stop = true;
            state.lanes.clear();
            self.shared.work.notify_all();
        }
        if let Who::Threads(threads) = &mut self.who {
            for thread in threads.drain(..) {
                thread.join().map_err(|_panic| io::Error::other("a thread of the device panicked"))?;
            }
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a device could not be stopped cleanly");
        }
    }
}
