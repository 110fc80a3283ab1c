#![expect(clippy::cast_possible_truncation, reason = "tests take random numbers apart")]

use std::os::unix::fs::symlink;
use std::path::Path;

use super::FileServer;
use super::fuse::Server;
use super::host::Tree;
use crate::virtio::rng::SplitMix64;

const NOENT: i32 = -2;
const ACCES: i32 = -13;
const NOTDIR: i32 = -20;
const INVAL: i32 = -22;
const ROFS: i32 = -30;
const NOSYS: i32 = -38;
const LOOP: i32 = -40;
const STALE: i32 = -116;

fn server(path: &Path, read_only: bool) -> Server {
    let mut server = Server::new(Tree::open(path).unwrap(), read_only, false);
    let init = [7u32, 31, 65536, u32::MAX].map(u32::to_le_bytes).concat();
    assert_eq!(ask(&mut server, 26, 0, &init).unwrap().len(), 64);
    server
}

/// Sends one request; gives the answer's fields, or its error number.
fn ask(server: &mut Server, opcode: u32, node: u64, fields: &[u8]) -> Result<Vec<u8>, i32> {
    let len = 40 + fields.len() as u32;
    let mut request = [len, opcode].map(u32::to_le_bytes).concat();
    request.extend(99u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(fields);
    let answer = server.answer(&request, 1 << 20);
    assert_eq!(u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize, answer.len());
    assert_eq!(answer[8..16], 99u64.to_le_bytes());
    match i32::from_le_bytes(answer[4..8].try_into().unwrap()) {
        0 => Ok(answer[16..].to_vec()),
        error => Err(error),
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn named(mut fields: Vec<u8>, names: &[&[u8]]) -> Vec<u8> {
    for name in names {
        fields.extend(*name);
        fields.push(0);
    }
    fields
}

fn lookup(server: &mut Server, node: u64, name: &[u8]) -> Result<u64, i32> {
    let answer = ask(server, 1, node, &named(Vec::new(), &[name]))?;
    assert_eq!(answer.len(), 128);
    Ok(number(&answer, 0))
}

fn open(server: &mut Server, node: u64, flags: u64) -> Result<u64, i32> {
    ask(server, 14, node, &words(&[flags])).map(|answer| number(&answer, 0))
}

fn read(server: &mut Server, handle: u64, offset: u64, size: u64) -> Result<Vec<u8>, i32> {
    ask(server, 15, 0, &words(&[handle, offset, size, 0, 0]))
}

fn create(server: &mut Server, node: u64, name: &[u8]) -> Result<Vec<u8>, i32> {
    ask(server, 35, node, &named(words(&[2 | 0o100 | 0o644 << 32, 0]), &[name]))
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
fn files_are_found_read_written_and_listed() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    let sub = lookup(&mut s, 1, b"sub").unwrap();
    let file = lookup(&mut s, sub, b"file").unwrap();
    assert_eq!(lookup(&mut s, sub, b"file"), Ok(file), "a file has one node");
    let handle = open(&mut s, file, 2).unwrap();
    assert_eq!(read(&mut s, handle, 3, 100).unwrap(), b"tent");
    let mut write = words(&[handle, 7, 3, 0, 0]);
    write.extend(b" \xff!");
    ask(&mut s, 16, file, &write).unwrap();
    assert_eq!(std::fs::read(shared.join("sub/file")).unwrap(), b"content \xff!");
    let made = create(&mut s, sub, b"new").unwrap();
    assert_eq!(made.len(), 128 + 16);
    assert!(shared.join("sub/new").exists());
    assert!(create(&mut s, sub, b"new").is_err(), "what exists is not created again");
    let listing = ask(&mut s, 27, sub, &words(&[0])).unwrap();
    let listing = ask(&mut s, 28, sub, &words(&[number(&listing, 0), 0, 4096, 0, 0])).unwrap();
    for name in [&b"new"[..], b"file", b".", b".."] {
        assert!(listing.windows(name.len()).any(|w| w == name));
    }
    ask(&mut s, 12, sub, &named(words(&[1]), &[b"new", b"moved"])).unwrap();
    assert!(shared.join("moved").exists());
    ask(&mut s, 10, 1, &named(Vec::new(), &[b"moved"])).unwrap();
    assert_eq!(lookup(&mut s, 1, b"moved"), Err(NOENT));
    assert_eq!(lookup(&mut s, file, b"x"), Err(NOTDIR));
    assert_eq!(ask(&mut s, 22, file, &[0; 16]), Err(NOSYS), "no attributes");
    // Forgotten: the number means nothing any more.
    let mut forget = [48u32, 2].map(u32::to_le_bytes).concat();
    forget.extend(words(&[1, file, 0, 0, 2]));
    assert!(s.answer(&forget, 0).is_empty());
    assert_eq!(open(&mut s, file, 0), Err(STALE));
    assert_eq!(read(&mut s, handle, 0, 7).unwrap(), b"content", "what is open stays so");
}

#[test]
fn nothing_outside_of_the_share_is_reached() {
    let directory = tree();
    let shared = directory.path().join("shared");
    symlink("../secret", shared.join("link")).unwrap();
    symlink("/", shared.join("rootlink")).unwrap();
    let mut s = server(&shared, false);
    for name in [&b".."[..], b"../secret", b"sub/../../secret", b"/etc/passwd", b"", b".", b"sub/file"] {
        assert_eq!(lookup(&mut s, 1, name), Err(INVAL), "{name:?}");
        assert!(create(&mut s, 1, name).is_err());
        assert_eq!(ask(&mut s, 10, 1, &named(Vec::new(), &[name])), Err(INVAL));
        assert_eq!(ask(&mut s, 12, 1, &named(words(&[1]), &[b"sub", name])), Err(INVAL));
        assert_eq!(ask(&mut s, 9, 1, &named(words(&[0o700]), &[name])), Err(INVAL));
    }
    let link = lookup(&mut s, 1, b"link").unwrap();
    assert_eq!(open(&mut s, link, 0), Err(LOOP));
    assert_eq!(ask(&mut s, 5, link, &[]).unwrap(), b"../secret");
    let root = lookup(&mut s, 1, b"rootlink").unwrap();
    assert_eq!(lookup(&mut s, root, b"etc"), Err(NOTDIR));
    assert!(create(&mut s, 1, b"link").is_err(), "nothing is created through a link");
    assert_eq!(std::fs::read(directory.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn a_directory_replaced_by_a_link_meanwhile_leads_nowhere() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    let sub = lookup(&mut s, 1, b"sub").unwrap();
    std::fs::rename(shared.join("sub"), shared.join("old")).unwrap();
    symlink(directory.path(), shared.join("sub")).unwrap();
    assert_eq!(lookup(&mut s, sub, b"secret"), Err(NOENT), "the directory that was found");
    let link = lookup(&mut s, 1, b"sub").unwrap();
    assert_eq!(lookup(&mut s, link, b"secret"), Err(NOTDIR));
    std::fs::remove_dir_all(shared.join("old")).unwrap();
    assert!(create(&mut s, sub, b"x").is_err(), "it is gone");
}

#[test]
fn pipes_and_devices_are_not_opened_and_a_read_only_share_is_not_changed() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    let pipe = ask(&mut s, 8, 1, &named(words(&[0o10_600, 0]), &[b"pipe"])).unwrap();
    assert_eq!(open(&mut s, number(&pipe, 0), 0), Err(ACCES));
    assert_eq!(ask(&mut s, 8, 1, &named(words(&[0o20_600, 0]), &[b"device"])), Err(-1));
    let mut s = server(&shared, true);
    let sub = lookup(&mut s, 1, b"sub").unwrap();
    let file = lookup(&mut s, sub, b"file").unwrap();
    for flags in [1, 2, 0o1000] {
        assert_eq!(open(&mut s, file, flags), Err(ROFS));
    }
    let handle = open(&mut s, file, 0).unwrap();
    assert_eq!(ask(&mut s, 16, file, &words(&[handle, 0, 0, 0, 0])), Err(ROFS));
    assert_eq!(create(&mut s, 1, b"n"), Err(ROFS));
    for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 43, 45] {
        assert_eq!(ask(&mut s, opcode, 1, &[0; 128]), Err(ROFS), "{opcode}");
    }
}

#[test]
fn any_requests_are_answered() {
    let directory = tree();
    let mut s = server(&directory.path().join("shared"), false);
    let mut rng = SplitMix64::new(0xf5);
    for _ in 0..30_000 {
        let mut fields = Vec::new();
        for _ in 0..rng.next() % 8 {
            match rng.next() % 4 {
                0 => fields.extend((rng.next() % 8).to_le_bytes()),
                1 => fields.extend(rng.next().to_le_bytes()),
                2 => fields.extend((rng.next() as u32 & 0o7777).to_le_bytes()),
                _ => {
                    let names = [&b"sub"[..], b"file", b"..", b"n", b"/", b"../secret", b"m"];
                    fields.extend(names[rng.next() as usize % names.len()]);
                    fields.push(0);
                }
            }
        }
        let opcode = (rng.next() % 52) as u32;
        let mut request = [40 + fields.len() as u32, opcode].map(u32::to_le_bytes).concat();
        request.extend(words(&[rng.next(), rng.next() % 6, 0, 0]));
        request.extend(&fields);
        if rng.next().is_multiple_of(8) {
            let at = rng.next() as usize % request.len();
            request[at] = rng.next() as u8;
        }
        assert!(s.answer(&request, 8192).len() <= 8192 + 16);
        if rng.next().is_multiple_of(64) {
            let state = s.save();
            s.restore(&state).unwrap();
        }
    }
    assert_eq!(std::fs::read(directory.path().join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing beside the share");
}

#[test]
fn saved_nodes_and_handles_are_found_again() {
    let directory = tree();
    let shared = directory.path().join("shared");
    let mut s = server(&shared, false);
    let sub = lookup(&mut s, 1, b"sub").unwrap();
    let file = lookup(&mut s, sub, b"file").unwrap();
    let handle = open(&mut s, file, 0).unwrap();
    let state = s.save();
    let mut again = server(&shared, false);
    again.restore(&state).unwrap();
    assert_eq!(read(&mut again, handle, 0, 100).unwrap(), b"content");
    assert_eq!(lookup(&mut again, sub, b"file"), Ok(file));
    std::fs::rename(shared.join("sub"), shared.join("other")).unwrap();
    let mut gone = server(&shared, false);
    gone.restore(&state).unwrap();
    assert_eq!(lookup(&mut gone, sub, b"file"), Err(STALE));
}
