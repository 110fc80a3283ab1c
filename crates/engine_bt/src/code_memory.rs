//! The memory of the translation cache, mapped twice: writable here, executable there (W^X).

#![expect(clippy::cast_possible_truncation, reason = "distances within code memory")]
#![expect(unsafe_code, reason = "maps code memory and writes it")]

use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::huge::{self, Collapser};

/// Code memory. Offsets count from its first byte, in both mappings.
pub struct CodeMemory {
    write: *mut u8,
    exec: *mut u8,
    len: usize,
    /// Chunks of [`huge::PAGE`] bytes from the start that were asked to be huge pages, by number.
    settled: Vec<bool>,
    /// The chunk written last.
    chunk: usize,
    collapser: Collapser,
}

// SAFETY: the mappings belong to this object alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// `len` bytes of code memory.
    ///
    /// # Errors
    /// When the host gives no executable memory.
    pub fn new(len: usize) -> rustix::io::Result<Self> {
        // Shared anonymous memory: code in a memfd `perf` would not look up in the perf map.
        let rx = ProtFlags::READ | ProtFlags::EXEC;
        let exec = huge::reserve(len)?;
        // SAFETY: the place was just reserved and nothing uses it.
        let mapped = unsafe { mmap_anonymous(exec.cast(), len, rx, MapFlags::SHARED | MapFlags::FIXED) };
        let write = huge::reserve(len).and_then(|to| {
            let moves = MremapFlags::MAYMOVE;
            // SAFETY: an old size of 0 leaves the shared mapping as it is and makes another of the same pages (mremap(2)), in reserved memory.
            unsafe { rustix::mm::mremap_fixed(exec.cast(), 0, len, moves, to.cast()) }
        });
        let settled = vec![false; len.div_ceil(huge::PAGE)];
        let memory = Self {
            write: write.map_or(exec, |p| p.cast()),
            exec,
            len,
            settled,
            chunk: 0,
            collapser: Collapser::default(),
        };
        mapped?;
        // SAFETY: the new mapping, which nothing uses yet.
        unsafe { mprotect(write?, len, MprotectFlags::READ | MprotectFlags::WRITE)? };
        Ok(memory)
    }

    /// Puts code at an offset. Nothing if it does not fit.
    pub fn put(&mut self, at: usize, code: &[u8]) {
        if at.checked_add(code.len()).is_some_and(|end| end <= self.len) {
            // SAFETY: at..at+len lies in the mapping.
            unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(at), code.len()) };
        }
    }

    /// Tells that code is put at `at` from now on. Memory that was filled becomes huge pages: translated code is many times larger than
    /// the guest's, and with small ones the host's processor would spend its time on finding them.
    pub fn fill_from(&mut self, at: usize) {
        let chunk = at / huge::PAGE;
        let filled = std::mem::replace(&mut self.chunk, chunk);
        if filled == chunk || (filled + 1) * huge::PAGE > self.len {
            return;
        }
        if let Some(settled) = self.settled.get_mut(filled)
            && !std::mem::replace(settled, true)
        {
            for mapping in [self.write, self.exec] {
                // SAFETY: the chunk lies in the mapping.
                self.collapser.ask(unsafe { mapping.add(filled * huge::PAGE) });
            }
        }
    }

    /// The code at an offset; empty if it does not lie in code memory.
    pub fn get(&self, at: usize, len: usize) -> &[u8] {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return &[];
        }
        // SAFETY: at..at+len lies in the mapping, which is never written while it is borrowed: that takes `&mut self`.
        unsafe { std::slice::from_raw_parts(self.write.add(at), len) }
    }

    /// Makes the 32-bit displacement at `place` lead to `target`. Only this vCPU's thread runs the code, and not now.
    pub fn link(&mut self, place: usize, target: usize) {
        let rel = (target as i64 - (place as i64 + 4)) as i32;
        self.put(place, &rel.to_le_bytes());
    }

    /// Puts a jump at `at` that leads to `target`. Fragments are longer than a jump, and none runs now.
    pub fn redirect(&mut self, at: usize, target: usize) {
        self.put(at, &[0xe9]);
        self.link(at + 1, target);
    }

    /// Host address of the code at an offset.
    pub fn address(&self, at: usize) -> u64 {
        // SAFETY: cut off at the end of the mapping.
        unsafe { self.exec.add(at.min(self.len)) as u64 }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // Its thread needs the mappings.
        drop(std::mem::take(&mut self.collapser));
        // SAFETY: our own mapping, not used after this.
        let _unmapped = unsafe { munmap(self.exec.cast(), self.len) };
        if self.write != self.exec {
            // SAFETY: as above.
            let _unmapped = unsafe { munmap(self.write.cast(), self.len) };
        }
    }
}
