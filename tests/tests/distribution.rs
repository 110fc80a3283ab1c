//! A whole Debian on a disk, as `trellis image fetch debian --rootfs` builds it: two processors, login on the serial line,
//! network, apt, ssh, a compiler, and a load that checks itself.
//!
//! Long, since building the disk fetches a distribution; `cargo xtask distribution` does both. The disk is only read: what the
//! guest writes goes to a temporary file.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use machine_tests::shell::Shell;
use machine_tests::{Machine, text};

/// A boot takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(300);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// A package that installs one program, in a repository of its own.
fn repository(directory: &Path) {
    let tree = directory.join("tree");
    for (name, content) in [
        (
            "DEBIAN/control",
            "Package: trellis-greeting\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n\
             Description: says where it came from\n",
        ),
        ("usr/bin/greeting", "#!/bin/sh\necho installed over the network\n"),
    ] {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("a directory");
        std::fs::write(&path, content).expect("a file");
    }
    use std::os::unix::fs::PermissionsExt as _;
    let program = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(tree.join("usr/bin/greeting"), program).expect("a mode");
    let deb = directory.join("greeting.deb");
    let built = Command::new("dpkg-deb").args(["--root-owner-group", "-b", text(&tree), text(&deb)]).output();
    let built = built.expect("dpkg-deb runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let sum = Command::new("sha256sum").arg(&deb).output().expect("sha256sum runs").stdout;
    let sum = String::from_utf8_lossy(&sum[..64]).into_owned();
    let control = std::fs::read_to_string(tree.join("DEBIAN/control")).expect("it was written");
    let size = std::fs::metadata(&deb).expect("it was built").len();
    let index = format!("{control}Filename: ./greeting.deb\nSize: {size}\nSHA256: {sum}\n");
    std::fs::write(directory.join("Packages"), index).expect("a file");
}

/// Serves the files of a directory over HTTP on the loopback; says at which port.
fn serve(directory: &Path) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("it has one").port();
    let directory = directory.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let directory = directory.clone();
            std::thread::spawn(move || answer(stream, &directory));
        }
    });
    port
}

/// One connection: a request, an answer, the end.
fn answer(mut stream: TcpStream, directory: &Path) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut request = String::new();
    reader.read_line(&mut request).ok()?;
    let mut line = String::from("x");
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line).ok()?;
    }
    let name = request.split(' ').nth(1)?.rsplit('/').next()?.to_owned();
    let head = "Content-Type: application/octet-stream\r\nConnection: close\r\nContent-Length";
    match std::fs::read(directory.join(&name)) {
        Ok(content) => {
            write!(stream, "HTTP/1.1 200 OK\r\n{head}: {}\r\n\r\n", content.len()).ok()?;
            stream.write_all(&content).ok()
        }
        Err(_) => write!(stream, "HTTP/1.1 404 Not Found\r\n{head}: 0\r\n\r\n").ok(),
    }
}

/// The banner of an SSH server, which takes its time at first.
fn ssh_banner(port: u16) -> String {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            let mut banner = [0; 8];
            let _patience = stream.set_read_timeout(Some(Duration::from_secs(20)));
            if stream.read_exact(&mut banner).is_ok() {
                return String::from_utf8_lossy(&banner).into_owned();
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    String::new()
}

/// `uname -r` by ssh, with a key that the guest was given on the console.
fn by_ssh(port: u16, key: &Path) -> String {
    let output = Command::new("ssh")
        .args(["-p", &port.to_string(), "-i", text(key), "-o", "BatchMode=yes", "-o", "ConnectTimeout=60"])
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1"])
        .args(["echo", "by-ssh", "$(nproc)"])
        .output()
        .expect("ssh runs");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
#[ignore = "long: needs a disk that cargo xtask distribution builds"]
fn debian_boots_to_login_and_does_a_day_s_work() {
    let directory = tempfile::tempdir().expect("a directory");
    repository(directory.path());
    let packages = serve(directory.path());
    let (ssh, perf) = (free_port(), free_port());
    let forwards = [format!("tcp:{ssh}:22"), format!("tcp:{perf}:5201")];
    let machine = Machine::start_on_terminal(&[
        "boot",
        "debian-rootfs",
        "--engine",
        "bt",
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--snapshot",
        "--forward",
        &forwards[0],
        "--forward",
        &forwards[1],
    ]);
    let mut shell = Shell::login(machine);
    assert_eq!(shell.must("nproc"), "2");
    assert_eq!(shell.must("systemctl --failed --no-legend --plain | wc -l"), "0");
    assert!(shell.must("networkctl --no-pager --no-legend").contains("routable"));
    let line = format!("deb [trusted=yes] http://10.0.2.2:{packages} ./");
    shell.must("mkdir /root/away && mv /etc/apt/sources.list* /root/away");
    shell.must(&format!("echo '{line}' > /etc/apt/sources.list && apt-get -q update"));
    shell.must("apt-get -q -y install trellis-greeting");
    assert_eq!(shell.must("greeting"), "installed over the network");
    shell.must(
        "printf '#include <stdio.h>\\nint main(void) { return puts(\"compiled here\") < 0; }\\n' > h.c",
    );
    assert_eq!(shell.must("gcc -O2 -Wall -o h h.c && ./h"), "compiled here");
    let load =
        "stress-ng --cpu 2 --vm 1 --vm-bytes 64M --hdd 1 --hdd-bytes 64M --switch 1 --verify --timeout 8";
    let load = shell.must(&format!("{load} 2>&1"));
    assert!(load.contains("successful run completed"), "{load}");
    // Out to the host's loopback, and in again by the forwarded port.
    shell.must("iperf3 -s -D && sleep 1");
    let rate = shell.must(&format!("iperf3 -c 10.0.2.2 -p {perf} -t 2 2>&1"));
    assert!(rate.contains("iperf Done"), "{rate}");
    assert_eq!(ssh_banner(ssh), "SSH-2.0-");
    let key = directory.path().join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", text(&key)]).status();
    if made.is_ok_and(|status| status.success()) {
        let public = std::fs::read_to_string(key.with_extension("pub")).expect("it was made");
        shell.must(&format!("mkdir -p .ssh && echo '{}' >> .ssh/authorized_keys", public.trim()));
        let said = by_ssh(ssh, &key);
        assert!(said.contains("by-ssh 2"), "{said}");
    } else {
        println!("ssh-keygen is not installed here: sshd answered, no session was tried");
    }
    shell.machine.send("poweroff\n");
    let ended = shell.machine.finish(PATIENCE);
    assert_eq!(ended.status, Some(0), "{}", ended.output);
}
