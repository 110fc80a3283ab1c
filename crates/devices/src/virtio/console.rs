//! The console device (virtio 1.2 section 5.3): port 0 only, without MULTIPORT.
//!
//! Queue 0 receives what the user types, queue 1 transmits what the guest prints. The device is shared between the vCPUs
//! (through the transport) and whoever reads the terminal (through [`ConsoleHandle`]); one mutex, taken after the
//! transport's.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::active::ActiveQueue;
use super::chain::Chain;
use super::interrupt::Interrupt;
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::bus::lock;
use crate::snapshot::RestoreError;

const QUEUE_SIZES: [u16; 2] = [128, 128];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// `VIRTIO_CONSOLE_F_SIZE`: the configuration tells columns and rows.
const F_SIZE: u64 = 1;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: a character can be printed before there are queues.
const F_EMERGENCY_WRITE: u64 = 1 << 2;
/// Offset of `emerg_wr`.
const EMERGENCY_AT: u64 = 8;
/// Input kept while the guest offers no buffers.
const BACKLOG_BYTES: usize = 64 << 10;
/// Most bytes taken from one transmit chain; a longer one is a driver gone mad and is cut.
const MAX_TRANSMIT: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct State {
    columns: u16,
    rows: u16,
    backlog: Vec<u8>,
}

struct Inner {
    queues: [Option<ActiveQueue>; 2],
    interrupt: Option<Arc<Interrupt>>,
    size: (u16, u16),
    backlog: VecDeque<u8>,
    output: Box<dyn Write + Send>,
    chain: Chain,
    received: u64,
    transmitted: u64,
    requests: u64,
}

/// A virtio console.
pub struct Console {
    name: String,
    inner: Arc<Mutex<Inner>>,
}

/// The user's end of a console.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Mutex<Inner>>);

impl ConsoleHandle {
    /// Types `data`. Says how many bytes were taken: all, until the guest leaves tens of kilobytes unread.
    #[must_use]
    pub fn receive(&self, data: &[u8]) -> usize {
        let mut inner = lock(&self.0);
        let taken = data.len().min(BACKLOG_BYTES - inner.backlog.len().min(BACKLOG_BYTES));
        inner.backlog.extend(&data[..taken]);
        inner.feed();
        taken
    }

    /// The terminal has a new size.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut inner = lock(&self.0);
        if inner.size != (columns, rows) {
            inner.size = (columns, rows);
            if let Some(interrupt) = &inner.interrupt {
                interrupt.config_changed();
            }
        }
    }
}

impl Inner {
    /// Moves waiting input into the guest's buffers.
    fn feed(&mut self) {
        let Self { queues, backlog, chain, received, .. } = self;
        let Some(queue) = &mut queues[usize::from(RECEIVE)] else { return };
        *received = received.wrapping_add(queue.fill(chain, backlog));
    }

    fn transmit(&mut self) {
        let Self { queues, output, chain, transmitted, requests, .. } = self;
        let Some(queue) = &mut queues[usize::from(TRANSMIT)] else { return };
        let (chains, bytes) = queue.print(chain, MAX_TRANSMIT, output);
        *requests = requests.wrapping_add(chains);
        *transmitted = transmitted.wrapping_add(bytes);
    }
}

impl Console {
    /// A console named `name` that prints to `output`, on a terminal of `columns` by `rows`; and the user's end of it.
    #[must_use]
    pub fn new(name: &str, output: Box<dyn Write + Send>, columns: u16, rows: u16) -> (Self, ConsoleHandle) {
        let inner = Arc::new(Mutex::new(Inner {
            queues: [None, None],
            interrupt: None,
            size: (columns, rows),
            backlog: VecDeque::new(),
            output,
            chain: Chain::default(),
            received: 0,
            transmitted: 0,
            requests: 0,
        }));
        let handle = ConsoleHandle(Arc::clone(&inner));
        (Self { name: name.to_owned(), inner }, handle)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, transitional_id: 0x1003, class: 0x07_8000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERGENCY_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_console_config`: columns, rows, number of ports, emergency write.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = lock(&self.inner).size;
        let mut structure = [0; 12];
        structure[..2].copy_from_slice(&columns.to_le_bytes());
        structure[2..4].copy_from_slice(&rows.to_le_bytes());
        structure[4] = 1;
        read_config(&structure, offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if let (EMERGENCY_AT, Some(&character)) = (offset, data.first()) {
            let mut inner = lock(&self.inner);
            inner.transmitted = inner.transmitted.wrapping_add(1);
            let _ = inner.output.write_all(&[character]).and_then(|()| inner.output.flush());
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut inner = lock(&self.inner);
        let mut queues = activation.queues.into_iter();
        inner.queues = [queues.next().flatten(), queues.next().flatten()];
        inner.interrupt = Some(activation.interrupt);
        inner.feed();
        inner.transmit();
    }

    fn reset(&mut self) {
        let mut inner = lock(&self.inner);
        inner.queues = [None, None];
        inner.interrupt = None;
    }

    fn notify(&mut self, queue: u16) {
        match queue {
            RECEIVE => lock(&self.inner).feed(),
            TRANSMIT => lock(&self.inner).transmit(),
            _ => {}
        }
    }

    fn save(&self) -> DeviceState {
        let inner = lock(&self.inner);
        let (columns, rows) = inner.size;
        let state = State { columns, rows, backlog: inner.backlog.iter().copied().collect() };
        let queues = inner.queues.iter().map(|q| q.as_ref().map(ActiveQueue::position)).collect();
        DeviceState { queues, data: serde_json::to_value(state).expect("plain data serialises") }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        if state.backlog.len() > BACKLOG_BYTES {
            let why = format!("{} bytes of waiting input", state.backlog.len());
            return Err(RestoreError::Unfit { name: self.name.clone(), why });
        }
        self.reset();
        let mut inner = lock(&self.inner);
        inner.size = (state.columns, state.rows);
        inner.backlog = state.backlog.into();
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let inner = lock(&self.inner);
        vec![("requests", inner.requests), ("bytes_out", inner.transmitted), ("bytes_in", inner.received)]
    }
}
