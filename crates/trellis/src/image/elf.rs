//! Which shared libraries an ELF64 file asks for: as much of the format as that takes (System V gABI, "Dynamic Section").

/// `p_type` of loadable segments and of the dynamic section.
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
/// `d_tag` of a needed library and of the string table.
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

/// A program header, as far as it matters here.
pub(crate) struct Segment {
    pub kind: u32,
    pub offset: u64,
    pub address: u64,
    pub len: u64,
}

/// The names in `DT_NEEDED`; none for a static program, `None` for what is no well-formed ELF64 file.
#[must_use]
pub fn needed(file: &[u8]) -> Option<Vec<String>> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let segments = segments(file)?;
    let Some(dynamic) = segments.iter().find(|segment| segment.kind == PT_DYNAMIC) else {
        return Some(Vec::new());
    };
    let entries = entries(file, dynamic)?;
    let Some((_, address)) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB) else {
        return Some(Vec::new());
    };
    let table = file_offset(&segments, *address)?;
    let names = entries.iter().filter(|(tag, _)| *tag == DT_NEEDED);
    names.map(|(_, at)| string(file, table.checked_add(*at)?)).collect()
}

pub(crate) fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    let (table, size, count) = (u64_at(file, 32)?, u16_at(file, 54)?, u16_at(file, 56)?);
    let segment = |index: u16| {
        let at = table.checked_add(u64::from(index) * u64::from(size))?;
        let field = |offset| u64_at(file, at.checked_add(offset)?);
        Some(Segment { kind: u32_at(file, at)?, offset: field(8)?, address: field(16)?, len: field(32)? })
    };
    (0..count).map(segment).collect()
}

/// Tags and values up to `DT_NULL`.
fn entries(file: &[u8], dynamic: &Segment) -> Option<Vec<(u64, u64)>> {
    let mut entries = Vec::new();
    for index in 0..dynamic.len / 16 {
        let at = dynamic.offset.checked_add(index * 16)?;
        let (tag, value) = (u64_at(file, at)?, u64_at(file, at.checked_add(8)?)?);
        if tag == DT_NULL {
            break;
        }
        entries.push((tag, value));
    }
    Some(entries)
}

/// Where in the file the byte at virtual address `address` is.
fn file_offset(segments: &[Segment], address: u64) -> Option<u64> {
    let holds = |segment: &&Segment| {
        segment.kind == PT_LOAD
            && address.checked_sub(segment.address).is_some_and(|inside| inside < segment.len)
    };
    let segment = segments.iter().find(holds)?;
    segment.offset.checked_add(address - segment.address)
}

pub(crate) fn string(file: &[u8], at: u64) -> Option<String> {
    let rest = file.get(usize::try_from(at).ok()?..)?;
    let len = rest.iter().position(|byte| *byte == 0)?;
    String::from_utf8(rest[..len].to_vec()).ok()
}

fn bytes_at<const N: usize>(file: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

pub(crate) fn u16_at(file: &[u8], at: u64) -> Option<u16> {
    bytes_at(file, at).map(u16::from_le_bytes)
}

pub(crate) fn u32_at(file: &[u8], at: u64) -> Option<u32> {
    bytes_at(file, at).map(u32::from_le_bytes)
}

pub(crate) fn u64_at(file: &[u8], at: u64) -> Option<u64> {
    bytes_at(file, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A file of two segments whose dynamic section needs `names`; mapped at 0x10000.
    pub(crate) fn example(names: &[&str]) -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut entries: Vec<u64> = Vec::new();
        for name in names {
            entries.extend([DT_NEEDED, strings.len() as u64]);
            strings.extend(name.bytes().chain([0]));
        }
        let dynamic = 64 + 2 * 56;
        let table = dynamic + 16 * (names.len() as u64 + 2);
        entries.extend([DT_STRTAB, 0x10000 + table, DT_NULL, 0]);
        let total = table + strings.len() as u64;
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64, 0);
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&2u16.to_le_bytes());
        for (kind, offset, len) in [(PT_LOAD, 0, total), (PT_DYNAMIC, dynamic, table - dynamic)] {
            let fields = [offset, 0x10000 + offset, 0, len, len, 0];
            file.extend(u64::from(kind).to_le_bytes());
            fields.iter().for_each(|field| file.extend(field.to_le_bytes()));
        }
        entries.iter().for_each(|entry| file.extend(entry.to_le_bytes()));
        file.extend(strings);
        file
    }

    #[test]
    fn needed_libraries_are_read() {
        assert_eq!(needed(&example(&["libz.so.1", "libc.so.6"])).unwrap(), ["libz.so.1", "libc.so.6"]);
        assert_eq!(needed(&example(&[])).unwrap(), [""; 0]);
    }

    #[test]
    fn file_cut_short_anywhere_is_refused() {
        let whole = example(&["libc.so.6"]);
        for len in 0..whole.len() {
            assert_eq!(needed(&whole[..len]), None, "{len} bytes");
        }
    }

    #[test]
    fn wild_offsets_are_refused() {
        let mut file = example(&["libc.so.6"]);
        file[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(needed(&file), None);
        assert_eq!(needed(b"#!/bin/sh\n"), None);
    }

    #[test]
    fn static_program_needs_nothing() {
        assert_eq!(needed(guest_bench::PROGRAM).unwrap(), [""; 0]);
    }
}
