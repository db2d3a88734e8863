//! Markers in the guest's console text.
//!
//! Any process in the guest that may print can print a marker. They are hints for people and for
//! triggers that a person asked for; nothing is trusted because of one.

/// Longer lines lose their tail, so a guest cannot make the host remember without bound.
pub const MAX_LINE: usize = 4096;

/// Text to look for, and a number by which whoever asked for it knows it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    /// Reported when the text was seen.
    pub id: u32,
    /// Found anywhere in a line. Empty text is found in no line.
    pub text: Vec<u8>,
}

/// Cuts a stream of bytes into lines and finds markers in them, each once per line.
#[derive(Debug, Default)]
pub struct LineScanner {
    markers: Vec<Marker>,
    line: Vec<u8>,
}

impl LineScanner {
    /// Looks for these.
    pub fn new(markers: Vec<Marker>) -> Self {
        Self { markers, line: Vec::new() }
    }

    /// Takes the next bytes and reports the markers of every line that they finish.
    pub fn scan(&mut self, bytes: &[u8], mut seen: impl FnMut(u32)) {
        if self.markers.is_empty() {
            return;
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, complete) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            let room = MAX_LINE - self.line.len();
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if complete {
                for marker in &self.markers {
                    if contains(&self.line, &marker.text) {
                        seen(marker.id);
                    }
                }
                self.line.clear();
            }
        }
    }
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    !text.is_empty() && line.windows(text.len()).any(|window| window == text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn marker(id: u32, text: &str) -> Marker {
        Marker { id, text: text.into() }
    }

    fn seen(scanner: &mut LineScanner, bytes: &[u8]) -> Vec<u32> {
        let mut ids = Vec::new();
        scanner.scan(bytes, |id| ids.push(id));
        ids
    }

    #[test]
    fn markers_are_found_anywhere_in_a_finished_line() {
        let cases: &[(&str, &[u32])] = &[
            ("ready\n", &[1]),
            ("[ 1.2] ready now\r\n", &[1]),
            ("ready", &[]),
            ("rea\ndy\n", &[]),
            ("ready ready\n", &[1]),
            ("done ready\n", &[1, 2]),
            ("done\nready\n", &[2, 1]),
            ("\n\n", &[]),
        ];
        for (text, ids) in cases {
            let mut scanner = LineScanner::new(vec![marker(1, "ready"), marker(2, "done"), marker(3, "")]);
            assert_eq!(seen(&mut scanner, text.as_bytes()), *ids, "{text:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let mut scanner = LineScanner::new(vec![marker(1, "ready")]);
        assert!(seen(&mut scanner, b"rea").is_empty());
        assert!(seen(&mut scanner, b"dy").is_empty());
        assert_eq!(seen(&mut scanner, b"\n"), [1]);
        assert!(seen(&mut scanner, b"\n").is_empty(), "the line is over");
    }

    #[test]
    fn the_tail_of_an_endless_line_is_dropped() {
        let mut scanner = LineScanner::new(vec![marker(1, "ready")]);
        for _ in 0..100 {
            assert!(seen(&mut scanner, &[b'x'; 1000]).is_empty());
        }
        assert_eq!(scanner.line.len(), MAX_LINE);
        assert!(seen(&mut scanner, b"ready\n").is_empty());
        assert_eq!(seen(&mut scanner, b"ready\n"), [1]);
    }

    proptest! {
        #[test]
        fn cutting_the_stream_differently_changes_nothing(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a'), Just(b'b')], 0..200),
            cut in 1usize..50,
        ) {
            let markers = vec![marker(1, "ab"), marker(2, "bba")];
            let whole = seen(&mut LineScanner::new(markers.clone()), &bytes);
            let mut scanner = LineScanner::new(markers);
            let pieces: Vec<u32> = bytes.chunks(cut).flat_map(|piece| seen(&mut scanner, piece)).collect();
            prop_assert_eq!(whole, pieces);
        }
    }
}
