//! What the real programs work on: text, lines, a tree of files, a C source, all made here from fixed seeds.

use core::ffi::CStr;
use core::fmt::Write as _;

use crate::{Mem, sys};

/// The C source, a copy of it a file has `@` replaced by a number.
const SOURCE: &[u8] = include_bytes!("real_source.c");
/// The number by which [`multiply_assembly`] knows names.
pub const MARK: u64 = 77_777;

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

/// A file under construction.
pub struct Writer {
    bytes: Mem,
    len: usize,
}

impl Writer {
    pub fn new(capacity: usize) -> Option<Self> {
        let at = sys::map(capacity, sys::READ_WRITE)?;
        Some(Self { bytes: Mem { at, len: capacity }, len: 0 })
    }

    pub fn clear(&mut self) {
        self.len = 0;
    }

    fn push(&mut self, bytes: &[u8]) {
        let len = self.len;
        let room = &mut self.bytes.slice::<u8>()[len..];
        let fits = bytes.len().min(room.len());
        room[..fits].copy_from_slice(&bytes[..fits]);
        self.len += fits;
    }

    fn content(&mut self) -> &[u8] {
        let len = self.len;
        &self.bytes.slice::<u8>()[..len]
    }

    pub fn save(&mut self, path: &CStr) -> bool {
        let file = sys::open(path, sys::O_WRONLY | sys::O_CREAT | sys::O_TRUNC);
        if file < 0 {
            return false;
        }
        sys::write_all(file, self.content());
        sys::close(file);
        true
    }
}

impl core::fmt::Write for Writer {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

/// A short text with its NUL: a path, or a number for a command line.
pub struct Word {
    bytes: [u8; 64],
    len: usize,
}

impl Word {
    pub fn new(text: core::fmt::Arguments) -> Self {
        let mut word = Self { bytes: [0; 64], len: 0 };
        let _ = word.write_fmt(text);
        word
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"")
    }
}

impl core::fmt::Write for Word {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for &byte in text.as_bytes() {
            if self.len < self.bytes.len() - 1 {
                self.bytes[self.len] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Appends `len` bytes of text: words of a vocabulary of some thousand, the first of them frequent, in lines.
pub fn text(writer: &mut Writer, len: usize, seed: u64) {
    let mut random = Random(seed * 2 + 88_172_645_463_325_253);
    let end = writer.len + len;
    while writer.len < end {
        let rank = random.below(64) * random.below(64) + random.below(8);
        let mut letters = Random(rank * 0x9e37_79b9 + 1);
        letters.next();
        let count = 2 + letters.below(8) as usize;
        let mut word = [0u8; 12];
        word[..count].fill_with(|| b'a' + letters.below(26) as u8);
        word[count] = if random.below(11) == 0 { b'\n' } else { b' ' };
        writer.push(&word[..=count]);
    }
    writer.push(b"\n");
}

/// Appends `count` lines of keys that are not sorted, with some that are there twice.
pub fn lines(writer: &mut Writer, count: u64) {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..count {
        let key = random.below(count * 4);
        let _ =
            writeln!(writer, "{:x}:{:05} {}", key.wrapping_mul(0x9e37_79b9) & 0xf_ffff, key % 90_001, key);
    }
}

/// Appends the C source, `copies` times.
pub fn c_source(writer: &mut Writer, copies: u64) {
    for copy in 1..=copies {
        one_source(writer, copy);
    }
}

/// Appends the C source once, as copy `number`.
pub fn one_source(writer: &mut Writer, number: u64) {
    let mut pieces = SOURCE.split(|byte| *byte == b'@');
    writer.push(pieces.next().unwrap_or(SOURCE));
    for piece in pieces {
        let _ = write!(writer, "{number}");
        writer.push(piece);
    }
}

/// Appends `copies` of the assembly text in the file `path`, which was made of copy [`MARK`] of the C source, with names
/// and labels of their own.
pub fn multiply_assembly(writer: &mut Writer, path: &CStr, copies: u64) -> Option<()> {
    let mut original = Writer::new(1 << 20)?;
    read_into(path, |bytes| original.push(bytes))?;
    for copy in 1..=copies {
        let mut rest = original.content();
        while let Some((&first, after)) = rest.split_first() {
            if rest.starts_with(b".L") {
                let _ = write!(writer, ".L{copy}_");
                rest = &rest[2..];
            } else if rest.starts_with(b"77777") {
                let _ = write!(writer, "{copy}");
                rest = &rest[5..];
            } else {
                writer.push(&[first]);
                rest = after;
            }
        }
    }
    Some(())
}

/// Makes `directories` directories of `files` files each below `work/tree`.
pub fn tree(writer: &mut Writer, directories: u64, files: u64) -> bool {
    let mut made = sys::make_directory(c"work/tree");
    for directory in 0..directories {
        made &= sys::make_directory(Word::new(format_args!("work/tree/d{directory}")).as_c_str());
        for file in 0..files {
            writer.clear();
            text(writer, 600 + (file * 977 % 3100) as usize, directory * files + file + 1);
            if file % 5 == 2 {
                let _ = writeln!(writer, "the needle{file} in directory {directory}");
            }
            let kind = if file % 3 == 0 { "c" } else { "txt" };
            let path = Word::new(format_args!("work/tree/d{directory}/f{file}.{kind}"));
            made &= writer.save(path.as_c_str());
        }
    }
    made
}

/// Gives the bytes of a file to `take`, piece by piece; `None` if there is none.
pub fn read_into(path: &CStr, mut take: impl FnMut(&[u8])) -> Option<()> {
    let file = sys::open(path, sys::O_RDONLY);
    if file < 0 {
        return None;
    }
    let mut bytes = [0u8; 4096];
    loop {
        let len = sys::read(file, &mut bytes);
        if len <= 0 {
            break;
        }
        take(&bytes[..len as usize]);
    }
    sys::close(file);
    Some(())
}
