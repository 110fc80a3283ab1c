//! A backend for tests, which hold its other end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hostnet::{Backend, Header, Interest, Offloads};

use crate::bus::lock;

/// The test's end of the wire.
pub struct Wire {
    pub offloads: Offloads,
    pub sent: Vec<(Header, Vec<u8>)>,
    pub coming: VecDeque<(Header, Vec<u8>)>,
    pub accepts: Vec<Offloads>,
    pub down: bool,
}

/// A backend that echoes nothing and loses nothing.
pub struct Fake(pub Arc<Mutex<Wire>>);

impl Backend for Fake {
    fn offloads(&self) -> Offloads {
        lock(&self.0).offloads
    }
    fn start(&mut self, accepts: Offloads) {
        lock(&self.0).accepts.push(accepts);
    }
    fn send(&mut self, header: &Header, frame: &[u8]) {
        lock(&self.0).sent.push((*header, frame.to_vec()));
    }
    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        let (header, frame) = lock(&self.0).coming.pop_front()?;
        to.extend(frame);
        Some(header)
    }
    fn sleep_on<'a>(&'a self, _: bool, _: &mut Vec<Interest<'a>>) -> Option<Duration> {
        Some(Duration::from_millis(1))
    }
    fn is_up(&self) -> bool {
        !lock(&self.0).down
    }
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            offloads: Offloads { checksum: true, tso4: true, ..Offloads::default() },
            sent: Vec::new(),
            coming: VecDeque::new(),
            accepts: Vec::new(),
            down: false,
        }
    }
}
