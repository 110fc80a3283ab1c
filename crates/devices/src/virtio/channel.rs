//! A channel of bytes between a program of the host and one in the guest: the console device (virtio 1.2 section 5.3) with
//! MULTIPORT and one port that is no console (`/dev/vport*p0` in Linux).
//!
//! Queues 0 and 1 carry the port's data, 2 and 3 control messages. What the host sends before the guest's program has opened
//! the port waits here, since Linux throws away what comes before. Locks as in [`super::console`].

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::active::ActiveQueue;
use super::chain::Chain;
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::bus::lock;
use crate::snapshot::RestoreError;

const QUEUE_SIZES: [u16; 4] = [128, 128, 32, 32];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// `VIRTIO_CONSOLE_F_MULTIPORT`.
const F_MULTIPORT: u64 = 1 << 1;
/// What waits for the guest at most, in bytes.
const BACKLOG_BYTES: usize = 256 << 10;
/// Most bytes taken from one transmit chain; a longer one is a driver gone mad and is cut.
const MAX_TRANSMIT: u64 = 1 << 20;
/// Most control messages that wait; a driver asks for a handful.
const MAX_CONTROL: usize = 64;
/// Bytes of `struct virtio_console_control`.
const CONTROL_BYTES: usize = 8;

/// Events of control messages (5.3.6.2).
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

#[derive(Serialize, Deserialize)]
struct State {
    open: bool,
    backlog: Vec<u8>,
    control: Vec<Vec<u8>>,
}

struct Inner {
    queues: [Option<ActiveQueue>; 4],
    port_name: String,
    /// The guest's program has the port open.
    open: bool,
    backlog: VecDeque<u8>,
    control: VecDeque<Vec<u8>>,
    output: Box<dyn Write + Send>,
    chain: Chain,
    received: u64,
    transmitted: u64,
}

/// The device.
pub struct Channel {
    name: String,
    inner: Arc<Mutex<Inner>>,
}

/// The host's end.
#[derive(Clone)]
pub struct ChannelHandle(Arc<Mutex<Inner>>);

impl ChannelHandle {
    /// Sends `data`; says how many bytes were taken. The others have to wait until the guest has read some.
    #[must_use]
    pub fn send(&self, data: &[u8]) -> usize {
        let mut inner = lock(&self.0);
        let taken = data.len().min(BACKLOG_BYTES.saturating_sub(inner.backlog.len()));
        inner.backlog.extend(&data[..taken]);
        inner.feed();
        taken
    }
}

fn control(event: u16, value: u16, more: &[u8]) -> Vec<u8> {
    // Port 0.
    let mut message = vec![0; 4];
    message.extend(event.to_le_bytes());
    message.extend(value.to_le_bytes());
    message.extend(more);
    message
}

impl Inner {
    /// Moves what waits into the guest's buffers.
    fn feed(&mut self) {
        let Self { queues, backlog, chain, received, open, .. } = self;
        if let Some(queue) = queues[RECEIVE].as_mut().filter(|_| *open) {
            *received = received.wrapping_add(queue.fill(chain, backlog));
        }
    }

    fn transmit(&mut self) {
        let Self { queues, output, chain, transmitted, .. } = self;
        let Some(queue) = &mut queues[TRANSMIT] else { return };
        let (_, bytes) = queue.print(chain, MAX_TRANSMIT, output);
        *transmitted = transmitted.wrapping_add(bytes);
    }

    /// Control messages of the driver, and our answers.
    fn converse(&mut self) {
        let Self { queues, chain, control: answers, open, port_name, .. } = self;
        if let Some(queue) = &mut queues[CONTROL_TRANSMIT] {
            let budget = 16 * usize::from(queue.size());
            queue.drain(chain, budget, |memory, chain| {
                let mut message = [0; CONTROL_BYTES];
                if chain.reader(memory).read(&mut message) == Ok(CONTROL_BYTES) {
                    respond(message, answers, open, port_name);
                }
                0
            });
        }
        if let Some(queue) = &mut queues[CONTROL_RECEIVE] {
            while let Some(message) = answers.front() {
                if !queue.pop(chain) {
                    if queue.listen() {
                        continue;
                    }
                    break;
                }
                let memory = Arc::clone(queue.memory());
                let written = chain.writer(&memory).write(message).unwrap_or(0);
                queue.push(chain.head, u32::try_from(written).unwrap_or(0));
                answers.pop_front();
            }
            queue.signal();
        }
        self.feed();
    }
}

/// What a control message of the driver leads to.
fn respond(message: [u8; CONTROL_BYTES], answers: &mut VecDeque<Vec<u8>>, open: &mut bool, port_name: &str) {
    let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
    let (port, event) = (u32::from_le_bytes([p0, p1, p2, p3]), u16::from_le_bytes([e0, e1]));
    let value = u16::from_le_bytes([v0, v1]);
    if answers.len() >= MAX_CONTROL {
        return;
    }
    match event {
        event::DEVICE_READY if value == 1 => answers.push_back(control(event::PORT_ADD, 1, &[])),
        event::PORT_READY if (port, value) == (0, 1) => {
            answers.push_back(control(event::PORT_NAME, 1, port_name.as_bytes()));
            answers.push_back(control(event::PORT_OPEN, 1, &[]));
        }
        event::PORT_OPEN if port == 0 => *open = value == 1,
        _ => {}
    }
}

impl Channel {
    /// A channel whose port is called `port_name` in the guest; what the guest sends goes to `output`.
    #[must_use]
    pub fn new(name: &str, port_name: &str, output: Box<dyn Write + Send>) -> (Self, ChannelHandle) {
        let inner = Arc::new(Mutex::new(Inner {
            queues: [None, None, None, None],
            port_name: port_name.to_owned(),
            open: false,
            backlog: VecDeque::new(),
            control: VecDeque::new(),
            output,
            chain: Chain::default(),
            received: 0,
            transmitted: 0,
        }));
        let handle = ChannelHandle(Arc::clone(&inner));
        (Self { name: name.to_owned(), inner }, handle)
    }
}

impl VirtioDevice for Channel {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, transitional_id: 0x1003, class: 0x07_8000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_console_config`: the number of ports alone says something.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let mut inner = lock(&self.inner);
        let mut queues = activation.queues.into_iter();
        inner.queues = std::array::from_fn(|_| queues.next().flatten());
        inner.converse();
        inner.transmit();
    }

    fn reset(&mut self) {
        let mut inner = lock(&self.inner);
        inner.queues = [None, None, None, None];
        inner.open = false;
        inner.control.clear();
    }

    fn notify(&mut self, queue: u16) {
        let mut inner = lock(&self.inner);
        match usize::from(queue) {
            RECEIVE => inner.feed(),
            TRANSMIT => inner.transmit(),
            CONTROL_RECEIVE | CONTROL_TRANSMIT => inner.converse(),
            _ => {}
        }
    }

    fn save(&self) -> DeviceState {
        let inner = lock(&self.inner);
        let state = State {
            open: inner.open,
            backlog: inner.backlog.iter().copied().collect(),
            control: inner.control.iter().cloned().collect(),
        };
        let queues = inner.queues.iter().map(|q| q.as_ref().map(ActiveQueue::position)).collect();
        DeviceState { queues, data: serde_json::to_value(state).expect("plain data serialises") }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        let longest = state.control.iter().map(Vec::len).max().unwrap_or(0);
        if state.backlog.len() > BACKLOG_BYTES || state.control.len() > MAX_CONTROL || longest > 256 {
            let why = "more waits than can wait".to_owned();
            return Err(RestoreError::Unfit { name: self.name.clone(), why });
        }
        self.reset();
        let mut inner = lock(&self.inner);
        inner.open = state.open;
        inner.backlog = state.backlog.into();
        inner.control = state.control.into();
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let inner = lock(&self.inner);
        vec![("bytes_out", inner.transmitted), ("bytes_in", inner.received)]
    }
}
