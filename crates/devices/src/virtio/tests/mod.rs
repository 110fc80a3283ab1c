//! Devices behind their PCI transport, driven as a guest drives them.
