//! CRI log lines out of a byte stream. Pure.
//!
//! A line is `<RFC3339Nano> <stream> <F|P> <text>`: `F` where the process ended its line, `P` where the line goes on in
//! the next entry, or the stream ended without a newline. Joining the texts, with a newline after each `F`, gives back
//! every byte.

use std::time::SystemTime;

use super::Stream;
use crate::timestamp::append_rfc3339_nano;

/// Longest text of one entry; longer lines are split.
pub const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Splits one stream. Keeps at most [`MAX_TEXT_BYTES`] of an unfinished line.
#[derive(Debug)]
pub struct Framer {
    stream: Stream,
    unfinished: Vec<u8>,
}

impl Framer {
    /// At the beginning of a stream.
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            unfinished: Vec::new(),
        }
    }

    /// Takes bytes, appends the entries they complete.
    pub fn push(&mut self, now: SystemTime, input: &[u8], out: &mut Vec<u8>) {
        for piece in input.split_inclusive(|byte| *byte == b'\n') {
            let (mut text, ended) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            while self.unfinished.len() + text.len() > MAX_TEXT_BYTES {
                let (head, tail) = text.split_at(MAX_TEXT_BYTES - self.unfinished.len());
                self.entry(now, b'P', head, out);
                text = tail;
            }
            if ended {
                self.entry(now, b'F', text, out);
            } else {
                self.unfinished.extend_from_slice(text);
            }
        }
    }

    /// The stream has ended: appends what is left.
    pub fn finish(&mut self, now: SystemTime, out: &mut Vec<u8>) {
        if !self.unfinished.is_empty() {
            self.entry(now, b'P', &[], out);
        }
    }

    fn entry(&mut self, now: SystemTime, tag: u8, text: &[u8], out: &mut Vec<u8>) {
        append_rfc3339_nano(now, out);
        out.push(b' ');
        out.extend_from_slice(self.stream.name().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.append(&mut self.unfinished);
        out.extend_from_slice(text);
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    fn frame(chunks: &[&[u8]]) -> Vec<u8> {
        let (mut framer, mut out) = (Framer::new(Stream::Stdout), Vec::new());
        for chunk in chunks {
            framer.push(UNIX_EPOCH, chunk, &mut out);
        }
        framer.finish(UNIX_EPOCH, &mut out);
        out
    }

    /// Tags and texts of the entries.
    fn entries(framed: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let prefix = b"1970-01-01T00:00:00.000000000Z stdout ";
        framed
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| {
                let rest = line
                    .strip_prefix(prefix.as_slice())
                    .unwrap()
                    .strip_suffix(b"\n")
                    .unwrap();
                assert_eq!(rest[1], b' ');
                (rest[0], rest[2..].to_vec())
            })
            .collect()
    }

    fn join(entries: &[(u8, Vec<u8>)]) -> Vec<u8> {
        entries
            .iter()
            .flat_map(|(tag, text)| text.iter().copied().chain((*tag == b'F').then_some(b'\n')))
            .collect()
    }

    #[test]
    fn lines_and_their_ends() {
        let framed = frame(&[b"one\nt", b"wo\n\nend"]);
        let expected = [
            (b'F', b"one".to_vec()),
            (b'F', b"two".to_vec()),
            (b'F', Vec::new()),
            (b'P', b"end".to_vec()),
        ];
        assert_eq!(entries(&framed), expected);
        assert!(frame(&[]).is_empty());
    }

    #[test]
    fn a_line_of_the_limit_is_whole_and_one_byte_more_is_split() {
        let mut line = vec![b'x'; MAX_TEXT_BYTES];
        line.push(b'\n');
        assert_eq!(entries(&frame(&[&line])), [(b'F', vec![b'x'; MAX_TEXT_BYTES])]);
        line.insert(0, b'x');
        assert_eq!(
            entries(&frame(&[&line])),
            [(b'P', vec![b'x'; MAX_TEXT_BYTES]), (b'F', b"x".to_vec())]
        );
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_whatever_the_segmentation(
            pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..50), 0_usize..40_000, any::<bool>()), 0..8),
            cuts in prop::collection::vec(1_usize..20_000, 1..20),
        ) {
            let mut input = Vec::new();
            for (bytes, run, newline) in pieces {
                input.extend(bytes);
                input.extend(std::iter::repeat_n(b'y', run));
                if newline { input.push(b'\n'); }
            }
            let mut chunks: Vec<&[u8]> = Vec::new();
            let mut rest = input.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                chunks.push(head);
                rest = tail;
            }
            let entries = entries(&frame(&chunks));
            prop_assert!(entries.iter().all(|(_, text)| text.len() <= MAX_TEXT_BYTES));
            prop_assert_eq!(join(&entries), input.clone());
            // The entries depend on the bytes alone.
            let whole = frame(&[&input]);
            prop_assert_eq!(frame(&chunks), whole);
        }
    }
}
