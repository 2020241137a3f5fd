//! Keeps the head and the tail of an output within the limit of a result. Source: spec "Invocations", "Output".

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// The most that a result's output may have, in bytes.
pub const MAX_OUTPUT_BYTES: usize = 24 * 1024;

const HEAD_BYTES: usize = 12 * 1024;
/// Leaves room for the line between the two.
const TAIL_BYTES: usize = MAX_OUTPUT_BYTES - HEAD_BYTES - 64;

/// The head and the tail of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
}

impl Capture {
    /// Takes the next piece.
    pub fn push(&mut self, mut piece: &[u8]) {
        self.total += piece.len() as u64;
        let room = HEAD_BYTES - self.head.len().min(HEAD_BYTES);
        let (first, rest) = piece.split_at(room.min(piece.len()));
        self.head.extend_from_slice(first);
        piece = &rest[rest.len().saturating_sub(TAIL_BYTES)..];
        let surplus = (self.tail.len() + piece.len()).saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
        self.tail.extend(piece);
    }

    /// The text for a result, and how many bytes of the stream are not in it. Bytes that are not UTF-8 are shown as `?`.
    #[must_use]
    pub fn render(&self) -> (String, u64) {
        let dropped = self.total - (self.head.len() + self.tail.len()) as u64;
        let (front, back): (Vec<u8>, Vec<u8>) =
            (self.head.clone(), self.tail.iter().copied().collect());
        let text = if dropped == 0 {
            readable(&[front, back].concat())
        } else {
            format!(
                "{}\n[… {dropped} bytes dropped …]\n{}",
                readable(&front),
                readable(&back)
            )
        };
        (text, dropped)
    }
}

/// Text of at most as many bytes as there are: the usual replacement character has three.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push('?');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_output_is_whole_and_long_output_keeps_both_ends() {
        let mut capture = Capture::default();
        capture.push(b"caf\xc3");
        capture.push(b"\xa9\xff");
        assert_eq!(capture.render(), ("café?".into(), 0));

        for step in [1, 7, 1000, 100_000] {
            let stream: Vec<u8> = (0..200_000u32).map(|n| b'a' + (n % 26) as u8).collect();
            let mut capture = Capture::default();
            stream.chunks(step).for_each(|piece| capture.push(piece));
            let (text, dropped) = capture.render();
            assert!(text.len() <= MAX_OUTPUT_BYTES, "{}", text.len());
            assert_eq!(dropped as usize, stream.len() - HEAD_BYTES - TAIL_BYTES);
            assert!(text.as_bytes().starts_with(&stream[..HEAD_BYTES]));
            assert!(
                text.as_bytes()
                    .ends_with(&stream[stream.len() - TAIL_BYTES..])
            );
            assert!(text.contains(&format!("{dropped} bytes dropped")));
        }
    }
}
