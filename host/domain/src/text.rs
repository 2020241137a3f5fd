//! Texts for people that come from elsewhere, kept to a length.
//!
//! Agents, plugins and archives write messages of any length; rows, events and headers hold short ones.

/// Longest message that a row, an event or a header holds, in bytes of UTF-8: what is longer is cut. Escaped as JSON it stays
/// below a row's limit.
pub const MESSAGE_MAX_BYTES: usize = 4096;
/// Longest reason that a person gives, in characters.
pub const REASON_MAX_CHARS: usize = 500;

/// What stands where a text was cut.
const CUT: &str = "…";

/// The name of a unit variant as JSON has it: `awaiting_confirmation` of `AwaitingConfirmation`.
pub(crate) fn code(value: impl std::fmt::Debug) -> String {
    let mut code = String::new();
    for c in format!("{value:?}").chars() {
        if c.is_ascii_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.push(c.to_ascii_lowercase());
    }
    code
}

/// The first of many, for people: `a, b and 3 more`. The texts of the others are not made.
pub fn first_of<T: AsRef<str>>(
    all: impl ExactSizeIterator<Item = T>,
    shown: usize,
    separator: &str,
) -> String {
    let more = all.len().saturating_sub(shown);
    let mut first = String::new();
    for (place, text) in all.take(shown).enumerate() {
        if place > 0 {
            first.push_str(separator);
        }
        first.push_str(text.as_ref());
    }
    match more {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// Cuts a text to [`MESSAGE_MAX_BYTES`].
pub fn cut_message(text: &mut String) {
    cut(text, MESSAGE_MAX_BYTES);
}

/// Cuts a text to so many bytes, between two characters; the end says so, where it has room to.
pub fn cut(text: &mut String, max_bytes: usize) {
    if text.len() <= max_bytes {
        return;
    }
    let mark = if max_bytes < CUT.len() { "" } else { CUT };
    text.truncate(text.floor_char_boundary(max_bytes - mark.len()));
    text.push_str(mark);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_variant_is_told_as_in_json() {
        for state in crate::progress::NodeState::ALL {
            assert_eq!(serde_json::json!(code(state)), serde_json::json!(state));
        }
    }

    #[test]
    fn of_many_the_first_are_named() {
        assert_eq!(first_of(["a", "b"].iter(), 2, ", "), "a, b");
        assert_eq!(first_of(["a", "b", "c"].iter(), 2, "; "), "a; b and 1 more");
        assert_eq!(first_of(std::iter::empty::<&str>(), 2, ", "), "");
    }

    proptest! {
        #[test]
        fn a_cut_text_is_a_beginning_and_fits(text in ".{0,40}", max in 0_usize..60) {
            let mut short = text.clone();
            cut(&mut short, max);
            prop_assert!(short.len() <= max);
            prop_assert!(text.starts_with(short.trim_end_matches(CUT)));
            prop_assert_eq!(text.len() <= max, short == text);
        }
    }
}
