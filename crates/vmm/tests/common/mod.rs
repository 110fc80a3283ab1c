//! What tests of whole machines share.

#![allow(dead_code, reason = "each test uses its part")]

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vmm::Sink;
use vmm::boot::{BootSource, Protocol};

/// Collects output.
#[derive(Clone, Default)]
pub struct Capture(Arc<Mutex<Vec<u8>>>);

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Capture {
    /// For a machine to write to.
    pub fn sink(&self) -> Option<Sink> {
        Some(Box::new(self.clone()))
    }

    /// What was written.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

/// The guest of the contract suite, with a command line.
pub fn contract_guest(protocol: Protocol, cmdline: String) -> BootSource {
    BootSource {
        kernel: guest_embed::CONTRACT.to_vec(),
        kernel_name: "contract".to_owned(),
        protocol: Some(protocol),
        cmdline,
        ..BootSource::default()
    }
}
