//! Names of guest addresses: from a kernel's own table (`kallsyms`, in the image that is booted), from `/proc/kallsyms` or a `System.map`, or from
//! an ELF file.
//!
//! [`Symbols::read`] looks what a file is. A name belongs to an address from its symbol's own up to the next symbol, at most [`MAX_LEN`]
//! bytes on. Kernels that move themselves (KASLR) are looked up by [`Symbols::shifted`]; the guests of `trellis bakeoff` are
//! told not to.

pub mod bzimage;
pub mod kallsyms;

use std::fs;
use std::path::Path;

use object::{Object as _, ObjectSymbol as _, SymbolKind};

/// No function is longer.
const MAX_LEN: u64 = 1 << 20;
/// Programs with addresses of their own begin at 4 MiB by linkers' custom, and never in the first 64 KiB.
const LOWEST_FIXED: u64 = 0x1_0000;
/// Larger files are none of symbols.
const MAX_FILE_LEN: u64 = 1 << 30;

/// Names by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbols {
    /// Sorted by address.
    names: Vec<(u64, String)>,
}

impl Symbols {
    /// Names with their addresses, in any order.
    #[must_use]
    pub fn new(mut names: Vec<(u64, String)>) -> Self {
        names.sort_by_key(|(address, _)| *address);
        // The first of several names of a place stays.
        names.dedup_by_key(|(address, _)| *address);
        Self { names }
    }

    /// The names in a file: a kernel (bzImage or ELF), another ELF file, `System.map` or `/proc/kallsyms`.
    ///
    /// # Errors
    /// One line.
    pub fn read(file: &Path) -> Result<Self, String> {
        let named = |what: &str| format!("{}: {what}", file.display());
        let len = fs::metadata(file).map_err(|error| named(&error.to_string()))?.len();
        if len > MAX_FILE_LEN {
            return Err(named("too large for a file of symbols"));
        }
        let content = fs::read(file).map_err(|error| named(&error.to_string()))?;
        Self::parse(&content).map_err(|what| named(&what))
    }

    /// The same of a file's content.
    ///
    /// # Errors
    /// One line.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        if let Some(kernel) = bzimage::kernel(content)? {
            return Self::of_elf(&kernel);
        }
        if content.starts_with(b"\x7fELF") {
            return Self::of_elf(content);
        }
        let text =
            std::str::from_utf8(content).map_err(|_| "no kernel, no ELF file and no table of symbols")?;
        let symbols = Self::of_map(text);
        if symbols.is_empty() { Err("there are no symbols in it".to_owned()) } else { Ok(symbols) }
    }

    /// An ELF file's symbols, or if it is a kernel without any its own table.
    fn of_elf(file: &[u8]) -> Result<Self, String> {
        let parsed = object::File::parse(file).map_err(|error| format!("not a good ELF file: {error}"))?;
        let wanted = |kind| matches!(kind, SymbolKind::Text | SymbolKind::Unknown | SymbolKind::Label);
        let symbols = parsed.symbols().chain(parsed.dynamic_symbols());
        let names: Vec<(u64, String)> = symbols
            .filter(|symbol| symbol.is_definition() && wanted(symbol.kind()) && symbol.address() != 0)
            .filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?.to_owned())))
            .collect();
        if !names.is_empty() {
            return Ok(Self::new(names));
        }
        let tables = kallsyms::find(file).ok_or("it is stripped: there are no symbols in it")?;
        Ok(Self::new(tables))
    }

    /// Lines `address type name`.
    fn of_map(text: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split_ascii_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let (kind, name) = (words.next()?, words.next()?);
            let is_code = kind.len() == 1 && "tTwW".contains(kind);
            // Who may not see addresses reads zeros.
            (is_code && address != 0).then(|| (address, name.to_owned()))
        };
        Self::new(text.lines().filter_map(line).collect())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// The name of what lies at an address, and how far in it.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<(&str, u64)> {
        let next = self.names.partition_point(|(start, _)| *start <= address);
        let (start, name) = self.names.get(next.checked_sub(1)?)?;
        (address - start < MAX_LEN).then_some((name.as_str(), address - start))
    }

    /// The address of a name.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<u64> {
        self.names.iter().find(|(_, known)| known == name).map(|(address, _)| *address)
    }

    /// Whether the addresses are those of a file that can be loaded anywhere.
    #[must_use]
    pub fn is_relative(&self) -> bool {
        self.names.first().is_some_and(|(address, _)| *address < LOWEST_FIXED)
    }

    /// Whether they are a kernel's.
    #[must_use]
    pub fn is_of_kernel(&self) -> bool {
        self.names.last().is_some_and(|(address, _)| *address >= 1 << 63)
    }

    /// The same names elsewhere: a program that is loaded at `by`.
    #[must_use]
    pub fn shifted(self, by: u64) -> Self {
        Self::new(self.names.into_iter().map(|(at, name)| (at.wrapping_add(by), name)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_gives_code_its_names() {
        let text = "0000000000000000 A zero\nffffffff81000000 T _text\nffffffff81000040 t helper\n\
                    ffffffff81000080 D data\nnonsense\nffffffff81000040 T alias\tmodule\n";
        let symbols = Symbols::parse(text.as_bytes()).unwrap();
        assert_eq!(symbols.len(), 2);
        assert_eq!(symbols.at(0xffff_ffff_8100_0044), Some(("helper", 4)));
        assert_eq!(symbols.at(0xffff_ffff_8100_003f), Some(("_text", 0x3f)));
        assert_eq!(symbols.at(0xffff_ffff_80ff_ffff), None);
        assert_eq!(symbols.at(0xffff_ffff_8200_0044), None, "too far");
        assert_eq!(symbols.address("_text"), Some(0xffff_ffff_8100_0000));
    }

    #[test]
    fn own_program_has_symbols() {
        let symbols = Symbols::read(&std::env::current_exe().unwrap()).unwrap();
        assert!(symbols.len() > 100);
        let main = symbols.address("main").unwrap();
        assert_eq!(symbols.clone().shifted(0x1000).at(main + 0x1000), symbols.at(main));
    }

    #[test]
    fn files_without_symbols_are_refused_in_a_line() {
        for content in [&b"hello\n"[..], b"\x7fELF", b"\xff\xfe", b""] {
            let error = Symbols::parse(content).unwrap_err();
            assert!(!error.contains('\n') && !error.is_empty(), "{error}");
        }
        assert!(Symbols::read(Path::new("/nonexistent")).unwrap_err().contains("/nonexistent"));
    }
}
