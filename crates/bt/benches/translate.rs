//! How long translation takes: the units of real code (this program's own), as an engine would ask for them.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use bt::unit::{self, Reader};
use bt::{Facts, Variant, translate};

/// Pages of code.
const PAGES: usize = 16;

const FACTS: Facts = Facts { variant: Variant::User, ..Facts::MODERN };

/// Pages of this program's code: those around a function that is surely there.
fn pages() -> Vec<[u8; 4096]> {
    let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let text = &program[..];
    text.as_chunks::<4096>().0.iter().filter(|p| is_code(p)).take(PAGES).copied().collect()
}

/// Translates what lies in a page from its first byte on; the number of guest instructions.
fn whole(page: &[u8; 4096]) -> usize {
    let (mut at, mut count) = (0, 0);
    while at < 4096 {
        let mut reader = Reader::new(page, FACTS.decoding());
        let unit = reader.form(at, unit::MAX_INSTRUCTIONS);
        if unit.instructions.is_empty() {
            at += 1;
            continue;
        }
        at = unit.end;
        count += translate(&unit, &mut reader, FACTS, 0, 0, &|_| true).map.len();
    }
    count
}

/// Whether a page may be code: it has many calls and few zeros.
fn is_code(page: &[u8; 4096]) -> bool {
    let count = |b: u8| page.iter().filter(|x| **x == b).count();
    count(0xe8) > 15 && count(0) < 1000
}

fn speed(c: &mut Criterion) {
    let pages = pages();
    assert_eq!(pages.len(), PAGES, "too little code");
    let count: usize = pages.iter().map(whole).sum();
    let mut group = c.benchmark_group("translate");
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("guest instructions", |b| b.iter(|| pages.iter().map(whole).sum::<usize>()));
    group.finish();
}

criterion_group!(benches, speed);
criterion_main!(benches);
