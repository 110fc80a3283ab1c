//! Any guest bytes with any facts become a fragment that touches nothing but what it may.
//!
//! For every input: forming and translating do not panic; the code is bounded ([`MAX_BYTES`]), consists of whole instructions and numbers
//! from its first byte to its last (`bt::listing`), and whatever the engine is told about it lies at an instruction; and the verifier
//! ([`verify`]) proves INV-BT-3.

mod pairs;
mod verify;

use bt::hints::Form;
use bt::listing::{Part, parts};
use bt::unit::{MAX_INSTRUCTIONS, MAX_LEN, Reader, Unit, form_crossing};
use bt::{Facts, FpLevel, Fragment, Legacy, TimeStamp, Variant, translate};

use crate::input::Input;

/// Host bytes that one guest instruction may become, its misses and exits included, and what a fragment has besides.
const MAX_BYTES: (usize, usize) = (512, 256);

/// Translates the unit that the input describes, and checks the fragment.
pub fn target(data: &[u8]) {
    let mut input = Input::new(data);
    let facts = facts(&mut input);
    let mut page = [0u8; 4096];
    let offset =
        usize::from(if input.byte() & 3 == 0 { 4096 - input.below(60) } else { input.below(4096) }) & 0xfff;
    if input.byte() & 1 == 0 {
        let end = (offset + 512).min(4096);
        input.fill(&mut page[offset..end]);
    } else {
        plausible(&mut input, &mut page[offset..], facts.legacy.is_some());
    }
    let mut next = [0; MAX_LEN];
    input.fill(&mut next);
    let limit = 1 + usize::from(input.byte() % 64);
    let announce = !input.byte().is_multiple_of(16);
    let mut reader = Reader::new(&page, facts.decoding());
    let unit = reader.form(offset, limit);
    let crossing = form_crossing(&page, &next, offset, facts.decoding());
    let adapt = if facts.legacy.is_none() { input.byte() } else { 0 };
    for mut unit in [unit, crossing] {
        hint(&mut unit, adapt);
        if !unit.instructions.is_empty() {
            let fragment = translate(&unit, &mut reader, facts, 1000, 2000, &|_| announce);
            check(&unit, &fragment, facts);
        }
    }
}

/// Hints of the kinds that `adapt` names, for instructions by their place; for none if it is 0.
fn hint(unit: &mut Unit, adapt: u8) {
    let forms = [Form::Alone, Form::Halves, Form::Direct];
    for i in &unit.instructions {
        for (n, form) in forms.into_iter().enumerate() {
            if (adapt >> n) & 1 != 0 && (adapt >> 3 == 31 || (i.ip() ^ u64::from(adapt >> 3)) & 3 != 0) {
                unit.hints.add(i.ip16(), form);
            }
        }
    }
}

fn facts(input: &mut Input<'_>) -> Facts {
    let bits = input.byte();
    let variant = [Variant::Supervisor, Variant::SupervisorAc, Variant::User][usize::from(input.byte() % 3)];
    let fp = [FpLevel::None, FpLevel::X87, FpLevel::Sse, FpLevel::Avx, FpLevel::Avx512]
        [usize::from(input.byte() % 5)];
    let pages = [0, 0xffff_ffff_8123_4000, 0x7fff_ffff_f000, !0xfff, 0x40_0000, 1 << 63];
    let known = variant != Variant::User || bits & 64 != 0;
    let segments = input.byte();
    let legacy = (segments & 3 == 0).then_some(Legacy {
        bits16: segments & 4 != 0,
        flat_code: segments & 8 != 0 && segments & 4 == 0,
        flat_data: segments & 16 != 0,
        wide_stack: segments & 32 != 0,
    });
    // The engine finds such code by its frame, at whatever address.
    let known = known && legacy.is_none();
    Facts {
        page_rip: known.then(|| pages[usize::from(input.byte()) % pages.len()]),
        variant,
        fp,
        amd: bits & 1 != 0,
        syscall: bits & 2 != 0,
        smap: bits & 4 != 0,
        fsgsbase: bits & 8 != 0,
        rdtsc: if bits & 16 != 0 { TimeStamp::Inline } else { TimeStamp::Callout },
        bmi2: bits & 32 != 0,
        plain: bits & 128 != 0,
        legacy,
    }
}

/// Code as compilers make it: many accesses off few bases. Random bytes seldom share a check.
fn plausible(input: &mut Input<'_>, code: &mut [u8], legacy: bool) {
    // What 16- and 32-bit code has in place of REX: a segment prefix that changes nothing where data is flat.
    let prefix = |rex: u8| if legacy { 0x3e } else { rex };
    let mut at = 0;
    let bases = input.byte();
    while at + 16 < code.len().min(600) {
        let mut put = |bytes: &[u8]| {
            code[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        let (a, b) = (input.byte(), input.byte());
        let rex = 0x48 | (a >> 4 & 7);
        let operations = [0x8b, 0x89, 0x03, 0x01, 0x3b, 0x39, 0x33, 0x85, 0x87, 0x63, 0x8d];
        // ModRM with one of four bases, one of them RSP's number (a SIB byte follows).
        let rm = [bases & 7, bases >> 3 & 7, 4, 5][usize::from(b & 3)];
        let reg = b >> 2 & 7;
        let disp = input.byte() & if a & 1 == 0 { 0x3f } else { 0xff };
        let sib = if a & 2 == 0 { 0x24 } else { input.byte() };
        match a % 16 {
            0 => put(&[prefix(0x41), 0x50 | reg]),
            1 => put(&[0x50 | reg]),
            2 => put(&[0x58 | reg]),
            3 => put(&[prefix(0x41), 0x58 | reg]),
            4 => put(&[prefix(rex & 0x49), 0x83, 0xc0 | (b & 0x28) | rm, disp]),
            5 => put(&[prefix(rex & 0x49), 0xff, 0xc0 | (b & 8) | rm]),
            6 => put(&[0x70 | reg, disp & 0x1f]),
            7 => {
                let op = [0x10, 0x11, 0x28, 0x29, 0x58, 0x59][usize::from(b) % 6];
                put(&[prefix(rex), 0x0f, op, 0x40 | reg << 3 | if rm == 4 { 5 } else { rm }, disp]);
            }
            8 => put(&[0x0f, 0x01, if b & 1 == 0 { 0xcb } else { 0xca }]),
            9 => put(&[prefix(rex), 0x8b, reg << 3 | 5, disp, 0, 0, 0]),
            10 if b & 8 == 0 => put(&[0xe8, disp, 0, 0, 0]),
            _ => {
                let op = operations[usize::from(input.byte()) % operations.len()];
                let modrm = if a & 8 == 0 { 0x40 } else { 0 } | reg << 3 | rm;
                put(&[prefix(rex), op, modrm]);
                if rm == 4 {
                    put(&[sib]);
                }
                match (modrm & 0x40, rm, sib & 7) {
                    (0x40, ..) => put(&[disp]),
                    (_, 5, _) | (_, 4, 5) => put(&[disp, 0, 0, 0]),
                    _ => {}
                }
            }
        }
    }
}

/// What holds of every fragment.
fn check(unit: &Unit, f: &Fragment, facts: Facts) {
    let guests = unit.instructions.len();
    assert!((1..=MAX_INSTRUCTIONS).contains(&guests));
    assert!(
        f.code.len() <= MAX_BYTES.0 * guests + MAX_BYTES.1,
        "{} bytes for {guests} instructions",
        f.code.len()
    );
    let parts = parts(&f.code).expect("the code consists of instructions and numbers");
    let starts: Vec<usize> =
        parts.iter().filter(|p| matches!(p, Part::Instruction(_))).map(Part::offset).collect();
    let is_start = |at: usize| starts.binary_search(&at).is_ok();
    for at in [0, f.inner, f.stale_inner] {
        assert!(is_start(at), "an entry at {at:#x} is no instruction");
    }
    assert!(facts.page_rip.is_some() || is_start(f.stale_outer));
    assert!(f.inner <= f.leave && f.leave <= f.straight && f.straight <= f.stale_inner);
    // Dropping a fragment puts a jump of five bytes at each entry, in front of the code that leaves.
    assert!(f.inner == 0 || f.inner >= 5);
    assert!(f.stale_inner >= f.inner + 5);
    assert_eq!(f.map.len(), guests);
    for (place, i) in f.map.iter().zip(&unit.instructions) {
        assert_eq!(u64::from(place.guest), i.ip());
        assert!(place.host as usize <= f.leave);
    }
    assert!(f.map.windows(2).all(|w| w[0].host <= w[1].host));
    for site in &f.sites {
        assert!(site.done == 0 || is_start(usize::from(site.done)), "a site goes on inside an instruction");
        assert!(usize::from(site.guest) < 4096 && usize::from(site.len) <= MAX_LEN);
    }
    for exit in &f.exits {
        if let Some(place) = exit.place {
            let place = place as usize;
            let jump = starts.partition_point(|s| *s < place);
            let end = place + 4;
            assert!(jump > 0 && (is_start(end) || end == f.code.len()), "a link is no jump's end");
            let opcode = &f.code[starts[jump - 1]..place];
            assert!(matches!(opcode, [0xe8 | 0xe9] | [0x0f, 0x80..=0x8f]), "a link is no jump: {opcode:x?}");
            let known = facts.page_rip.is_some();
            assert!(
                known || (0..4096).contains(&exit.target),
                "a link to another page from code that does not know its own"
            );
        }
    }
    verify::verify(unit, f, &parts, facts.legacy.is_some());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fragment of `mov rax, [rbx]` and `mov rcx, [rbx + 8]`, with `from` replaced by `to` in its code.
    fn check_with(from: &[u8], to: &[u8]) {
        check_hinted(from, to, 0);
    }

    /// The same with hints.
    fn check_hinted(from: &[u8], to: &[u8], adapt: u8) {
        let mut page = [0x90; 4096];
        page[..8].copy_from_slice(&[0x48, 0x8b, 0x03, 0x48, 0x89, 0x4b, 0x08, 0xc3]);
        let facts = facts(&mut Input::new(&[0x20, 0, 0, 1, 1]));
        let mut reader = Reader::new(&page, facts.decoding());
        let mut unit = reader.form(0, 3);
        hint(&mut unit, adapt);
        let mut f = translate(&unit, &mut reader, facts, 0, 0, &|_| true);
        let at = f.code.windows(from.len()).position(|w| w == from).expect("the code is there");
        f.code[at..at + to.len()].copy_from_slice(to);
        check(&unit, &f, facts);
    }

    #[test]
    fn verifier_takes_what_the_translator_makes() {
        check_with(&[0x4a, 0x8b, 0x04, 0x3b], &[0x4a, 0x8b, 0x04, 0x3b]);
    }

    #[test]
    #[should_panic(expected = "INV-BT-3")]
    fn verifier_refuses_a_check_of_fewer_bytes() {
        // cmp r14, 0ff0h → 0ff1h: 15 bytes of 16.
        check_with(&[0x49, 0x81, 0xfe, 0xf0, 0x0f], &[0x49, 0x81, 0xfe, 0xf1, 0x0f]);
    }

    #[test]
    fn verifier_takes_second_forms() {
        check_hinted(&[0x41, 0xbf, 8, 0], &[0x41, 0xbf, 8, 0], 0xfa);
    }

    #[test]
    #[should_panic(expected = "INV-BT-3")]
    fn verifier_refuses_a_copy_of_fewer_bytes() {
        // mov r15d, 8 → 7, in front of the call that brings both pages' bytes together.
        check_hinted(&[0x41, 0xbf, 8, 0], &[0x41, 0xbf, 7, 0], 0xfa);
    }

    #[test]
    #[should_panic(expected = "INV-BT-3")]
    fn verifier_refuses_another_displacement() {
        // mov [rbx + r15 + 8], rcx → [rbx + r15 + 9]
        check_with(&[0x4a, 0x89, 0x4c, 0x3b, 0x08], &[0x4a, 0x89, 0x4c, 0x3b, 0x09]);
    }

    /// The fragment of `call` and of `ret`, with `from` replaced by `to` in its code.
    fn check_call(from: &[u8], to: &[u8]) {
        for guest in [&[0xe8, 0x20, 0, 0, 0][..], &[0xc3]] {
            let mut page = [0x90; 4096];
            page[..guest.len()].copy_from_slice(guest);
            let facts = facts(&mut Input::new(&[0x20, 0, 0, 1, 1]));
            let mut reader = Reader::new(&page, facts.decoding());
            let unit = reader.form(0, 3);
            let mut f = translate(&unit, &mut reader, facts, 0, 0, &|_| true);
            if let Some(at) = f.code.windows(from.len()).position(|w| w == from) {
                f.code[at..at + to.len()].copy_from_slice(to);
            }
            check(&unit, &f, facts);
        }
    }

    #[test]
    fn verifier_takes_pairs() {
        check_call(&[0xc3], &[0xc3]);
    }

    #[test]
    #[should_panic(expected = "pairs are dropped where there was room")]
    fn verifier_refuses_a_pair_without_room() {
        // cmp rsp, gs:[PAIRS_END]; jbe → ja
        check_call(&[0x0f, 0x86], &[0x0f, 0x87]);
    }

    #[test]
    #[should_panic(expected = "half a pair")]
    fn verifier_refuses_half_a_pair() {
        // lea rsp, [rsp + 8] → a NOP
        check_call(&[0x48, 0x8d, 0x64, 0x24, 8], &[0x0f, 0x1f, 0x44, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "a return that was not compared")]
    fn verifier_refuses_a_return_to_another_address() {
        // cmp [rsp + 8], r14 → a NOP
        check_call(&[0x4c, 0x39, 0x74, 0x24, 8], &[0x0f, 0x1f, 0x44, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "INV-BT-3")]
    fn verifier_refuses_another_base() {
        // mov rax, [rbx + r15] → [rbp + …]
        check_with(&[0x4a, 0x8b, 0x04, 0x3b], &[0x4a, 0x8b, 0x04, 0x3a]);
    }
}
