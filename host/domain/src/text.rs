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

/// A text from outside in one line that can be shown or logged: characters that are invisible, end the line, change the colour
/// or turn the direction of what follows are escaped (`\\n`, `\\u{1b}`), and what is longer than so many characters is cut.
#[must_use]
pub fn one_line(text: &str, max_chars: usize) -> String {
    let mut line = String::new();
    for (place, c) in text.chars().enumerate() {
        if place == max_chars {
            line.push_str(CUT);
            break;
        }
        let plain = c == ' ' || c == '\'' || c == '"' || c == '\\';
        let turns = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if turns {
            line.extend(c.escape_unicode());
        } else if plain {
            line.push(c);
        } else {
            line.extend(c.escape_debug());
        }
    }
    line
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
    fn a_text_from_outside_becomes_one_harmless_line() {
        for (text, shown) in [
            ("web-3 is \"up\", it's ü", "web-3 is \"up\", it's ü"),
            ("a\nFAKE log line", "a\\nFAKE log line"),
            ("\u{1b}[31mred\u{7}", "\\u{1b}[31mred\\u{7}"),
            ("\u{202e}evil\u{2028}", "\\u{202e}evil\\u{2028}"),
            ("0123456789abc", "0123456789…"),
        ] {
            assert_eq!(
                one_line(text, if text.len() == 13 { 10 } else { 100 }),
                shown
            );
        }
    }

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
