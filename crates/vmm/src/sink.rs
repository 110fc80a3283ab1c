//! An output that outlives the machine: devices of successive machines (after a reset or a restore) write to the same one.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use devices::bus::lock;

use crate::config::Sink;

/// A shared output.
#[derive(Clone)]
pub(crate) struct SharedSink(Arc<Mutex<Sink>>);

impl SharedSink {
    /// Shares `sink`.
    pub fn new(sink: Sink) -> Self {
        Self(Arc::new(Mutex::new(sink)))
    }

    /// Another end of it, for a device.
    pub fn boxed(&self) -> Sink {
        Box::new(self.clone())
    }
}

impl Write for SharedSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).flush()
    }
}
