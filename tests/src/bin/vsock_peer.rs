//! The guest's end of the test of sockets (`tests/tests/devices.rs`): calls the host's port 7000, gives it what it says and takes
//! what comes back; then serves port 5000: each connection gets back what it sends, three in all, at the same time.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

const CALLS: u32 = 7000;
const SERVES: u32 = 5000;

fn main() -> std::io::Result<()> {
    let mut stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, CALLS)?;
    let given: Vec<u8> = (0..1u32 << 19).flat_map(u32::to_le_bytes).collect();
    let mut writer = stream.try_clone()?;
    let sent = given.clone();
    let writing =
        std::thread::spawn(move || writer.write_all(&sent).and_then(|()| writer.shutdown(Shutdown::Write)));
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    writing.join().map_err(|_| std::io::Error::other("the writer panicked"))??;
    let is_same = back.iter().map(|byte| !byte).eq(given);
    println!("CALLED {} {is_same}", back.len());
    let refused = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, CALLS + 1);
    println!("REFUSED {}", refused.is_err());

    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, SERVES)?;
    println!("SERVING");
    let serve = |mut stream: VsockStream| {
        std::thread::spawn(move || -> std::io::Result<u64> {
            let mut writer = stream.try_clone()?;
            let count = std::io::copy(&mut stream, &mut writer)?;
            writer.shutdown(Shutdown::Write)?;
            Ok(count)
        })
    };
    let streams: Vec<_> = (0..3).map(|_| listener.accept().map(|(stream, _)| serve(stream))).collect();
    for thread in streams {
        let count = thread?.join().map_err(|_| std::io::Error::other("a server panicked"))??;
        println!("SERVED {count}");
    }
    Ok(())
}
