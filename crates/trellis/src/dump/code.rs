//! Guest code for `trellis dump`: bytes at addresses, from the command line, a flat file, or an ELF64 file (System V gABI).

use std::path::Path;

use anyhow::{Context as _, bail};

use super::DumpArgs;
use crate::image::elf::{Segment, segments, string, u16_at, u32_at, u64_at};
use crate::suggest;

/// `p_type` of what is loaded.
const PT_LOAD: u32 = 1;
/// `sh_type` of symbol tables.
const SHT_SYMTAB: u32 = 2;
const SHT_DYNSYM: u32 = 11;
/// A byte that begins no instruction in 64-bit code: what lies around the code is not known.
const UNKNOWN: u8 = 0x06;
/// Where code is taken to be that has no address.
const KERNEL_RIP: u64 = 0xffff_ffff_8100_0000;
const USER_RIP: u64 = 0x40_1000;

/// Bytes at addresses.
pub(super) struct Code {
    pieces: Vec<(u64, Vec<u8>)>,
    /// The first instruction.
    pub start: u64,
    /// Behind the last, if that is known.
    pub end: Option<u64>,
}

impl Code {
    /// The code that the options name.
    pub fn read(args: &DumpArgs) -> anyhow::Result<Self> {
        let default_rip = if args.user { USER_RIP } else { KERNEL_RIP };
        if let Some(text) = &args.bytes {
            return Ok(Self::flat(parse_hex(text)?, args.rip.unwrap_or(default_rip), true));
        }
        let path = args.file.as_deref().context("give --bytes or --file")?;
        let file = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        if file.starts_with(b"\x7fELF") && args.offset.is_none() {
            return Self::elf(&file, path, args);
        }
        if args.symbol.is_some() {
            bail!("{} is no ELF file and has no symbols; give --offset", path.display());
        }
        let offset = args.offset.unwrap_or(0);
        let from = usize::try_from(offset).ok().and_then(|at| file.get(at..)).filter(|rest| !rest.is_empty());
        let Some(bytes) = from else {
            bail!("{} has {:#x} bytes, so none at {offset:#x}", path.display(), file.len());
        };
        Ok(Self::flat(bytes.to_vec(), args.rip.unwrap_or(default_rip), false))
    }

    fn flat(bytes: Vec<u8>, start: u64, all: bool) -> Self {
        let end = all.then(|| start.wrapping_add(bytes.len() as u64));
        Self { pieces: vec![(start, bytes)], start, end }
    }

    fn elf(file: &[u8], path: &Path, args: &DumpArgs) -> anyhow::Result<Self> {
        let name = path.display();
        let broken = || format!("{name} is no well-formed ELF64 file");
        if file.get(4..6) != Some(&[2, 1][..]) {
            bail!("{name} is not of 64 bits, little-endian; give --offset to take its bytes as they are");
        }
        let loaded: Vec<Segment> =
            segments(file).with_context(broken)?.into_iter().filter(|s| s.kind == PT_LOAD).collect();
        let piece = |s: &Segment| {
            let from = usize::try_from(s.offset).ok()?;
            let to = from.checked_add(usize::try_from(s.len).ok()?)?;
            Some((s.address, file.get(from..to)?.to_vec()))
        };
        let pieces: Vec<_> = loaded.iter().map(piece).collect::<Option<_>>().with_context(broken)?;
        let (start, end) = match (&args.symbol, args.rip) {
            (Some(symbol), _) => find_symbol(file, symbol).with_context(|| format!("in {name}"))?,
            (None, Some(rip)) => (rip, None),
            (None, None) => (u64_at(file, 24).with_context(broken)?, None),
        };
        let code = Self { pieces, start, end };
        if code.byte(start).is_none() {
            bail!("{name} has nothing at {start:#x}");
        }
        Ok(code)
    }

    fn byte(&self, address: u64) -> Option<u8> {
        self.pieces
            .iter()
            .find_map(|(at, bytes)| bytes.get(usize::try_from(address.checked_sub(*at)?).ok()?).copied())
    }

    /// The page at an address; what is not known is no instruction.
    pub fn page(&self, page_rip: u64) -> [u8; 4096] {
        let mut page = [UNKNOWN; 4096];
        for (offset, byte) in (0u64..).zip(&mut page) {
            if let Some(known) = self.byte(page_rip.wrapping_add(offset)) {
                *byte = known;
            }
        }
        page
    }
}

/// Hexadecimal digits in pairs; spaces, commas and `0x` between them do not matter.
fn parse_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    let digits: String = text.replace("0x", " ").split([' ', ',', '\t', '\n', ':']).collect();
    let pairs = digits.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).ok().filter(|p| p.len() == 2 && !p.contains('+'))?;
        u8::from_str_radix(pair, 16).ok()
    });
    match pairs.collect::<Option<Vec<u8>>>() {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        _ => bail!("'{text}' is no code; give hexadecimal bytes, as in '48 01 d8'"),
    }
}

/// A symbol's address, and where it ends if it has a size.
fn find_symbol(file: &[u8], wanted: &str) -> anyhow::Result<(u64, Option<u64>)> {
    let symbols = symbols(file);
    if let Some((_, at, size)) = symbols.iter().find(|(name, at, _)| name == wanted && *at != 0) {
        return Ok((*at, (*size > 0).then(|| at.wrapping_add(*size))));
    }
    if symbols.is_empty() {
        bail!("there are no symbols; give --rip");
    }
    let near = suggest::did_you_mean(wanted, symbols.iter().map(|(name, ..)| name.as_str()));
    bail!("there is no symbol '{wanted}'{}", near.unwrap_or_default())
}

/// Names, addresses and sizes of all symbol tables; what is malformed is left out.
fn symbols(file: &[u8]) -> Vec<(String, u64, u64)> {
    let mut all = Vec::new();
    let count = u16_at(file, 60).unwrap_or(0);
    for index in 0..count {
        let Some(section) = section(file, index) else { continue };
        let Some(strings) = u16::try_from(section.link).ok().and_then(|link| self::section(file, link))
        else {
            continue;
        };
        if !matches!(section.kind, SHT_SYMTAB | SHT_DYNSYM) {
            continue;
        }
        let entry = |n: u64| {
            let at = section.offset.checked_add(n * 24)?;
            let name = string(file, strings.offset.checked_add(u64::from(u32_at(file, at)?))?)?;
            Some((name, u64_at(file, at + 8)?, u64_at(file, at.checked_add(16)?)?))
        };
        all.extend(
            (0..section.len / 24)
                .map_while(|n| Some(entry(n)).filter(|_| n * 24 < file.len() as u64))
                .flatten(),
        );
    }
    all
}

struct Section {
    kind: u32,
    offset: u64,
    len: u64,
    link: u32,
}

fn section(file: &[u8], index: u16) -> Option<Section> {
    let (table, size) = (u64_at(file, 40)?, u16_at(file, 58)?);
    let at = table.checked_add(u64::from(index) * u64::from(size))?;
    let field = |offset| at.checked_add(offset);
    Some(Section {
        kind: u32_at(file, field(4)?)?,
        offset: u64_at(file, field(24)?)?,
        len: u64_at(file, field(32)?)?,
        link: u32_at(file, field(40)?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_as_people_write_it() {
        for text in ["48 01 d8", "4801d8", "0x48,0x01,0xd8", "48:01:D8"] {
            assert_eq!(parse_hex(text).unwrap(), [0x48, 1, 0xd8], "{text}");
        }
        for text in ["", "4", "48 0", "+1", "é0"] {
            assert!(parse_hex(text).is_err(), "{text}");
        }
    }

    #[test]
    fn page_has_what_is_known_and_no_instructions_around() {
        let code = Code::flat(vec![0x90, 0x90], 0xfff, true);
        assert_eq!(code.page(0)[0xffe..], [UNKNOWN, 0x90]);
        assert_eq!(code.page(0x1000)[..2], [0x90, UNKNOWN]);
        assert_eq!(code.end, Some(0x1001));
    }

    #[test]
    fn symbols_of_a_program_are_found_and_misspelled_ones_suggested() {
        let file = guest_bench::PROGRAM;
        let all = symbols(file);
        let (name, at, _) =
            all.iter().find(|(name, at, size)| name.len() > 8 && *at != 0 && *size > 0).unwrap();
        assert_eq!(find_symbol(file, name).unwrap().0, *at);
        let error = find_symbol(file, &format!("{name}x")).unwrap_err().to_string();
        assert!(error.contains("did you mean"), "{error}");
    }

    #[test]
    fn elf_cut_short_anywhere_is_an_error_or_less() {
        let whole = guest_bench::PROGRAM;
        for len in (0..whole.len()).step_by(whole.len() / 199 + 1) {
            let _symbols = symbols(&whole[..len]);
        }
        let mut wild = whole.to_vec();
        wild[40..48].copy_from_slice(&(u64::MAX - 3).to_le_bytes());
        assert!(symbols(&wild).is_empty());
    }
}
