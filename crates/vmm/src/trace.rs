//! The event trace: a line per port access, device-memory access, interrupt and APIC register access.
//!
//! `<guest time in ns> cpu<n> <event> …`, numbers in hexadecimal. Off, it costs one test per event.

use std::io::{BufWriter, Write};
use std::sync::Mutex;

use devices::bus::lock;
use devices::clock::Clock;

use crate::config::Sink;

/// Where the lines go.
pub(crate) struct Tracer(Mutex<BufWriter<Sink>>);

impl Tracer {
    /// A trace into `sink`.
    pub fn new(sink: Sink) -> Self {
        Self(Mutex::new(BufWriter::with_capacity(1 << 16, sink)))
    }

    /// Writes a line. A sink that fails loses it: the guest goes on.
    pub fn line(&self, clock: &dyn Clock, vcpu: usize, event: std::fmt::Arguments<'_>) {
        let now = clock.now().0;
        let _lost = writeln!(lock(&self.0), "{now} cpu{vcpu} {event}");
    }

    /// Writes what is buffered.
    pub fn flush(&self) {
        let _lost = lock(&self.0).flush();
    }
}

/// Bytes of a device-memory access as one number.
pub(crate) struct Bytes<'a>(pub &'a [u8]);

impl std::fmt::Display for Bytes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("0x")?;
        self.0.iter().rev().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
