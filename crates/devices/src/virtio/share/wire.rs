//! The bytes of messages: those of FUSE are read, those of 9P2000.L read and written (Linux `Documentation/filesystems/9p.rst`; diod's `protocol.md` lists the fields): little-
//! endian numbers, strings with a 16-bit length.

use rustix::fs::FileType;
use rustix::io::Errno;

/// What a client's message must not be.
const MALFORMED: Errno = Errno::INVAL;

/// Reads the fields of a message.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(MALFORMED)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub fn u8(&mut self) -> Result<u8, Errno> {
        self.bytes(1).map(|b| b[0])
    }

    pub fn u16(&mut self) -> Result<u16, Errno> {
        self.bytes(2)?.try_into().map(u16::from_le_bytes).map_err(|_| MALFORMED)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.bytes(4)?.try_into().map(u32::from_le_bytes).map_err(|_| MALFORMED)
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.bytes(8)?.try_into().map(u64::from_le_bytes).map_err(|_| MALFORMED)
    }

    /// A string without NUL.
    pub fn string(&mut self) -> Result<&'a [u8], Errno> {
        let len = self.u16()?;
        let bytes = self.bytes(usize::from(len))?;
        if bytes.contains(&0) { Err(MALFORMED) } else { Ok(bytes) }
    }

    /// The name of a directory's entry: one component that leads neither up nor nowhere.
    pub fn name(&mut self) -> Result<&'a [u8], Errno> {
        checked_name(self.string()?)
    }
}

/// A name that has one component and leads neither up nor nowhere.
pub(super) fn checked_name(name: &[u8]) -> Result<&[u8], Errno> {
    match name {
        b"" | b"." | b".." => Err(MALFORMED),
        name if name.contains(&b'/') => Err(MALFORMED),
        name if name.len() > 255 => Err(Errno::NAMETOOLONG),
        name => Ok(name),
    }
}

/// `DT_*` of `readdir(3)`.
pub(super) const fn directory_type(kind: FileType) -> u8 {
    match kind {
        FileType::Fifo => 1,
        FileType::CharacterDevice => 2,
        FileType::Directory => 4,
        FileType::BlockDevice => 6,
        FileType::RegularFile => 8,
        FileType::Symlink => 10,
        FileType::Socket => 12,
        FileType::Unknown => 0,
    }
}

/// Makes the fields of an answer, behind its header.
pub(super) struct Writer {
    bytes: Vec<u8>,
}

/// Bytes of a header: size, type, tag.
pub(super) const HEADER_BYTES: usize = 7;

impl Writer {
    pub fn new() -> Self {
        Self { bytes: vec![0; HEADER_BYTES] }
    }

    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A string; what is longer than its length field says is cut off.
    pub fn string(&mut self, text: &[u8]) -> &mut Self {
        let len = u16::try_from(text.len()).unwrap_or(u16::MAX);
        self.u16(len).raw(&text[..usize::from(len)])
    }

    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// A block of data of at most `most` bytes, which `fill` writes and says the length of.
    pub fn data(
        &mut self,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        let start = self.bytes.len() + 4;
        self.bytes.resize(start + most, 0);
        let len = fill(&mut self.bytes[start..])?.min(most);
        self.bytes.truncate(start + len);
        self.bytes[start - 4..start].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
        Ok(())
    }

    /// Ends the message.
    pub fn finish(mut self, kind: u8, tag: u16) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&len.to_le_bytes());
        self.bytes[4] = kind;
        self.bytes[5..HEADER_BYTES].copy_from_slice(&tag.to_le_bytes());
        self.bytes
    }
}
