//! Devices behind their PCI transport, driven as a guest drives them.

#![expect(clippy::cast_possible_truncation, reason = "tests take registers and random numbers apart")]

mod balloon;
mod block;
pub(super) mod driver;
mod hostile;
mod net;
mod small;
mod transport;
mod vsock;
