//! A kernel's table of its own symbols, in the read-only data of an image that has no other (Linux, `kernel/kallsyms.c`,
//! `scripts/kallsyms.c`).
//!
//! Names are strings of tokens; the token table is found by what every kernel has in it, the tokens of the ten digits in a row. In front of it
//! lie the markers (one offset into the names for each 256), the names, their number. The addresses lie before that
//! (up to Linux 6.3) or behind the token index (later): offsets of 4 bytes from a base. Every step checks what it found; a guest's kernel
//! is a file like any other.

/// The tokens `0` to `9`.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// How long before the token table the names may begin.
const FARTHEST: usize = 64 << 20;
/// Symbols at most.
const MAX_SYMBOLS: usize = 1 << 22;
/// Kernels of 64 bits live above.
const LOWEST: u64 = 0xffff_ffff_8000_0000;

/// The code symbols of a kernel's image, or `None` if there is no such table in it.
#[must_use]
pub fn find(image: &[u8]) -> Option<Vec<(u64, String)>> {
    let mut from = 0;
    while let Some(at) = position(image, DIGITS, from) {
        if let Some(symbols) = Tables::around(image, at).and_then(|tables| tables.symbols()) {
            return Some(symbols);
        }
        from = at + 1;
    }
    None
}

fn position(image: &[u8], wanted: &[u8], from: usize) -> Option<usize> {
    let rest = image.get(from..)?;
    rest.windows(wanted.len()).position(|window| window == wanted).map(|at| from + at)
}

struct Tables<'a> {
    image: &'a [u8],
    tokens: Vec<&'a [u8]>,
    /// Where the names begin, and their number's place.
    names: usize,
    count_at: usize,
    count: usize,
    /// Where the token index ends.
    end: usize,
}

impl<'a> Tables<'a> {
    /// `digits` is where the token `0` begins.
    fn around(image: &'a [u8], digits: usize) -> Option<Self> {
        let start = token_start(image, digits)?;
        let tokens = tokens(image, start)?;
        let last = tokens.last()?;
        let index = aligned(start + tokens.iter().map(|token| token.len() + 1).sum::<usize>(), 8);
        // The index says where each token begins.
        let offset = last.as_ptr() as usize - image.as_ptr() as usize - start;
        (usize::from(u16_at(image, index + 2 * 255)?) == offset).then_some(())?;
        let (count_at, count) = count(image, start)?;
        Some(Self { image, tokens, names: count_at + 8, count_at, count, end: index + 512 })
    }

    fn symbols(&self) -> Option<Vec<(u64, String)>> {
        let (offsets, base) = self.addresses()?;
        let offset = |n: usize| Some(u32_at(self.image, offsets + 4 * n)?.cast_signed());
        let per_cpu = (0..self.count).filter_map(offset).any(|offset| offset < 0);
        let mut symbols = Vec::new();
        let mut at = self.names;
        for n in 0..self.count {
            let (name, next) = self.name(at)?;
            at = next;
            let offset = offset(n)?;
            let address = match (per_cpu, offset) {
                // With absolute addresses of per-CPU data, offsets below zero are relative.
                (true, 0..) => continue,
                (true, _) => base.wrapping_sub(1).wrapping_add_signed(-i64::from(offset)),
                (false, _) => base.wrapping_add(u64::from(offset.cast_unsigned())),
            };
            let (kind, name) = name.split_at_checked(1)?;
            if "tTwW".contains(kind) && address >= LOWEST {
                symbols.push((address, name.to_owned()));
            }
        }
        (!symbols.is_empty()).then_some(symbols)
    }

    /// A name with the letter of its kind before it, and where the next is.
    fn name(&self, at: usize) -> Option<(String, usize)> {
        let (len, at) = name_len(self.image, at)?;
        let mut name = String::new();
        for token in self.image.get(at..at + len)? {
            name.push_str(std::str::from_utf8(self.tokens.get(usize::from(*token))?).ok()?);
        }
        Some((name, at + len))
    }

    /// Where the offsets begin, and what they are relative to.
    fn addresses(&self) -> Option<(usize, u64)> {
        let is_base = |base: &u64| (LOWEST..u64::MAX).contains(base);
        let len = aligned(4 * self.count, 8);
        if let Some(base) = self.count_at.checked_sub(8).and_then(|at| u64_at(self.image, at)).filter(is_base)
        {
            return Some(((self.count_at - 8).checked_sub(len)?, base));
        }
        let offsets = aligned(self.end, 8);
        let base = u64_at(self.image, offsets + len).filter(is_base)?;
        Some((offsets, base))
    }
}

const fn aligned(at: usize, to: usize) -> usize {
    at.next_multiple_of(to)
}

/// The token of byte 0 lies 48 tokens before that of `0`.
fn token_start(image: &[u8], digits: usize) -> Option<usize> {
    let mut at = digits;
    for _ in 0..usize::from(b'0') {
        // Behind the zero that ends the token before the one before.
        let end = at.checked_sub(1)?;
        (*image.get(end)? == 0).then_some(())?;
        at = image.get(..end)?.iter().rposition(|byte| *byte == 0)? + 1;
        (end - at < 256).then_some(())?;
    }
    // The first may be preceded by padding only.
    Some(at)
}

fn tokens(image: &[u8], start: usize) -> Option<Vec<&[u8]>> {
    let mut tokens = Vec::new();
    let mut at = start;
    for _ in 0..256 {
        let rest = image.get(at..(at + 256).min(image.len()))?;
        let len = rest.iter().position(|byte| *byte == 0)?;
        tokens.push(&rest[..len]);
        at += len + 1;
    }
    Some(tokens)
}

fn name_len(image: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*image.get(at)?);
    if first < 0x80 {
        return Some((first, at + 1));
    }
    Some((first & 0x7f | usize::from(*image.get(at + 1)?) << 7, at + 2))
}

/// The number of symbols lies 8 bytes before the names, and markers that fit them behind them. Between those and the token table there may be
/// more (Linux 6.2, `kallsyms_seqs_of_names`), so places are tried. Returns the place, and the number.
fn count(image: &[u8], tokens: usize) -> Option<(usize, usize)> {
    let nearest = tokens / 8;
    (nearest.saturating_sub(FARTHEST / 8)..nearest).rev().map(|n| n * 8).find_map(|at| {
        let count = usize::try_from(u64_at(image, at)?).ok()?;
        let may_be = (1..=MAX_SYMBOLS).contains(&count) && at + 8 + 2 * count <= tokens;
        (may_be && names_fit(image, at + 8, tokens, count)).then_some((at, count))
    })
}

/// Whether names from `start` on end before `limit`, and are followed by the offset of each 256th.
fn names_fit(image: &[u8], start: usize, limit: usize, count: usize) -> bool {
    let mut at = start;
    let mut marks = Vec::new();
    for n in 0..count {
        if n % 256 == 0 {
            marks.push(at - start);
        }
        match name_len(image, at) {
            Some((len, next)) if len > 0 && next + len <= limit => at = next + len,
            _ => return false,
        }
    }
    let is_marked = |markers: usize| {
        marks
            .iter()
            .enumerate()
            .all(|(n, mark)| u32_at(image, markers + 4 * n).is_some_and(|m| m as usize == *mark))
    };
    // One marker is a zero, of which there are many.
    let in_front = count > 256 || aligned(at, 8) + 8 == limit;
    in_front && (is_marked(aligned(at, 8)) || is_marked(aligned(at, 4)))
}

fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    fn pad(image: &mut Vec<u8>) {
        image.resize(image.len().next_multiple_of(8), 0);
    }

    /// Tables of `count` symbols as Linux up to 6.3 has them, or later ones.
    fn image(count: u32, later: bool) -> Vec<u8> {
        let mut image = vec![0xaa; 64];
        let addresses = |image: &mut Vec<u8>| {
            (0..count).for_each(|n| image.extend((-1 - (n as i32) * 16).to_le_bytes()));
            pad(image);
            image.extend(BASE.to_le_bytes());
        };
        if !later {
            addresses(&mut image);
        }
        image.extend(u64::from(count).to_le_bytes());
        let start = image.len();
        let mut marks = Vec::new();
        for n in 0..count {
            if n % 256 == 0 {
                marks.push(u32::try_from(image.len() - start).unwrap());
            }
            // Token 1 is `Tsym_`.
            let digits = n.to_string();
            image.push(u8::try_from(digits.len() + 1).unwrap());
            image.push(1);
            image.extend(digits.bytes());
        }
        pad(&mut image);
        marks.iter().for_each(|mark| image.extend(mark.to_le_bytes()));
        pad(&mut image);
        let start = image.len();
        let mut index = Vec::new();
        for token in 0..=255u8 {
            index.extend(u16::try_from(image.len() - start).unwrap().to_le_bytes());
            match token {
                1 => image.extend(b"Tsym_"),
                b'0'..=b'9' => image.push(token),
                _ => image.extend(b"ab"),
            }
            image.push(0);
        }
        pad(&mut image);
        image.extend(index);
        pad(&mut image);
        if later {
            addresses(&mut image);
        }
        image.extend([0; 64]);
        image
    }

    #[test]
    fn both_layouts_are_read() {
        for (count, later) in [(5, false), (600, false), (512, true), (5, true)] {
            let symbols = find(&image(count, later)).expect("there is a table");
            assert_eq!(symbols.len(), count as usize, "{count} {later}");
            assert_eq!(symbols[3], (BASE + 48, "sym_3".to_owned()));
        }
    }

    #[test]
    fn damage_is_no_panic() {
        let whole = image(300, false);
        for cut in (0..whole.len()).step_by(7) {
            let _ = find(&whole[..cut]);
            let mut damaged = whole.clone();
            damaged[cut] ^= 0x55;
            let _ = find(&damaged);
        }
        assert_eq!(find(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0"), None);
    }
}
