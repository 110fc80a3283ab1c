//! The kernel inside of a bzImage (Linux, Documentation/arch/x86/boot.rst, protocol 2.08): `payload_offset` and `payload_length` say where its
//! compressed ELF file is.

use std::io::Read as _;

/// Offsets in the setup header.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LEN: usize = 0x24c;
/// No kernel is longer.
const MAX_LEN: u64 = 512 << 20;
/// The most that a block of the old LZ4 format makes.
const LZ4_BLOCK: usize = 8 << 20;

/// The ELF file in a bzImage; `None` if `file` is none.
///
/// # Errors
/// One line: it cannot be taken out.
pub fn kernel(file: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if file.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Ok(None);
    }
    let payload = payload(file).ok_or("a kernel image that is cut short, or older than 2.6.26")?;
    let mut kernel = Vec::new();
    let read = |from: &mut dyn std::io::Read, to: &mut Vec<u8>| {
        // Some kernels have more behind the last byte that counts.
        let result = from.take(MAX_LEN).read_to_end(to).map_err(|error| error.to_string());
        if to.starts_with(b"\x7fELF") { Ok(()) } else { result.map(drop) }
    };
    match payload {
        [0xfd, b'7', b'z', ..] => read(&mut lzma_rust2::XzReader::new(payload, false), &mut kernel)?,
        [0x1f, 0x8b, ..] => read(&mut flate2::read::GzDecoder::new(payload), &mut kernel)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder =
                ruzstd::decoding::StreamingDecoder::new(payload).map_err(|error| error.to_string())?;
            read(&mut decoder, &mut kernel)?;
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => kernel = lz4(blocks)?,
        _ => return Err("a kernel compressed by none of gzip, xz, zstd, lz4".to_owned()),
    }
    Ok(Some(kernel))
}

fn payload(file: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?) as usize);
    let sectors = match *file.get(SETUP_SECTORS)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = ((sectors + 1) * 512).checked_add(word(PAYLOAD_OFFSET)?)?;
    file.get(start..start.checked_add(word(PAYLOAD_LEN)?)?).filter(|payload| !payload.is_empty())
}

/// Blocks, each with its length before it.
fn lz4(mut blocks: &[u8]) -> Result<Vec<u8>, String> {
    let mut all = Vec::new();
    while let Some((len, rest)) = blocks.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        // What follows the last block is the length of the whole, as every payload has it.
        let Some(block) = rest.get(..len).filter(|_| len > 0) else { break };
        let made = lz4_flex::block::decompress(block, LZ4_BLOCK).map_err(|error| error.to_string())?;
        all.extend_from_slice(&made);
        if all.len() as u64 > MAX_LEN {
            return Err("a kernel that is too large".to_owned());
        }
        blocks = &rest[len..];
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[SETUP_SECTORS] = 1;
        file[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        file[PAYLOAD_LEN..PAYLOAD_LEN + 4]
            .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        file.extend_from_slice(payload);
        file
    }

    #[test]
    fn lz4_blocks_become_the_kernel() {
        // A block of four literals, `ELF!`.
        let payload = b"\x02\x21\x4c\x18\x05\0\0\0\x40ELF!\x05\0\0\0\x40more\x08\0\0\0";
        assert_eq!(kernel(&image(payload)).unwrap().unwrap(), b"ELF!more");
    }

    #[test]
    fn what_is_no_kernel_or_a_broken_one_is_told_apart() {
        assert_eq!(kernel(b"no kernel").unwrap(), None);
        assert!(kernel(&image(b"????")).unwrap_err().contains("none of"));
        assert!(kernel(&image(b"\xfd7zXZ\0\0\0")).is_err());
        assert!(kernel(&image(b"")).unwrap_err().contains("cut short"));
    }
}
