//! Every target on some thousand seeded random inputs. A failing input's number is printed; `TRELLIS_SEED=n` runs it
//! alone, `TRELLIS_CASES=n` runs more of them.

use trellis_fuzz::devices::{Kind, drive};
use trellis_fuzz::{decoder, interpreter, loaders, nics, packets, qcow2, translator, virtqueue};

/// Input number `n`: up to `longest` bytes.
fn input(n: u64, longest: u64) -> Vec<u8> {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..4 {
        next();
    }
    let len = next() % longest;
    (0..len).map(|_| (next() >> 24) as u8).collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// Says which input was at work if it panics.
struct Current(&'static str, u64);

impl Drop for Current {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} failed on input {n}: TRELLIS_SEED={n} cargo test {}", self.0, self.0, n = self.1);
        }
    }
}

fn run(name: &'static str, target: fn(&[u8]), count: u64, longest: u64) {
    let cases = match number("TRELLIS_SEED") {
        Some(n) => n..n + 1,
        None => 0..number("TRELLIS_CASES").unwrap_or(count),
    };
    for n in cases {
        let _current = Current(name, n);
        target(&input(n, longest));
    }
}

#[test]
fn decoder_takes_any_bytes() {
    run("decoder", decoder::target, 2_000, 400);
}

#[test]
fn interpreter_takes_any_state() {
    run("interpreter", interpreter::target, 8_000, 600);
}

#[test]
fn loaders_take_any_file() {
    run("loaders", loaders::target, 3_000, 2_000);
}

#[test]
fn virtqueue_takes_any_rings() {
    run("virtqueue", virtqueue::target, 8_000, 1_500);
}

#[test]
fn translator_takes_any_bytes() {
    run("translator", translator::target, 60_000, 700);
}

#[test]
fn qcow2_takes_any_image() {
    run("qcow2", qcow2::target, 2_000, 300);
}

#[test]
fn packets_may_be_anything() {
    run("packets", packets::target, 3_000, 3_000);
}

#[test]
fn nics_take_any_driver() {
    run("nics", nics::target, 3_000, 1_500);
}

#[test]
fn block_takes_any_driver() {
    run("block", |data| drive(Kind::Block, data), 1_000, 1_500);
}

#[test]
fn net_takes_any_driver() {
    run("net", |data| drive(Kind::Net, data), 1_000, 1_500);
}

#[test]
fn console_takes_any_driver() {
    run("console", |data| drive(Kind::Console, data), 1_000, 1_500);
}

#[test]
fn channel_takes_any_driver() {
    run("channel", |data| drive(Kind::Channel, data), 1_000, 1_500);
}

#[test]
fn rng_takes_any_driver() {
    run("rng", |data| drive(Kind::Rng, data), 1_000, 1_500);
}

#[test]
fn balloon_takes_any_driver() {
    run("balloon", |data| drive(Kind::Balloon, data), 1_000, 1_500);
}

#[test]
fn vsock_takes_any_driver() {
    run("vsock", |data| drive(Kind::Vsock, data), 1_000, 1_500);
}

#[test]
fn fuse_takes_any_driver() {
    run("fuse", |data| drive(Kind::Fuse, data), 1_000, 1_500);
}

#[test]
fn p9_takes_any_driver() {
    run("p9", |data| drive(Kind::P9, data), 1_000, 1_500);
}
