//! Macrobenchmarks: whole jobs of programs out of packages, beside those of `real`, and a drawing of our own. Their root has other programs.
//!
//! The web server's rows are by time: wrk runs for a second, and the number of requests that it says it got answered is the number of
//! operations. The server is process 1 of a PID namespace where that may be made, so that nothing of it outlives this program.

use core::ffi::CStr;
use core::fmt::Write as _;

use crate::real_data::{self, Writer};
use crate::real::{self, scaled};
use crate::{Bench, Ctx, spawn, sys, with_memory};

pub const BENCHES: &[Bench] = &[
    real::bench("make", make_setup, make),
    real::bench("bzip2", || real::text_file(c"work/text", scaled(1 << 20)), |ctx, n| pack(ctx, n, c"bin/bzip2")),
    real::bench("xz", || real::text_file(c"work/text", scaled(1 << 19)), |ctx, n| pack(ctx, n, c"bin/xz")),
    real::bench("perl", || real::text_file(c"work/text", scaled(1 << 20)), perl),
    real::bench("sqlite", sqlite_setup, sqlite),
    Bench { name: "draw", ops: WIDTH as u64 * HEIGHT as u64, setup: || with_memory(WIDTH * HEIGHT * 4), run: draw, teardown: crate::no_teardown },
    Bench { name: "web-process", ops: 1, setup: || web_setup(PROCESSES), run: web, teardown: web_end },
    Bench { name: "web-thread", ops: 1, setup: || web_setup(THREADS), run: web, teardown: web_end },
];

// --- a small project ---

/// Files of the project.
const SOURCES: u64 = 6;

fn make_setup() -> Result<Ctx, &'static str> {
    let ctx = real::setup(SOURCES)?;
    let mut writer = Writer::new(64 << 10).ok_or("not enough memory")?;
    // cc1 asks a machine for its memory and does different work on different ones, so it is told.
    let flags = "-quiet --param ggc-min-expand=30 --param ggc-min-heapsize=16384 -I work";
    let mut written = write!(writer, "work/all.o:").is_ok();
    for n in 0..SOURCES {
        written &= write!(writer, " work/f{n}.o").is_ok();
    }
    written &= write!(writer, "\n\tbin/ld -r -o $@ $^\nwork/%.o: work/%.s\n\tbin/as --64 -o $@ $<\nwork/%.s: work/%.c\n\tbin/cc1 {flags} -O1 $< -o $@\n.SECONDARY:\n.SUFFIXES:\n").is_ok();
    written &= writer.save(c"work/Makefile");
    for n in 0..SOURCES {
        let path = real_data::Word::new(format_args!("work/f{n}.c"));
        writer.clear();
        real_data::one_source(&mut writer, n);
        written &= writer.save(path.as_c_str());
    }
    if !written {
        return Err("cannot write files");
    }
    if !spawn::is_in_own_root() {
        return Err("make would start other programs than the root's");
    }
    Ok(Ctx { digest: Some(|_| real::file_digest(c"work/all.o")), ..ctx })
}

/// Everything is older than its sources each time, for it is not there.
fn make(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        spawn::run(&[c"bin/make", c"-rs", c"-f", c"work/Makefile", c"-B", c"SHELL=/bin/dash"]);
    }
    0
}

// --- interpreters and packers ---

fn pack(_: &mut Ctx, n: u64, program: &CStr) -> u64 {
    for _ in 0..n {
        spawn::run(&[program, c"-c", c"work/text"]);
    }
    0
}

const PERL: &CStr = c"my (%n, $c); while (<>) { s/([aeiou])([a-z])/$2$1/g; $n{lc $1}++ while /(\\w+)/g; $c += length }
my $s = 0; for my $w (sort { $n{$b} <=> $n{$a} || $a cmp $b } keys %n) { $s = ($s * 31 + $n{$w} * length $w) % 65521 }
print scalar(keys %n), ' ', $c, ' ', $s, \"\\n\";";

fn perl(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        spawn::run(&[c"bin/perl", c"-e", PERL, c"work/text"]);
    }
    0
}

const ROWS: u64 = 30_000;

fn sqlite_setup() -> Result<Ctx, &'static str> {
    let rows = scaled(ROWS);
    let ctx = real::setup(rows)?;
    let mut writer = Writer::new(4096).ok_or("not enough memory")?;
    let written = write!(
        writer,
        "create table t (id integer primary key, k text, v integer);\n\
         with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows})\n\
         insert into t select i, printf('key%07d', (i * 7919) % {rows}), (i * 104729) % 1000 from n;\n\
         create index kx on t (k);\nupdate t set v = v + 1 where k like 'key00%5';\n\
         select count(*), sum(v), min(k), max(k) from t where v between 100 and 900;\n\
         select v % 10, count(*), avg(length(k)) from t group by 1 order by 1;\n\
         select a.k, b.v from t a join t b on b.id = a.v + 1 where a.id % 50 = 7 order by a.k limit 20;\n"
    );
    if written.is_err() || !writer.save(c"work/script") {
        return Err("cannot write files");
    }
    Ok(ctx)
}

fn sqlite(_: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        spawn::run(&[c"bin/sqlite3", c"-batch", c"-init", c"work/script", c":memory:", c""]);
    }
    0
}

// --- drawing ---

const WIDTH: usize = 640;
const HEIGHT: usize = 480;
/// Shapes of a picture.
const DISCS: u32 = 60;
const LINES: u32 = 200;

/// A picture: a gradient, discs that are half transparent, lines, a part of it copied elsewhere.
fn draw(ctx: &mut Ctx, n: u64) -> u64 {
    let pixels = ctx.mem.slice::<u32>();
    for _ in 0..n {
        for (y, row) in pixels.chunks_exact_mut(WIDTH).enumerate() {
            row.iter_mut().enumerate().for_each(|(x, pixel)| *pixel = ((x * 255 / WIDTH) << 16 | y * 255 / HEIGHT) as u32);
        }
        (0..DISCS).for_each(|i| disc(pixels, i));
        (0..LINES).for_each(|i| line(pixels, i));
        for y in 0..HEIGHT / 2 {
            let from = y * WIDTH;
            pixels.copy_within(from..from + WIDTH / 2, (HEIGHT / 2 + y) * WIDTH + WIDTH / 2);
        }
    }
    pixels.iter().fold(0, |sum: u64, pixel| sum.wrapping_mul(31).wrapping_add(u64::from(*pixel)))
}

/// Half of one colour and half of the other.
const fn blend(a: u32, b: u32) -> u32 {
    ((a & 0xfe_fefe) >> 1) + ((b & 0xfe_fefe) >> 1)
}

fn disc(pixels: &mut [u32], i: u32) {
    let (cx, cy, r) = ((i * 97 % 640) as i32, (i * 61 % 480) as i32, (20 + i * 7 % 60) as i32);
    let colour = i.wrapping_mul(0x9e_3779) & 0xff_ffff;
    for y in (cy - r).max(0)..(cy + r).min(HEIGHT as i32) {
        for x in (cx - r).max(0)..(cx + r).min(WIDTH as i32) {
            if (x - cx) * (x - cx) + (y - cy) * (y - cy) < r * r {
                let pixel = &mut pixels[y as usize * WIDTH + x as usize];
                *pixel = blend(*pixel, colour);
            }
        }
    }
}

/// Bresenham's.
fn line(pixels: &mut [u32], i: u32) {
    let (mut x, mut y) = ((i * 53 % 640) as i32, (i * 31 % 480) as i32);
    let (ex, ey) = ((i * 151 % 640) as i32, (i * 211 % 480) as i32);
    let (dx, dy) = ((ex - x).abs(), -(ey - y).abs());
    let (sx, sy) = (if x < ex { 1 } else { -1 }, if y < ey { 1 } else { -1 });
    let mut error = dx + dy;
    loop {
        pixels[y as usize * WIDTH + x as usize] = 0xff_ffff - i;
        if (x, y) == (ex, ey) {
            return;
        }
        let twice = 2 * error;
        if twice >= dy {
            error += dy;
            x += sx;
        }
        if twice <= dx {
            error += dx;
            y += sy;
        }
    }
}

// --- a web server ---

/// Worker processes that serve files themselves.
const PROCESSES: &str = "worker_processes 4;\nevents { worker_connections 64; }\nhttp {\n";
/// One that gives reading to threads.
const THREADS: &str = "worker_processes 1;\nthread_pool default threads=4;\nevents { worker_connections 64; }\nhttp {\naio threads;\n";
/// Where it keeps what it would else keep in directories of the host's.
const REST: &str = "access_log off;\nclient_body_temp_path t;\nproxy_temp_path t;\nfastcgi_temp_path t;\nuwsgi_temp_path t;\nscgi_temp_path t;\n\
    sendfile off;\nserver { listen 127.0.0.1:18091; root files; default_type text/plain; }\n}\n";
const URL: &CStr = c"http://127.0.0.1:18091/text";
/// Bytes of the file that is served.
const SERVED: u64 = 8192;

fn web_setup(kind: &str) -> Result<Ctx, &'static str> {
    let mut ctx = real::text_file(c"work/text", SERVED)?;
    if !spawn::is_in_own_root() {
        return Err("the web server needs a root of its own");
    }
    sys::loopback_up();
    let made = sys::make_directory(c"work/files") && sys::make_directory(c"work/logs");
    let moved = sys::rename(c"work/text", c"work/files/text");
    sys::make_directory(c"etc");
    let mut writer = Writer::new(4096).ok_or("not enough memory")?;
    let mut written = write!(writer, "root:x:0:0::/:\nnobody:x:0:0::/:\n").is_ok() && writer.save(c"etc/passwd");
    writer.clear();
    written &= write!(writer, "root:x:0:\nnobody:x:0:\n").is_ok() && writer.save(c"etc/group");
    writer.clear();
    written &= write!(writer, "daemon off;\nuser root root;\npid pid;\nerror_log logs/error.log;\n{kind}{REST}").is_ok();
    if !(made && moved && written && writer.save(c"work/nginx.conf")) {
        return Err("cannot write files");
    }
    ctx.pid = spawn::start_apart(&[c"bin/nginx", c"-p", c"work/", c"-c", c"nginx.conf"], SERVER_OUTPUT);
    // It answers as soon as it listens.
    for _ in 0..200 {
        sys::sleep_ms(20);
        if sys::can_connect(18091) {
            return Ok(Ctx { digest: Some(|_| 1), ..ctx });
        }
    }
    web_end(&mut ctx);
    Err("the web server does not start")
}

const SERVER_OUTPUT: &CStr = c"work/server";

fn web_end(ctx: &mut Ctx) {
    if ctx.pid > 0 {
        spawn::stop(ctx.pid);
        ctx.pid = 0;
    }
    real::teardown(ctx);
}

/// A second of load from eight connections, `n` times.
fn web(ctx: &mut Ctx, n: u64) -> u64 {
    let mut requests = 0;
    for _ in 0..n {
        spawn::run(&[c"bin/wrk", c"-t", c"1", c"-c", c"8", c"-d", c"1s", URL]);
        match answered() {
            0 => spawn::fail(),
            count => requests += count,
        }
    }
    ctx.ops = (requests / n.max(1)).max(1);
    1
}

/// The number before `requests in` in what wrk printed; a socket error or another status than 200 is none.
fn answered() -> u64 {
    let mut text = [0u8; 2048];
    let mut len = 0;
    let read = real_data::read_into(spawn::OUTPUT, |bytes| {
        for byte in bytes {
            if len < text.len() {
                text[len] = *byte;
                len += 1;
            }
        }
    });
    let text = core::str::from_utf8(&text[..len]).unwrap_or("");
    if read.is_none() || text.contains("Non-2xx") || text.contains("Socket errors") {
        return 0;
    }
    let before = text.split(" requests in").next().unwrap_or("");
    before.rsplit([' ', '\n']).next().and_then(|word| word.parse().ok()).unwrap_or(0)
}
