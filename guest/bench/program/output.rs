//! Answers and marks: on standard error, or on the debug console (port 0xe9) through `/dev/port`, which costs nothing when
//! it is not used; an I/O permission bitmap would make every context switch dearer.

use core::fmt::Write as _;
use core::sync::atomic::{AtomicI32, Ordering};

use crate::sys;

const DEBUG_PORT: usize = 0xe9;
/// The descriptor of `/dev/port`; -1 for standard error.
static PORT: AtomicI32 = AtomicI32::new(-1);

/// From now on answers go to the debug console. Returns whether it can be reached.
pub fn use_debug_port() -> bool {
    let fd = sys::call3(sys::SYS_OPEN, c"/dev/port".as_ptr() as usize, 2, 0) as i32;
    PORT.store(fd, Ordering::Relaxed);
    fd >= 0
}

pub fn byte(value: u8) {
    match PORT.load(Ordering::Relaxed) {
        -1 => sys::write_all(2, &[value]),
        fd => {
            sys::call(sys::SYS_PWRITE64, [fd as usize, &raw const value as usize, 1, DEBUG_PORT, 0, 0]);
        }
    }
}

struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl core::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for &value in text.as_bytes() {
            if self.len < self.bytes.len() {
                self.bytes[self.len] = value;
                self.len += 1;
            }
        }
        Ok(())
    }
}

pub fn line(text: core::fmt::Arguments) {
    let mut line = Line { bytes: [0; 256], len: 0 };
    let _ = line.write_fmt(text);
    let _ = line.write_str("\n");
    if PORT.load(Ordering::Relaxed) == -1 {
        sys::write_all(2, &line.bytes[..line.len]);
    } else {
        line.bytes[..line.len].iter().for_each(|&value| byte(value));
    }
}
