//! What the two ends of a test's stream say to each other: the first bytes ask for one of a few things.

use std::io::{self, Read, Write};

use crate::pattern;

/// What the end that answers is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// To take the bytes of a pattern, and to say at the end that they were right.
    Take,
    /// To give the bytes of a pattern.
    Give,
    /// To give them in pieces of at most [`PIECE`] bytes.
    GivePieces,
    /// To send back everything as it comes.
    Echo,
    /// To read to the end of the other direction, and only then to give the bytes of a pattern.
    GiveAfterEnd,
}

/// What fits into one packet of most networks.
pub const PIECE: usize = 1500;

/// The answer to [`Ask::Take`].
const RIGHT: &[u8; 8] = b"as sent\n";

const ASKS: [(Ask, u8); 5] = [
    (Ask::Take, b'T'),
    (Ask::Give, b'G'),
    (Ask::GivePieces, b'P'),
    (Ask::Echo, b'E'),
    (Ask::GiveAfterEnd, b'H'),
];

/// Asks for `what`, with a pattern's number and length.
pub fn ask(mut to: impl Write, what: Ask, seed: u64, length: u64) -> io::Result<()> {
    let letter = ASKS.iter().find(|(ask, _)| *ask == what).map_or(0, |(_, letter)| *letter);
    let mut head = vec![letter];
    head.extend(seed.to_le_bytes());
    head.extend(length.to_le_bytes());
    to.write_all(&head)
}

/// Reads the end of [`Ask::Take`].
pub fn taken(mut from: impl Read) -> io::Result<()> {
    let mut answer = [0; RIGHT.len()];
    from.read_exact(&mut answer)?;
    if answer == *RIGHT { Ok(()) } else { Err(io::Error::other("the other end did not get what was sent")) }
}

/// Answers on `stream` whatever is asked for.
pub fn answer<S>(stream: &S) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let (mut from, mut to) = (stream, stream);
    let mut head = [0; 17];
    from.read_exact(&mut head)?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| head[at + index]));
    let (seed, length) = (number(1), number(9));
    match ASKS.iter().find(|(_, letter)| *letter == head[0]).map(|(ask, _)| *ask) {
        Some(Ask::Take) => {
            pattern::receive(from, seed, length)?;
            to.write_all(RIGHT)
        }
        Some(Ask::Give) => pattern::send(to, seed, length),
        Some(Ask::GivePieces) => pattern::send_in_pieces(to, seed, length, pattern::sizes(seed, PIECE)),
        Some(Ask::Echo) => io::copy(&mut from, &mut to).map(drop),
        Some(Ask::GiveAfterEnd) => {
            io::copy(&mut from, &mut io::sink())?;
            pattern::send(to, seed, length)
        }
        None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("asked for {:#04x}", head[0]))),
    }
}
