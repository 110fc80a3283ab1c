//! Memory in pages of 2 MiB, by transparent huge pages: asked for with `madvise`, and believed only if the kernel says in
//! `/proc/self/smaps` that it gave them.

use core::ffi::CStr;

use crate::{Mem, sys};

const HUGE: usize = 2 << 20;
const SMAPS: &CStr = c"/proc/self/smaps";
const ENABLED: &CStr = c"/sys/kernel/mm/transparent_hugepage/enabled";

/// Zeroed memory that holds `len` bytes from the returned offset on in huge pages, all of them present.
pub fn map(len: usize) -> Result<(Mem, usize), &'static str> {
    switch_on();
    let needed = len.next_multiple_of(HUGE);
    let at = sys::map(needed + HUGE, sys::READ_WRITE).ok_or("not enough memory")?;
    let mem = Mem { at, len: needed + HUGE };
    let start = (at as usize).next_multiple_of(HUGE);
    if sys::advise(start as *mut u8, needed, sys::MADV_HUGEPAGE) != 0 {
        return Err("the kernel knows no huge pages");
    }
    for page in (start..start + needed).step_by(4096) {
        // SAFETY: inside the mapping.
        unsafe { (page as *mut u8).write_volatile(0) };
    }
    match in_huge_pages(start) {
        None => Err("no /proc/self/smaps that would tell the size of pages"),
        Some(huge) if huge >= needed => Ok((mem, start - at as usize)),
        Some(0) => Err("the kernel gave no huge pages"),
        Some(_) => Err("the kernel gave huge pages for a part only"),
    }
}

/// Process 1 has the machine to itself, and lets it give huge pages to who asks: Linux does not in less than 512 MiB
/// (`hugepage_init` in `mm/huge_memory.c`). Elsewhere the owner of the machine has decided.
fn switch_on() {
    if sys::call3(sys::SYS_GETPID, 0, 0, 0) != 1 {
        return;
    }
    let mut file = sys::open(ENABLED, sys::O_WRONLY);
    if file < 0 {
        sys::mount(c"sysfs", c"/sys");
        file = sys::open(ENABLED, sys::O_WRONLY);
    }
    if file >= 0 {
        sys::write_all(file, b"madvise");
        sys::close(file);
    }
}

/// Bytes in huge pages of the mapping with the address `at`.
fn in_huge_pages(at: usize) -> Option<usize> {
    let mut file = sys::open(SMAPS, sys::O_RDONLY);
    if file < 0 {
        // Process 1 has a file system to itself, and may mount.
        sys::mount(c"proc", c"/proc");
        file = sys::open(SMAPS, sys::O_RDONLY);
    }
    if file < 0 {
        return None;
    }
    let mut reader = Reader { file, bytes: [0; 1024], len: 0, at: 0 };
    let huge = find(&mut reader, at);
    sys::close(file);
    huge
}

/// The mapping's head is `start-end rights …` in hexadecimal, and a line of it `AnonHugePages: N kB`.
fn find(reader: &mut Reader, at: usize) -> Option<usize> {
    let mut inside = false;
    let mut line = [0; 256];
    while let Some(text) = reader.line(&mut line) {
        let mut words = text.split_ascii_whitespace();
        let first = words.next().unwrap_or("");
        if let Some((start, end)) = range(first) {
            inside = (start..end).contains(&at);
        } else if inside && first == "AnonHugePages:" {
            return words.next()?.parse::<usize>().ok()?.checked_mul(1024);
        }
    }
    None
}

fn range(word: &str) -> Option<(usize, usize)> {
    let (start, end) = word.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// Lines of a file; what is longer than the caller's buffer is cut.
struct Reader {
    file: i32,
    bytes: [u8; 1024],
    len: usize,
    at: usize,
}

impl Reader {
    fn line<'a>(&mut self, line: &'a mut [u8; 256]) -> Option<&'a str> {
        let mut len = 0;
        loop {
            match self.byte() {
                None if len == 0 => return None,
                None | Some(b'\n') => break,
                Some(byte) if len < line.len() => {
                    line[len] = byte;
                    len += 1;
                }
                Some(_) => {}
            }
        }
        Some(core::str::from_utf8(&line[..len]).unwrap_or(""))
    }

    fn byte(&mut self) -> Option<u8> {
        if self.at == self.len {
            self.len = usize::try_from(sys::read(self.file, &mut self.bytes)).ok()?;
            self.at = 0;
            if self.len == 0 {
                return None;
            }
        }
        self.at += 1;
        Some(self.bytes[self.at - 1])
    }
}
