//! Hides secrets in a stream of bytes, also where a secret is split between two pieces of it.

/// What stands where a secret stood.
pub const MASK: &[u8] = b"[secret]";

/// Replaces every occurrence of some secrets in a stream. Bytes that may be the begin of a secret are held back until it is
/// known; [`Masker::finish`] gives them out.
#[derive(Debug, Default)]
pub struct Masker {
    /// Longest first, so that of two secrets with the same begin the longer one is hidden whole.
    secrets: Vec<Vec<u8>>,
    held: Vec<u8>,
}

impl Masker {
    /// Hides these texts. Empty ones are ignored; of one with several lines each line is hidden too, since tools print them singly.
    #[must_use]
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for secret in secrets {
            all.push(secret.into());
            if secret.contains('\n') {
                // Single characters, such as a closing brace, are no secrets of their own.
                all.extend(
                    secret
                        .lines()
                        .map(str::trim)
                        .filter(|line| line.len() >= 4)
                        .map(Into::into),
                );
            }
        }
        all.retain(|secret| !secret.is_empty());
        all.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        all.dedup();
        Self {
            secrets: all,
            held: Vec::new(),
        }
    }

    /// Takes the next piece; gives what can be shown of it and of what was held back.
    #[must_use]
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        if self.secrets.is_empty() {
            return piece.to_vec();
        }
        let mut input = std::mem::take(&mut self.held);
        input.extend_from_slice(piece);
        let (output, used) = self.scan(&input, false);
        self.held = input.split_off(used);
        output
    }

    /// The stream has ended: gives what was held back.
    #[must_use]
    pub fn finish(&mut self) -> Vec<u8> {
        let input = std::mem::take(&mut self.held);
        self.scan(&input, true).0
    }

    /// A whole text with its secrets hidden.
    #[must_use]
    pub fn text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.scan(text.as_bytes(), true).0).into_owned()
    }

    fn scan(&self, input: &[u8], ended: bool) -> (Vec<u8>, usize) {
        let mut output = Vec::with_capacity(input.len());
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            let unfinished =
                |secret: &Vec<u8>| !ended && secret.len() > rest.len() && secret.starts_with(rest);
            if self.secrets.iter().any(unfinished) {
                break;
            }
            match self.secrets.iter().find(|secret| rest.starts_with(secret)) {
                Some(secret) => {
                    output.extend_from_slice(MASK);
                    at += secret.len();
                }
                None => {
                    output.push(rest[0]);
                    at += 1;
                }
            }
        }
        (output, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_split_gives_the_same_text() {
        let secrets = ["hunter2", "hunter22", "aab"];
        let text = "x hunter2 hunter22 hunter aaab hunterhunter2y aa";
        let expect = "x [secret] [secret] hunter a[secret] hunter[secret]y aa";
        for first in 0..=text.len() {
            for second in first..=text.len() {
                let mut masker = Masker::new(secrets);
                let mut out = masker.push(&text.as_bytes()[..first]);
                out.extend(masker.push(&text.as_bytes()[first..second]));
                out.extend(masker.push(&text.as_bytes()[second..]));
                out.extend(masker.finish());
                assert_eq!(String::from_utf8(out).unwrap(), expect, "{first} {second}");
            }
        }
        assert_eq!(Masker::new(secrets).text(text), expect);
    }

    #[test]
    fn lines_of_a_secret_are_hidden_and_nothing_else_is() {
        let masker = Masker::new(["-----KEY\nabcdef\n}\n", ""]);
        assert_eq!(masker.text("a abcdef } b"), "a [secret] } b");
    }
}
