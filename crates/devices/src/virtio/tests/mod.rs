//! Devices behind their PCI transport, driven as a guest drives them.

mod block;
mod driver;
mod hostile;
mod small;
mod transport;
