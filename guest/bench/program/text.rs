//! What real programs do: compress, hash, sort, look up, compile, search.

use core::hint::black_box;

use crate::{Bench, Ctx, no_teardown, with_memory};

pub const BENCHES: &[Bench] = &[
    Bench { name: "sha256", ops: 4096, setup: text_setup, run: sha256, teardown: no_teardown },
    Bench { name: "lz", ops: LEN as u64, setup: text_setup, run: lz, teardown: no_teardown },
    Bench { name: "unlz", ops: LEN as u64, setup: packed_setup, run: unlz, teardown: no_teardown },
    Bench { name: "huffman", ops: LEN as u64, setup: text_setup, run: huffman, teardown: no_teardown },
    Bench { name: "qsort", ops: WORDS as u64, setup: text_setup, run: sort_words, teardown: no_teardown },
    Bench { name: "hashtable", ops: 4096, setup: text_setup, run: hash_table, teardown: no_teardown },
    Bench { name: "compile", ops: 256, setup: text_setup, run: compile, teardown: no_teardown },
    Bench { name: "search", ops: LEN as u64, setup: text_setup, run: search, teardown: no_teardown },
];

/// Bytes of the text.
const LEN: usize = 32 << 10;
/// Where the work area begins.
const WORK: usize = LEN;
const TOTAL: usize = 512 << 10;
const WORDS: usize = 2048;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Text of words that repeat as words do: small numbers are frequent.
fn text_setup() -> Result<Ctx, &'static str> {
    let mut ctx = with_memory(TOTAL)?;
    let text = &mut ctx.mem.slice::<u8>()[..LEN];
    let (mut random, mut at) = (Random(88_172_645_463_325_252), 0);
    while at < LEN {
        let rank = random.next() % 40;
        let mut word = Random(1 + rank * random.next() % (1 + rank * 20));
        let letters = 2 + word.next() % 8;
        for _ in 0..letters {
            if at < LEN {
                text[at] = b'a' + (word.next() % 26) as u8;
                at += 1;
            }
        }
        if at < LEN {
            text[at] = if random.next().is_multiple_of(12) { b'\n' } else { b' ' };
            at += 1;
        }
    }
    Ok(ctx)
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0100_0000_01b3)
}

// --- SHA-256 (FIPS 180-4) of 4 KiB ---

/// The first 64 primes' cube roots' fractions, computed at compile time by integer search.
const ROUND: [u32; 64] = {
    let (mut table, mut n, mut prime) = ([0u32; 64], 0, 2u128);
    while n < 64 {
        let (mut divisor, mut is_prime) = (2, true);
        while divisor * divisor <= prime {
            if prime % divisor == 0 {
                is_prime = false;
            }
            divisor += 1;
        }
        if is_prime {
            // floor(cbrt(prime) * 2^32): the largest x with x³ <= prime * 2^96.
            let (mut x, mut bit) = (0u128, 1u128 << 35);
            while bit != 0 {
                let y = x | bit;
                if y * y / (1 << 32) * y <= prime << 64 {
                    x = y;
                }
                bit >>= 1;
            }
            table[n] = x as u32;
            n += 1;
        }
        prime += 1;
    }
    table
};

const _: () = assert!(ROUND[0] == 0x428a_2f98 && ROUND[63] == 0xc671_78f2);

fn sha256_block(state: &mut [u32; 8], block: &[u8]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    for i in 16..64 {
        let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ (w[i - 15] >> 3);
        let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for i in 0..64 {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let t1 =
            h.wrapping_add(s1).wrapping_add((e & f) ^ (!e & g)).wrapping_add(ROUND[i]).wrapping_add(w[i]);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    for (slot, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *slot = slot.wrapping_add(value);
    }
}

fn sha256(ctx: &mut Ctx, n: u64) -> u64 {
    let mut state = [0u32; 8];
    for _ in 0..n {
        state = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a,
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        black_box(&ctx.mem.slice::<u8>()[..4096])
            .chunks_exact(64)
            .for_each(|block| sha256_block(&mut state, block));
    }
    u64::from(state[0]) << 32 | u64::from(state[7])
}

// --- LZ77, in the manner of LZ4: a token, literals, a 16-bit distance ---

fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Packs `text` into `out`; the table has 4096 places. Returns the packed length.
fn pack(text: &[u8], out: &mut [u8], table: &mut [u16]) -> usize {
    table.fill(0);
    let (mut at, mut literals, mut len) = (0, 0, 0);
    while at + 4 < text.len() {
        let word = word_at(text, at);
        let slot = (word.wrapping_mul(2_654_435_761) >> 20) as usize;
        let candidate = usize::from(table[slot]);
        table[slot] = at as u16;
        if candidate >= at || word_at(text, candidate) != word || at - literals == 255 {
            if at - literals == 255 {
                len = put(out, len, &text[literals..at], 0, 0);
                literals = at;
            }
            at += 1;
            continue;
        }
        let longest = (text.len() - at).min(255);
        let run = (4..longest).find(|&i| text[candidate + i] != text[at + i]).unwrap_or(longest);
        len = put(out, len, &text[literals..at], run, at - candidate);
        at += run;
        literals = at;
    }
    put(out, len, &text[literals..], 0, 0)
}

fn put(out: &mut [u8], at: usize, literals: &[u8], run: usize, distance: usize) -> usize {
    out[at] = literals.len() as u8;
    out[at + 1] = run as u8;
    out[at + 2..at + 4].copy_from_slice(&(distance as u16).to_le_bytes());
    out[at + 4..at + 4 + literals.len()].copy_from_slice(literals);
    at + 4 + literals.len()
}

fn unpack(packed: &[u8], out: &mut [u8]) -> usize {
    let (mut at, mut len) = (0, 0);
    while at + 4 <= packed.len() {
        let (literals, run) = (usize::from(packed[at]), usize::from(packed[at + 1]));
        let distance = usize::from(packed[at + 2]) | usize::from(packed[at + 3]) << 8;
        out[len..len + literals].copy_from_slice(&packed[at + 4..at + 4 + literals]);
        len += literals;
        at += 4 + literals;
        for _ in 0..run {
            out[len] = out[len - distance];
            len += 1;
        }
    }
    len
}

const PACKED: usize = WORK + 16384;

fn lz(ctx: &mut Ctx, n: u64) -> u64 {
    let (text, work) = ctx.mem.slice::<u8>().split_at_mut(LEN);
    let (table, out) = work.split_at_mut(16384);
    // SAFETY: page-aligned, and every bit pattern is a u16.
    let table = unsafe { core::slice::from_raw_parts_mut(table.as_mut_ptr().cast::<u16>(), 4096) };
    let mut len = 0;
    for _ in 0..n {
        len = pack(black_box(&text[..]), out, table);
    }
    out[..len].iter().fold(len as u64, |hash, byte| mix(hash, u64::from(*byte)))
}

/// The last eight bytes of memory hold the packed length.
fn packed_setup() -> Result<Ctx, &'static str> {
    let mut ctx = text_setup()?;
    lz(&mut ctx, 1);
    let (text, work) = ctx.mem.slice::<u8>().split_at_mut(LEN);
    let (table, out) = work.split_at_mut(16384);
    // SAFETY: as in `lz`.
    let table = unsafe { core::slice::from_raw_parts_mut(table.as_mut_ptr().cast::<u16>(), 4096) };
    let len = pack(text, out, table) as u64;
    ctx.mem.slice::<u8>()[TOTAL - 8..].copy_from_slice(&len.to_le_bytes());
    Ok(ctx)
}

fn unlz(ctx: &mut Ctx, n: u64) -> u64 {
    let len = ctx.mem.slice::<u64>()[TOTAL / 8 - 1] as usize;
    let (head, out) = ctx.mem.slice::<u8>().split_at_mut(TOTAL / 2);
    let mut unpacked = 0;
    for _ in 0..n {
        unpacked = unpack(black_box(&head[PACKED..PACKED + len]), out);
    }
    u64::from(head[..LEN] == out[..unpacked])
}

// --- Huffman coding of order 0 ---

/// Code lengths by repeatedly joining the two rarest of at most 256 symbols.
fn code_lengths(counts: &[u32; 256]) -> [u8; 256] {
    let (mut weight, mut parent) = ([u32::MAX; 512], [0u16; 512]);
    weight[..256]
        .iter_mut()
        .zip(counts)
        .for_each(|(slot, &count)| *slot = if count == 0 { u32::MAX } else { count });
    let mut next = 256;
    loop {
        let (mut first, mut second) = (511, 511);
        for i in 0..next {
            if weight[i] < weight[first] {
                (second, first) = (first, i);
            } else if weight[i] < weight[second] {
                second = i;
            }
        }
        if second == 511 {
            break;
        }
        weight[next] = weight[first] + weight[second];
        (weight[first], weight[second]) = (u32::MAX, u32::MAX);
        (parent[first], parent[second]) = (next as u16, next as u16);
        next += 1;
    }
    let mut lengths = [0u8; 256];
    for symbol in 0..256 {
        let mut node = symbol;
        while parent[node] != 0 {
            node = usize::from(parent[node]);
            lengths[symbol] += 1;
        }
    }
    lengths
}

fn huffman(ctx: &mut Ctx, n: u64) -> u64 {
    let (text, out) = ctx.mem.slice::<u8>().split_at_mut(LEN);
    let mut len = 0;
    for _ in 0..n {
        let mut counts = [0u32; 256];
        black_box(&text[..]).iter().for_each(|&byte| counts[usize::from(byte)] += 1);
        let lengths = code_lengths(&counts);
        let (mut codes, mut code) = ([0u32; 256], 0u32);
        for bits in 1..32 {
            for symbol in (0..256).filter(|&symbol| lengths[symbol] == bits) {
                codes[symbol] = code;
                code += 1;
            }
            code <<= 1;
        }
        let (mut buffer, mut filled) = (0u64, 0u32);
        len = 0;
        for &byte in text.iter() {
            let bits = u32::from(lengths[usize::from(byte)]);
            buffer = buffer << bits | u64::from(codes[usize::from(byte)]);
            filled += bits;
            while filled >= 8 {
                filled -= 8;
                out[len] = (buffer >> filled) as u8;
                len += 1;
            }
        }
    }
    out[..len].iter().fold(len as u64, |hash, byte| mix(hash, u64::from(*byte)))
}

// --- Quicksort of words ---

/// The rest of the text from `at` to the end of its word.
fn word_from(text: &[u8], at: u16) -> &[u8] {
    let rest = &text[usize::from(at)..];
    &rest[..rest.iter().position(|&byte| byte <= b' ').unwrap_or(rest.len())]
}

fn quicksort(text: &[u8], mut words: &mut [u16]) {
    while words.len() > 8 {
        let pivot = words[words.len() / 2];
        let (mut low, mut high) = (0, words.len() - 1);
        loop {
            while word_from(text, words[low]) < word_from(text, pivot) {
                low += 1;
            }
            while word_from(text, words[high]) > word_from(text, pivot) {
                high -= 1;
            }
            if low >= high {
                break;
            }
            words.swap(low, high);
            low += 1;
            high -= 1;
        }
        let (left, right) = words.split_at_mut(low);
        let (small, large) = if left.len() < right.len() { (left, right) } else { (right, left) };
        quicksort(text, small);
        words = large;
    }
    for i in 1..words.len() {
        let mut j = i;
        while j > 0 && word_from(text, words[j]) < word_from(text, words[j - 1]) {
            words.swap(j, j - 1);
            j -= 1;
        }
    }
}

fn sort_words(ctx: &mut Ctx, n: u64) -> u64 {
    let (text, _) = ctx.mem.slice::<u8>().split_at_mut(LEN);
    let text = &*text;
    let mut sorted = [0u16; WORDS];
    for _ in 0..n {
        let starts = (0..LEN - 1).filter(|&at| at == 0 || text[at - 1] <= b' ').map(|at| at as u16);
        sorted.iter_mut().zip(starts).for_each(|(slot, at)| *slot = at);
        quicksort(black_box(text), &mut sorted);
    }
    let ordered = sorted.windows(2).all(|pair| word_from(text, pair[0]) <= word_from(text, pair[1]));
    let hash =
        sorted.iter().flat_map(|&at| word_from(text, at)).fold(0, |hash, &byte| mix(hash, u64::from(byte)));
    hash << 1 | u64::from(ordered)
}

// --- A hash table with open addressing: 2048 insertions, 2048 searches ---

fn hash_table(ctx: &mut Ctx, n: u64) -> u64 {
    let slots = &mut ctx.mem.slice::<u64>()[TOTAL / 32..][..8192];
    let mut found = 0;
    for _ in 0..n {
        slots.fill(0);
        let mut random = Random(0x1234_5678_9abc_def1);
        for _ in 0..2048 {
            let key = random.next() | 1;
            let place = probe(slots, key);
            slots[place] = key;
        }
        let mut random = Random(0x1234_5678_9abc_def1);
        found = 0;
        for i in 0..2048u64 {
            let key = (random.next() | 1) ^ (i & 2);
            found += u64::from(slots[probe(slots, key)] == key);
        }
    }
    found
}

fn probe(slots: &[u64], key: u64) -> usize {
    let mut place = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 51) as usize;
    while slots[place] != 0 && slots[place] != key {
        place = (place + 1) & (slots.len() - 1);
    }
    place
}

// --- A compiler: 256 expressions are read, folded, turned into code for a stack machine ---

struct Compiler<'a> {
    source: &'a [u8],
    at: usize,
    code: &'a mut [u8],
    len: usize,
}

impl Compiler<'_> {
    fn peek(&self) -> u8 {
        self.source.get(self.at).copied().unwrap_or(0)
    }

    fn emit(&mut self, op: u8) {
        self.code[self.len] = op;
        self.len += 1;
    }

    /// Sums of products of factors; a value that is known is folded.
    fn sum(&mut self) -> Option<u64> {
        let mut value = self.product();
        while matches!(self.peek(), b'+' | b'-') {
            let op = self.peek();
            self.at += 1;
            let right = self.product();
            value = match (value, right) {
                (Some(a), Some(b)) if op == b'+' => Some(a.wrapping_add(b)),
                (Some(a), Some(b)) => Some(a.wrapping_sub(b)),
                _ => {
                    self.emit(op);
                    None
                }
            };
        }
        value
    }

    fn product(&mut self) -> Option<u64> {
        let mut value = self.factor();
        while self.peek() == b'*' {
            self.at += 1;
            value = match (value, self.factor()) {
                (Some(a), Some(b)) => Some(a.wrapping_mul(b)),
                _ => {
                    self.emit(b'*');
                    None
                }
            };
        }
        value
    }

    fn factor(&mut self) -> Option<u64> {
        match self.peek() {
            b'(' => {
                self.at += 1;
                let value = self.sum();
                self.at += 1;
                value
            }
            b'0'..=b'9' => {
                let mut value = 0u64;
                while self.peek().is_ascii_digit() {
                    value = value.wrapping_mul(10).wrapping_add(u64::from(self.peek() - b'0'));
                    self.at += 1;
                }
                Some(value)
            }
            name => {
                self.at += 1;
                self.emit(b'v');
                self.emit(name);
                None
            }
        }
    }
}

/// Writes an expression of the given depth.
fn write_expression(random: &mut Random, out: &mut [u8], at: &mut usize, depth: u32) {
    let mut put = |byte: u8| {
        out[*at] = byte;
        *at += 1;
    };
    if depth == 0 {
        let choice = random.next();
        if choice.is_multiple_of(3) {
            put(b'a' + (choice >> 8) as u8 % 26);
        } else {
            put(b'1' + (choice >> 16) as u8 % 9);
            put(b'0' + (choice >> 24) as u8 % 10);
        }
        return;
    }
    put(b'(');
    write_expression(random, out, at, depth - 1);
    out[*at] = [b'+', b'-', b'*'][(random.next() % 3) as usize];
    *at += 1;
    write_expression(random, out, at, depth - 1);
    out[*at] = b')';
    *at += 1;
}

fn compile(ctx: &mut Ctx, n: u64) -> u64 {
    let (source, code) = ctx.mem.slice::<u8>()[WORK..].split_at_mut(65536);
    let (mut random, mut end) = (Random(99), 0);
    for _ in 0..256 {
        write_expression(&mut random, source, &mut end, 4);
        source[end] = b';';
        end += 1;
    }
    let mut hash = 0;
    for _ in 0..n {
        let mut compiler = Compiler { source: black_box(&source[..end]), at: 0, code, len: 0 };
        hash = 0;
        while compiler.at < end {
            hash = mix(hash, compiler.sum().unwrap_or(1));
            compiler.at += 1;
        }
        hash = mix(hash, compiler.len as u64);
    }
    hash
}

// --- A search for a word, byte by byte ---

fn search(ctx: &mut Ctx, n: u64) -> u64 {
    let text = &ctx.mem.slice::<u8>()[..LEN];
    let mut found = 0;
    for _ in 0..n {
        let needle = black_box(&b"zqx"[..]);
        found = 0;
        for at in 0..text.len() - needle.len() {
            if text[at] == needle[0] && text[at..at + needle.len()] == *needle {
                found += 1;
            }
            found += u64::from(text[at] == b'\n' && text[at + 1] == b'a') << 16;
        }
    }
    found
}
