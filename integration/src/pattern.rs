//! Bytes that say where they belong: whoever receives them tells what is lost, doubled or out of place, which
//! is more than a checksum does.

use std::io::{self, Read, Write};

/// Bytes are made and checked this many at a time.
pub const CHUNK: usize = 64 << 10;

/// The 8 bytes at `8 * index` of the stream `seed`.
fn word(seed: u64, index: u64) -> [u8; 8] {
    let mut mixed = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 32)).to_le_bytes()
}

/// Fills `buffer` with what belongs at `offset`, a multiple of 8, of the stream `seed`.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    for (index, part) in (offset / 8..).zip(buffer.chunks_mut(8)) {
        part.copy_from_slice(&word(seed, index)[..part.len()]);
    }
}

/// The first `length` bytes of the stream `seed`.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(seed, 0, &mut bytes);
    bytes
}

/// Where `bytes` are not what belongs at `offset`, a multiple of 8, of the stream `seed`.
pub fn wrong(seed: u64, offset: u64, bytes: &[u8]) -> Option<u64> {
    (offset / 8..).zip(bytes.chunks(8)).find_map(|(index, part)| {
        let expected = word(seed, index);
        let at = part.iter().zip(expected).position(|(found, expected)| *found != expected)?;
        Some(index * 8 + at as u64)
    })
}

/// Writes the first `length` bytes of the stream `seed`.
pub fn send(to: impl Write, seed: u64, length: u64) -> io::Result<()> {
    send_in_pieces(to, seed, length, || CHUNK)
}

/// [`send`], in pieces as large as `next` says; 0 counts as 1.
pub fn send_in_pieces(
    mut to: impl Write,
    seed: u64,
    length: u64,
    mut next: impl FnMut() -> usize,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while offset < length {
        let part = &mut buffer[..CHUNK.min(usize::try_from(length - offset).unwrap_or(CHUNK))];
        fill(seed, offset, part);
        let mut rest = &*part;
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(next().clamp(1, rest.len()));
            to.write_all(piece)?;
            rest = behind;
        }
        offset += part.len() as u64;
    }
    to.flush()
}

/// Sizes from 1 to `most` without an order, the same ones for the same seed.
pub fn sizes(seed: u64, most: usize) -> impl FnMut() -> usize {
    let mut index = 0;
    move || {
        index += 1;
        let number = u64::from_le_bytes(word(seed, index));
        // Less than `most`.
        1 + (number % most.max(1) as u64) as usize
    }
}

/// Reads `length` bytes, which must be the first ones of the stream `seed`.
pub fn receive(mut from: impl Read, seed: u64, length: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    while offset < length {
        let part = &mut buffer[..CHUNK.min(usize::try_from(length - offset).unwrap_or(CHUNK))];
        from.read_exact(part)
            .map_err(|error| io::Error::new(error.kind(), format!("after {offset} bytes: {error}")))?;
        if let Some(at) = wrong(seed, offset, part) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("byte {at} is wrong")));
        }
        offset += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_received_and_nothing_else() {
        for length in [0, 1, 7, 8, CHUNK as u64, 3 * CHUNK as u64 + 5] {
            let mut wire = Vec::new();
            send(&mut wire, 3, length).unwrap();
            assert_eq!(wire, bytes(3, length as usize));
            receive(wire.as_slice(), 3, length).unwrap();
            assert!(receive(wire.as_slice(), 3, length + 1).is_err());
            if length > 0 {
                assert!(receive(wire.as_slice(), 4, length).is_err(), "another stream");
                let last = wire.len() - 1;
                wire[last] ^= 1;
                let error = receive(wire.as_slice(), 3, length).unwrap_err();
                assert!(error.to_string().contains(&format!("byte {last} ")), "{error}");
            }
        }
    }

    #[test]
    fn pieces_are_as_large_as_they_are_to_be_and_carry_the_same() {
        let mut pieces = Vec::new();
        let mut next = sizes(1, 1500);
        let length = 3 * CHUNK as u64 + 5;
        let mut wire = Vec::new();
        send_in_pieces(&mut wire, 2, length, || {
            pieces.push(next());
            pieces.last().copied().unwrap()
        })
        .unwrap();
        assert_eq!(wire, bytes(2, length as usize));
        assert!(pieces.iter().all(|piece| (1..=1500).contains(piece)));
        assert!(pieces.iter().any(|piece| *piece < 100) && pieces.iter().any(|piece| *piece > 1400));
    }

    #[test]
    fn a_part_that_moved_is_noticed() {
        let mut bytes = bytes(1, 64);
        bytes.rotate_left(8);
        assert_eq!(wrong(1, 0, &bytes), Some(0));
        assert_eq!(wrong(1, 8, &bytes[..56]), None);
    }
}
