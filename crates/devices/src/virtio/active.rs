//! A queue in use: the ring, the memory it lies in, and the interrupt that belongs to it.

use std::collections::VecDeque;
use std::sync::Arc;

use guestmem::GuestMemory;

use super::chain::Chain;
use super::interrupt::Interrupt;
use super::queue::{Position, Queue, QueueError};

/// A running queue as a device holds it. A driver's mistake breaks it: it looks empty from then on, and the driver is told
/// to reset the device.
pub struct ActiveQueue {
    queue: Queue,
    index: u16,
    memory: Arc<GuestMemory>,
    interrupt: Arc<Interrupt>,
    broken: bool,
}

impl ActiveQueue {
    pub(super) const fn new(
        queue: Queue,
        index: u16,
        memory: Arc<GuestMemory>,
        interrupt: Arc<Interrupt>,
    ) -> Self {
        Self { queue, index, memory, interrupt, broken: false }
    }

    /// The memory that its chains speak of.
    #[must_use]
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How far it has come.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.queue.position()
    }

    /// Number of descriptors.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.queue.size()
    }

    fn check<T: Default>(&mut self, result: Result<T, QueueError>) -> T {
        result.unwrap_or_else(|error| {
            if !self.broken {
                tracing::debug!(queue = self.index, %error, "virtqueue broken by its driver");
                self.broken = true;
                self.interrupt.needs_reset();
            }
            T::default()
        })
    }

    /// Takes the next chain; false when there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.broken {
            return false;
        }
        let popped = self.queue.pop(&self.memory, chain);
        self.check(popped)
    }

    /// Gives a chain back, with the bytes written into it. Call [`ActiveQueue::signal`] after the last of a batch.
    pub fn push(&mut self, head: u16, written: u32) {
        if !self.broken {
            let pushed = self.queue.push(&self.memory, head, written);
            self.check(pushed);
        }
    }

    /// Undoes the last `count` [`ActiveQueue::pop`]s: their chains are the driver's again, as if they had not been looked at.
    pub fn rewind(&mut self, count: u16) {
        self.queue.rewind(count);
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    pub fn push_all(&mut self, chains: impl Iterator<Item = (u16, u32)>) {
        if !self.broken {
            let pushed = self.queue.push_all(&self.memory, chains);
            self.check(pushed);
        }
    }

    /// Interrupts the driver if it wants to know of what was pushed.
    pub fn signal(&mut self) {
        if self.broken {
            return;
        }
        let wanted = self.queue.should_signal(&self.memory);
        if self.check(wanted) {
            self.interrupt.queue_used(self.index);
        }
    }

    /// Interrupts the driver for what was pushed, whether or not it wants that.
    pub fn signal_regardless(&mut self) {
        if !self.broken {
            // What is asked next time is about what was pushed from here on.
            let asked = self.queue.should_signal(&self.memory);
            self.check(asked);
            self.interrupt.queue_used(self.index);
        }
    }

    /// Tells the driver not to notify for now.
    pub fn suppress(&mut self) {
        if !self.broken {
            let done = self.queue.suppress_notifications(&self.memory);
            self.check(done);
        }
    }

    /// Asks for a notification; true when there is work already.
    pub fn listen(&mut self) -> bool {
        self.listen_beyond(0)
    }

    /// The same for chains beyond the next `seen`, which do not suffice.
    pub fn listen_beyond(&mut self, seen: u16) -> bool {
        if self.broken {
            return false;
        }
        let more = self.queue.want_notifications_beyond(&self.memory, seen);
        self.check(more)
    }

    /// Moves bytes that wait into the driver's buffers, as far as there are any, and signals; says how many went.
    pub fn fill(&mut self, chain: &mut Chain, waiting: &mut VecDeque<u8>) -> u64 {
        let mut moved = 0;
        // Bounded, for a guest that keeps adding buffers of no length must not keep us in here.
        for _ in 0..16 * usize::from(self.size()) {
            if waiting.is_empty() {
                break;
            }
            if !self.pop(chain) {
                // Nothing more to give into: hear of new buffers, unless one has just come.
                if self.listen() {
                    continue;
                }
                break;
            }
            let mut to = chain.writer(&self.memory);
            let room = usize::try_from(to.remaining()).unwrap_or(usize::MAX).min(waiting.len());
            let written = to.write(&waiting.make_contiguous()[..room]).unwrap_or(0);
            waiting.drain(..written);
            moved += written as u64;
            self.push(chain.head, u32::try_from(written).unwrap_or(0));
        }
        self.signal();
        moved
    }

    /// Writes what chains hold to `output`, at most `most` bytes of each; says how many chains and bytes there were. A reader
    /// who has gone away is the user's business; the guest goes on.
    pub fn print(&mut self, chain: &mut Chain, most: u64, output: &mut dyn std::io::Write) -> (u64, u64) {
        let (mut chains, mut bytes) = (0, 0);
        let budget = 16 * usize::from(self.size());
        self.drain(chain, budget, |memory, chain| {
            let mut from = chain.reader(memory).limited(most);
            let mut block = [0; 4096];
            while let Ok(now @ 1..) = from.read(&mut block) {
                let _ = output.write_all(&block[..now]);
                bytes += now as u64;
            }
            chains += 1;
            0
        });
        let _ = output.flush();
        (chains, bytes)
    }

    /// Serves chains with `serve`, which says how many bytes it wrote, until there are none or `budget` are done: a guest
    /// that keeps adding chains must not keep a vCPU in here for ever. Signals once per round.
    pub fn drain(
        &mut self,
        chain: &mut Chain,
        budget: usize,
        mut serve: impl FnMut(&GuestMemory, &Chain) -> u32,
    ) {
        let mut left = budget;
        loop {
            self.suppress();
            while left > 0 && self.pop(chain) {
                left -= 1;
                let written = serve(&self.memory, chain);
                self.push(chain.head, written);
            }
            self.signal();
            if !self.listen() || left == 0 {
                return;
            }
        }
    }
}
