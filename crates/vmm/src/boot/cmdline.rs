//! The command line as a zero-terminated string.

use super::BootError;

/// Longest command line for protocols that set no limit of their own.
pub(super) const MAX: usize = 0x3fff;

/// `text` with a terminating zero.
///
/// # Errors
/// When it is longer than `max` bytes (without the zero) or contains a zero.
pub(super) fn terminated(text: &str, max: usize) -> Result<Vec<u8>, BootError> {
    if let Some(at) = text.bytes().position(|b| b == 0) {
        return Err(BootError::CommandLineNul { at });
    }
    if text.len() > max {
        return Err(BootError::CommandLineTooLong { len: text.len(), max });
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminated_checks_length_and_zero() {
        assert_eq!(terminated("a b", 3).unwrap(), b"a b\0");
        assert_eq!(terminated("", 0).unwrap(), b"\0");
        assert_eq!(terminated("abcd", 3), Err(BootError::CommandLineTooLong { len: 4, max: 3 }));
        assert_eq!(terminated("a\0b", 9), Err(BootError::CommandLineNul { at: 1 }));
    }
}
