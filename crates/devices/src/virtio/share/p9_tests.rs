#![expect(clippy::cast_possible_truncation, reason = "tests take random numbers apart")]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use guestmem::Gpa;

use super::p9::{MAX_MESSAGE, Server};
use super::wire::Writer;
use super::*;
use crate::snapshot::Snapshot;
use crate::virtio::Flavor;
use crate::virtio::rng::SplitMix64;
use crate::virtio::tests::driver::{DATA, Rig, Ring};

const NOENT: u32 = 2;
const BADF: u32 = 9;
const ACCESS: u32 = 13;
const NOTDIR: u32 = 20;
const INVAL: u32 = 22;
const ROFS: u32 = 30;
const LOOP: u32 = 40;

/// Puts the fields of a message.
type Fields<'a> = &'a dyn Fn(&mut Writer);

/// Ends a chain of fields.
fn done(_: &mut Writer) {}

fn server(path: &Path, read_only: bool) -> Server {
    Server::new(Tree::open(path).unwrap(), read_only)
}

/// Sends one message; gives the answer's fields, or its error number.
fn ask(server: &mut Server, kind: u8, fields: impl FnOnce(&mut Writer)) -> Result<Vec<u8>, u32> {
    let mut writer = Writer::new();
    fields(&mut writer);
    let answer = server.answer(&writer.finish(kind, 7), usize::MAX);
    assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize, answer.len());
    assert_eq!(answer[5..7], [7, 0]);
    match answer[4] {
        7 => Err(u32::from_le_bytes(answer[7..11].try_into().unwrap())),
        other => {
            assert_eq!(other, kind + 1);
            Ok(answer[7..].to_vec())
        }
    }
}

fn attach(server: &mut Server) {
    ask(server, 100, |w| done(w.u32(65536).string(b"9P2000.L"))).unwrap();
    ask(server, 104, |w| done(w.u32(0).u32(u32::MAX).string(b"root").string(b"").u32(0))).unwrap();
}

fn walk(server: &mut Server, from: u32, to: u32, names: &[&[u8]]) -> Result<u16, u32> {
    let answer = ask(server, 110, |w| {
        w.u32(from).u32(to).u16(names.len() as u16);
        names.iter().for_each(|name| done(w.string(name)));
    })?;
    Ok(u16::from_le_bytes(answer[..2].try_into().unwrap()))
}

fn open(server: &mut Server, fid: u32, flags: u32) -> Result<Vec<u8>, u32> {
    ask(server, 12, |w| done(w.u32(fid).u32(flags)))
}

fn read(server: &mut Server, fid: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
    let answer = ask(server, 116, |w| done(w.u32(fid).u64(offset).u32(count)))?;
    assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize, answer.len() - 4);
    Ok(answer[4..].to_vec())
}

fn options(path: &Path, protocol: ShareProtocol) -> ShareOptions {
    let tag = "here".to_owned();
    ShareOptions { path: path.to_owned(), tag, read_only: false, protocol, is_static: false }
}

fn tree() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let shared = directory.path().join("shared");
    std::fs::create_dir_all(shared.join("sub")).unwrap();
    std::fs::write(shared.join("sub/file"), b"content").unwrap();
    std::fs::write(directory.path().join("secret"), b"secret").unwrap();
    directory
}

#[test]
fn files_are_walked_to_read_written_and_listed() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    attach(&mut s);
    assert_eq!(walk(&mut s, 0, 1, &[b"sub", b"file"]), Ok(2));
    assert_eq!(read(&mut s, 1, 0, 10), Err(BADF), "not open yet");
    open(&mut s, 1, 2).unwrap();
    assert_eq!(read(&mut s, 1, 3, 100).unwrap(), b"tent");
    assert_eq!(read(&mut s, 1, 0, u32::MAX).unwrap(), b"content");
    ask(&mut s, 118, |w| done(w.u32(1).u64(7).u32(3).raw(b" \xff!"))).unwrap();
    assert_eq!(std::fs::read(shared.join("sub/file")).unwrap(), b"content \xff!");
    assert_eq!(walk(&mut s, 0, 2, &[b"sub"]), Ok(1));
    ask(&mut s, 14, |w| done(w.u32(2).string(b"new").u32(0o102).u32(0o640).u32(0))).unwrap();
    ask(&mut s, 118, |w| done(w.u32(2).u64(0).u32(1).raw(b"x"))).unwrap();
    assert_eq!(std::fs::read(shared.join("sub/new")).unwrap(), b"x");
    assert_eq!(walk(&mut s, 0, 3, &[b"sub"]), Ok(1));
    open(&mut s, 3, 0).unwrap();
    let list = ask(&mut s, 40, |w| done(w.u32(3).u64(0).u32(4096))).unwrap();
    for name in [&b"new"[..], b"file", b".", b".."] {
        assert!(list.windows(name.len()).any(|w| w == name));
    }
    ask(&mut s, 76, |w| done(w.u32(3).string(b"new").u32(0))).unwrap();
    assert_eq!(walk(&mut s, 3, 4, &[b"new"]), Err(NOENT));
    assert_eq!(walk(&mut s, 3, 4, &[b"file", b"x"]), Ok(1), "as far as it goes, without a fid");
    assert_eq!(ask(&mut s, 120, |w| done(w.u32(4))), Err(BADF));
    assert_eq!(walk(&mut s, 1, 5, &[b"x"]), Err(NOTDIR));
}

#[test]
fn nothing_outside_of_the_share_is_reached() {
    let directory = tree();
    let shared = directory.path().join("shared");
    symlink("../secret", shared.join("link")).unwrap();
    symlink("/", shared.join("rootlink")).unwrap();
    let mut s = server(&shared, false);
    attach(&mut s);
    for name in
        [&b".."[..], b"../secret", b"sub/../../secret", b"/etc/passwd", b"", b".", b"a\0b", b"sub/file"]
    {
        assert_eq!(walk(&mut s, 0, 9, &[name]), Err(INVAL), "{name:?}");
    }
    // A link is a link: it can be read, not opened or walked through.
    assert_eq!(walk(&mut s, 0, 1, &[b"link"]), Ok(1));
    assert_eq!(open(&mut s, 1, 0), Err(LOOP));
    assert_eq!(ask(&mut s, 22, |w| done(w.u32(1))).unwrap()[2..], *b"../secret");
    assert_eq!(walk(&mut s, 0, 2, &[b"rootlink", b"etc"]), Ok(1));
    let names: [Fields<'_>; 4] = [
        &|w| done(w.u32(0).string(b"../new").u32(0o102).u32(0o600).u32(0)),
        &|w| done(w.u32(0).string(b"link").u32(0o102).u32(0o600).u32(0)),
        &|w| done(w.u32(0).string(b"..").u32(0o102).u32(0o600).u32(0)),
        &|w| done(w.u32(0).string(b"").u32(0o102).u32(0o600).u32(0)),
    ];
    for fields in names {
        assert!(ask(&mut s, 14, fields).is_err());
    }
    assert_eq!(ask(&mut s, 76, |w| done(w.u32(0).string(b"../secret").u32(0))), Err(INVAL));
    assert_eq!(ask(&mut s, 74, |w| done(w.u32(0).string(b"sub").u32(0).string(b"../sub"))), Err(INVAL));
    assert_eq!(std::fs::read(directory.path().join("secret")).unwrap(), b"secret");
    assert!(!directory.path().join("new").exists());
}

#[test]
fn a_file_replaced_by_a_link_meanwhile_leads_nowhere() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    attach(&mut s);
    walk(&mut s, 0, 1, &[b"sub", b"file"]).unwrap();
    walk(&mut s, 0, 2, &[b"sub"]).unwrap();
    std::fs::remove_file(shared.join("sub/file")).unwrap();
    symlink(directory.path().join("secret"), shared.join("sub/file")).unwrap();
    open(&mut s, 1, 0).unwrap();
    assert_eq!(
        read(&mut s, 1, 0, 100).unwrap(),
        b"content",
        "the file that was walked to, though it has no name"
    );
    std::fs::remove_dir_all(shared.join("sub")).unwrap();
    symlink(directory.path(), shared.join("sub")).unwrap();
    assert_eq!(walk(&mut s, 2, 3, &[b"secret"]), Err(NOENT), "the directory that was walked to");
    assert_eq!(walk(&mut s, 0, 4, &[b"sub", b"secret"]), Ok(1));
}

#[test]
fn pipes_and_sockets_are_seen_and_not_opened() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    attach(&mut s);
    ask(&mut s, 18, |w| done(w.u32(0).string(b"pipe").u32(0o10600).u32(0).u32(0).u32(0))).unwrap();
    walk(&mut s, 0, 1, &[b"pipe"]).unwrap();
    assert_eq!(open(&mut s, 1, 0), Err(ACCESS));
    let device = ask(&mut s, 18, |w| done(w.u32(0).string(b"d").u32(0o20600).u32(1).u32(3).u32(0)));
    assert_eq!(device, Err(1));
}

#[test]
fn read_only_share_is_not_changed() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, true);
    attach(&mut s);
    walk(&mut s, 0, 1, &[b"sub", b"file"]).unwrap();
    for flags in [1, 2, 0o1000, 0o2000] {
        assert_eq!(open(&mut s, 1, flags), Err(ROFS));
    }
    open(&mut s, 1, 0).unwrap();
    let changes: [(u8, Fields<'_>); 8] = [
        (118, &|w| done(w.u32(1).u64(0).u32(1).raw(b"x"))),
        (14, &|w| done(w.u32(0).string(b"n").u32(0o102).u32(0o600).u32(0))),
        (16, &|w| done(w.u32(0).string(b"n").string(b"t").u32(0))),
        (72, &|w| done(w.u32(0).string(b"n").u32(0o700).u32(0))),
        (76, &|w| done(w.u32(0).string(b"sub").u32(0x200))),
        (70, &|w| done(w.u32(0).u32(1).string(b"n"))),
        (74, &|w| done(w.u32(0).string(b"sub").u32(0).string(b"n"))),
        (26, &|w| done(w.u32(1).u32(1).u32(0o777).u32(0).u32(0).u64(0).u64(0).u64(0).u64(0).u64(0))),
    ];
    for (kind, fields) in changes {
        assert_eq!(ask(&mut s, kind, fields), Err(ROFS), "{kind}");
    }
}

#[test]
fn attributes_are_set_on_the_file_itself() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    attach(&mut s);
    walk(&mut s, 0, 1, &[b"sub", b"file"]).unwrap();
    let valid = 1 | 8 | 0x20 | 0x100;
    ask(&mut s, 26, |w| {
        done(w.u32(1).u32(valid).u32(0o604).u32(0).u32(0).u64(3).u64(0).u64(0).u64(1_000_000).u64(5));
    })
    .unwrap();
    let metadata = std::fs::metadata(shared.join("sub/file")).unwrap();
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (3, 0o604));
    let modified = metadata.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!((modified.as_secs(), modified.subsec_nanos()), (1_000_000, 5));
    let answer = ask(&mut s, 24, |w| done(w.u32(1).u64(0x7ff))).unwrap();
    assert_eq!(u32::from_le_bytes(answer[21..25].try_into().unwrap()), 0o100_604);
}

#[test]
fn any_messages_are_answered() {
    let directory = tree();
    let mut s = server(&directory.path().join("shared"), false);
    let mut rng = SplitMix64::new(0x9b);
    let kinds = [
        8, 12, 14, 16, 18, 20, 22, 24, 26, 30, 32, 40, 50, 52, 54, 70, 72, 74, 76, 100, 102, 104, 108, 110,
        116, 118, 120, 122,
    ];
    for round in 0..30_000u64 {
        if round.is_multiple_of(50) {
            attach(&mut s);
        }
        let mut writer = Writer::new();
        for _ in 0..rng.next() % 8 {
            match rng.next() % 6 {
                0 => done(writer.u32((rng.next() % 4) as u32)),
                1 => drop(
                    writer.string([&b"sub"[..], b"file", b"..", b"n", b"/", b""][rng.next() as usize % 6]),
                ),
                2 => done(writer.u64(rng.next())),
                3 => done(writer.u16((rng.next() % 20) as u16)),
                4 => done(writer.u32(rng.next() as u32)),
                _ => done(writer.u64(rng.next() % 16)),
            }
        }
        let kind = if rng.next().is_multiple_of(16) {
            rng.next() as u8
        } else {
            kinds[rng.next() as usize % kinds.len()]
        };
        let mut message = writer.finish(kind, 1);
        if rng.next().is_multiple_of(8) {
            let at = rng.next() as usize % message.len();
            message[at] = rng.next() as u8;
        }
        let answer = s.answer(&message, usize::MAX);
        assert!(answer.len() >= 7 && answer.len() <= MAX_MESSAGE as usize);
    }
    assert_eq!(std::fs::read(directory.path().join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing beside the share");
}

/// Puts a message in memory, asks by the queue, gives the answer.
fn exchange(rig: &Rig, ring: &mut Ring, message: &[u8]) -> Vec<u8> {
    rig.memory.write(Gpa(DATA), message).unwrap();
    ring.add(&[(DATA, message.len() as u32, false), (DATA + 0x1_0000, 8192, true)]);
    ring.kick(rig);
    let (_, written) = ring.wait();
    let mut answer = vec![0; written as usize];
    rig.memory.read(Gpa(DATA + 0x1_0000), &mut answer).unwrap();
    answer
}

fn message(kind: u8, fields: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut writer = Writer::new();
    fields(&mut writer);
    writer.finish(kind, 1)
}

#[test]
fn device_answers_by_its_queue_and_goes_on_after_a_restore() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let options = options(&shared, ShareProtocol::P9);
    let share = || Box::new(Share::new("share.0", &options, false).unwrap());
    let rig = Rig::new(share(), Flavor::Modern);
    let mut ring = rig.start(1, 1).remove(0);
    let config = rig.structure(4);
    assert_eq!((rig.read(config, 2), rig.read(config + 2, 4)), (4, u64::from(u32::from_le_bytes(*b"here"))));
    exchange(&rig, &mut ring, &message(100, |w| done(w.u32(8192).string(b"9P2000.L"))));
    exchange(&rig, &mut ring, &message(104, |w| done(w.u32(0).u32(u32::MAX).string(b"").string(b"").u32(0))));
    exchange(&rig, &mut ring, &message(110, |w| done(w.u32(0).u32(1).u16(2).string(b"sub").string(b"file"))));
    assert_eq!(exchange(&rig, &mut ring, &message(12, |w| done(w.u32(1).u32(0))))[4], 13);
    let blob = lock(&rig.device).save();
    let memory = rig.memory.clone();
    drop(rig);
    let next = Rig::with_memory(share(), Flavor::Modern, memory.clone());
    lock(&next.device).restore(&blob).unwrap();
    next.host.remap();
    let read = message(116, |w| done(w.u32(1).u64(0).u32(100)));
    assert_eq!(exchange(&next, &mut ring, &read)[11..], *b"content");
    let blob = lock(&next.device).save();
    drop(next);
    std::fs::rename(shared.join("sub"), shared.join("other")).unwrap();
    let gone = Rig::with_memory(share(), Flavor::Modern, memory);
    lock(&gone.device).restore(&blob).unwrap();
    gone.host.remap();
    assert_eq!(exchange(&gone, &mut ring, &read)[4], 7, "what is gone is an error");
}
