//! Randomness from the host's kernel.

use std::io;

/// As much as getentropy gives in one call.
const CHUNK: usize = 256;

/// Fills `bytes`. Does not block once the host has booted.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    for chunk in bytes.chunks_mut(CHUNK) {
        // SAFETY: the pointer and the length are those of one slice that is ours to write.
        if unsafe { libc::getentropy(chunk.as_mut_ptr().cast(), chunk.len()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_around_the_chunk_are_filled_to_the_end() {
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 40] {
            let mut bytes = vec![0; len];
            fill(&mut bytes).unwrap();
            // Forty zeroes in a row have a chance of one in 2^320.
            assert!(bytes.len() < 40 || bytes[len - 40..].iter().any(|byte| *byte != 0));
        }
    }
}
