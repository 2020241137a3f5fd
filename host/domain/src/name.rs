//! Names: parsed once at the edge, valid inside.
//!
//! Each kind of name is a type of its own, so that a name of one kind cannot stand where another is wanted. Every refusal
//! says which field, which rule, and the limit with the figure that was found.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a value is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidValue {
    /// What is wrong, in a sentence that names the rule.
    pub message: String,
    /// The limit that was not kept, where it is a figure.
    pub limit: Option<u64>,
    /// The figure that was found.
    pub current: Option<u64>,
}

impl InvalidValue {
    /// A value that breaks a rule without a figure.
    #[must_use]
    pub fn rule(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            limit: None,
            current: None,
        }
    }

    /// A value beyond a limit.
    #[must_use]
    pub fn limit(message: impl Into<String>, limit: u64, current: u64) -> Self {
        Self {
            message: message.into(),
            limit: Some(limit),
            current: Some(current),
        }
    }
}

/// How many characters a text may have: `min` to `max`.
///
/// # Errors
/// [`InvalidValue`] with the limit that was not kept.
pub fn check_length(what: &str, text: &str, min: usize, max: usize) -> Result<(), InvalidValue> {
    let found = text.chars().count();
    let limit = if found < min {
        min
    } else if found > max {
        max
    } else {
        return Ok(());
    };
    Err(InvalidValue::limit(
        format!("{what} has {found} characters: {min} to {max} are allowed"),
        limit as u64,
        found as u64,
    ))
}

struct Rule {
    what: &'static str,
    min: usize,
    max: usize,
    allowed: fn(char) -> bool,
    first: fn(char) -> bool,
    last: fn(char) -> bool,
    /// The same rule, without the length, as the regular expression of the OpenAPI document. A test compares the two.
    pattern: &'static str,
    says: &'static str,
}

fn check(rule: &Rule, text: &str) -> Result<(), InvalidValue> {
    check_length(rule.what, text, rule.min, rule.max)?;
    let bad = |why: String| {
        Err(InvalidValue::rule(format!(
            "{} {why}: {}",
            rule.what, rule.says
        )))
    };
    if let Some(wrong) = text.chars().find(|c| !(rule.allowed)(*c)) {
        return bad(format!("contains {wrong:?}"));
    }
    if let Some(first) = text.chars().next().filter(|c| !(rule.first)(*c)) {
        return bad(format!("starts with {first:?}"));
    }
    if let Some(last) = text.chars().next_back().filter(|c| !(rule.last)(*c)) {
        return bad(format!("ends with {last:?}"));
    }
    Ok(())
}

fn letter(c: char) -> bool {
    c.is_ascii_alphabetic()
}

fn lower(c: char) -> bool {
    c.is_ascii_lowercase()
}

fn alphanumeric(c: char) -> bool {
    c.is_ascii_alphanumeric()
}

fn path_char(c: char) -> bool {
    alphanumeric(c)
        || matches!(
            c,
            '/' | '-' | '_' | '.' | '~' | '%' | '+' | ',' | ':' | '@' | '!'
        )
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident = $rule:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            const RULE: Rule = $rule;

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidValue;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                check(&Self::RULE, &text)?;
                Ok(Self(text))
            }
        }

        impl FromStr for $name {
            type Err = InvalidValue;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .min_length(Some(Self::RULE.min))
                    .max_length(Some(Self::RULE.max))
                    .pattern(Some(Self::RULE.pattern))
                    .description(Some(Self::RULE.says))
                    .build()
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    )*

        /// Every rule, with whether a text parses under it.
        #[cfg(test)]
        const RULES: &[(Rule, fn(&str) -> bool)] =
            &[$(($name::RULE, |text| text.parse::<$name>().is_ok())),*];
    };
}

names! {
    /// A workspace's identifier. Source: spec "Workspaces".
    WorkspaceName = Rule {
        what: "the workspace identifier", min: 2, max: 40,
        allowed: |c| lower(c) || c.is_ascii_digit() || c == '-', first: lower, last: alphanumeric,
        pattern: r"^[a-z](?:[a-z0-9-]*[a-z0-9])?$",
        says: "lower-case letters, digits and `-`; starts with a letter, ends with a letter or digit",
    };
    /// A cell's identifier, unique in its workspace. Source: spec "Workspaces", "Cells".
    CellName = Rule {
        what: "the cell identifier", min: 1, max: 40,
        allowed: |c| lower(c) || c.is_ascii_digit() || c == '-', first: lower, last: alphanumeric,
        pattern: r"^[a-z](?:[a-z0-9-]*[a-z0-9])?$",
        says: "lower-case letters, digits and `-`; starts with a letter, ends with a letter or digit",
    };
    /// A zone of a region, or the region itself.
    ZoneName = Rule {
        what: "the name of a region or zone", min: 1, max: 40,
        allowed: |c| lower(c) || c.is_ascii_digit() || c == '-', first: lower, last: alphanumeric,
        pattern: r"^[a-z](?:[a-z0-9-]*[a-z0-9])?$",
        says: "lower-case letters, digits and `-`; starts with a letter, ends with a letter or digit",
    };
    /// An application's name. Source: spec "Applications".
    AppName = Rule {
        what: "the application name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A service instance's name: like an application's. Source: spec "Service instances".
    InstanceName = Rule {
        what: "the service instance name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A pool's name.
    PoolName = Rule {
        what: "the pool name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A notification channel's name.
    ChannelName = Rule {
        what: "the channel name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A process template's name.
    TemplateName = Rule {
        what: "the process template name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A load balancer's name.
    LoadBalancerName = Rule {
        what: "the load balancer name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || c == '-' || c == '_', first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-` and `_`; starts with a letter, ends with a letter or digit",
    };
    /// A certificate's name.
    CertificateName = Rule {
        what: "the certificate name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.'), first: alphanumeric, last: alphanumeric,
        pattern: r"^[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-`, `_` and `.`; starts and ends with a letter or digit",
    };
    /// The path that a health check asks for, with its query. Nothing in it has a meaning in a load balancer's configuration.
    HealthPath = Rule {
        what: "the path of the health check", min: 1, max: 200,
        allowed: |c| path_char(c) || matches!(c, '?' | '=' | '&'), first: |c| c == '/', last: |_| true,
        pattern: r"^/[A-Za-z0-9/_.~%+,:@!?=&-]*$",
        says: "starts with `/`; letters, digits and `/ - _ . ~ % + , : @ ! ? = &`, no blanks, quotes, `#`, `\\` or `;`",
    };
    /// The beginning of request paths that a virtual server group takes.
    PathPrefix = Rule {
        what: "the path of the server group", min: 1, max: 200,
        allowed: path_char, first: |c| c == '/', last: |_| true,
        pattern: r"^/[A-Za-z0-9/_.~%+,:@!-]*$",
        says: "starts with `/`; letters, digits and `/ - _ . ~ % + , : @ !`, no blanks, quotes, `#`, `\\` or `;`",
    };
    /// A host name as requests carry it, lower case.
    HostName = Rule {
        what: "the host name", min: 1, max: 253,
        allowed: |c| lower(c) || c.is_ascii_digit() || matches!(c, '-' | '.'), first: |c| lower(c) || c.is_ascii_digit(), last: |c| lower(c) || c.is_ascii_digit(),
        pattern: r"^[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?$",
        says: "lower-case letters, digits, `-` and `.`; starts and ends with a letter or digit",
    };
    /// A plugin's name. Source: design, "Plugins".
    PluginName = Rule {
        what: "the plugin name", min: 1, max: 60,
        allowed: |c| lower(c) || c.is_ascii_digit() || c == '-', first: lower, last: alphanumeric,
        pattern: r"^[a-z](?:[a-z0-9-]*[a-z0-9])?$",
        says: "lower-case letters, digits and `-`; starts with a letter, ends with a letter or digit",
    };
    /// A server's name, unique in its workspace.
    ServerName = Rule {
        what: "the server name", min: 1, max: 128,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.'), first: alphanumeric, last: alphanumeric,
        pattern: r"^[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-`, `_` and `.`; starts and ends with a letter or digit",
    };
    /// The name prefix of an activation code.
    NamePrefix = Rule {
        what: "the name prefix", min: 1, max: 50,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.'), first: alphanumeric, last: |_| true,
        pattern: r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        says: "letters, digits, `-`, `_` and `.`; starts with a letter or digit",
    };
    /// A package's version. Source: spec "Packages".
    PackageVersion = Rule {
        what: "the package version", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.' | '+'), first: alphanumeric, last: alphanumeric,
        pattern: r"^[A-Za-z0-9](?:[A-Za-z0-9_.+-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-`, `_`, `.` and `+`; starts and ends with a letter or digit",
    };
    /// A package's file name, without directories.
    FileName = Rule {
        what: "the file name", min: 1, max: 200,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.' | '+'), first: |c| alphanumeric(c) || c == '_', last: |c| alphanumeric(c) || c == '_',
        pattern: r"^[A-Za-z0-9_](?:[A-Za-z0-9_.+-]*[A-Za-z0-9_])?$",
        says: "letters, digits, `-`, `_`, `.` and `+`; starts and ends with a letter, digit or `_`",
    };
    /// A tag's key.
    TagKey = Rule {
        what: "the tag key", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.'), first: letter, last: alphanumeric,
        pattern: r"^[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-`, `_` and `.`; starts with a letter, ends with a letter or digit",
    };
    /// A token's name.
    TokenName = Rule {
        what: "the token name", min: 1, max: 60,
        allowed: |c| alphanumeric(c) || matches!(c, '-' | '_' | '.'), first: alphanumeric, last: alphanumeric,
        pattern: r"^[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?$",
        says: "letters, digits, `-`, `_` and `.`; starts and ends with a letter or digit",
    };
}

/// Checks a key of deployment or custom environment parameters: letters, digits, `_`, `-`, `.`; 1 to 128.
/// Source: spec "Release orders".
///
/// # Errors
/// [`InvalidValue`].
pub fn check_env_key(key: &str) -> Result<(), InvalidValue> {
    check_length("the parameter key", key, 1, 128)?;
    if key
        .chars()
        .all(|c| alphanumeric(c) || matches!(c, '_' | '-' | '.'))
    {
        Ok(())
    } else {
        Err(InvalidValue::rule(format!(
            "the parameter key `{key}` may hold letters, digits, `_`, `-` and `.` only"
        )))
    }
}

/// Names of environment variables that start so are the platform's own.
pub const RESERVED_ENV_PREFIX: &str = "WINDLASS_";

/// Checks the name of an OS user.
///
/// # Errors
/// [`InvalidValue`].
pub fn check_os_user(user: &str) -> Result<(), InvalidValue> {
    let is_user = !user.is_empty()
        && user.len() <= 32
        && !user.starts_with('-')
        && user
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if is_user {
        Ok(())
    } else {
        Err(InvalidValue::rule(format!(
            "{user:?} is not the name of an OS user: give 1 to 32 letters, digits, `-`, `_` and `.`, not beginning with `-`"
        )))
    }
}

/// Checks a variable that a person gives: its key, that the key is none of the platform's own, and that an operating system
/// can hand the value over (no zero byte). `value` is `None` for a reference to a secret.
///
/// # Errors
/// [`InvalidValue`].
pub fn check_variable(key: &str, value: Option<&str>) -> Result<(), InvalidValue> {
    check_env_key(key)?;
    if key.starts_with(RESERVED_ENV_PREFIX) {
        return Err(InvalidValue::rule(format!(
            "`{key}`: names that start with {RESERVED_ENV_PREFIX} are the platform's own"
        )));
    }
    if value.is_some_and(|value| value.contains('\0')) {
        return Err(InvalidValue::rule(format!(
            "the value of `{key}` holds a zero byte, which no environment can hold"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<N: FromStr<Err = InvalidValue>>(good: &[&str], bad: &[&str]) {
        for text in good {
            assert!(text.parse::<N>().is_ok(), "{text}");
        }
        for text in bad {
            assert!(text.parse::<N>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_at_each_limit() {
        check::<AppName>(
            &["a", "A-b_9", &"a".repeat(60)],
            &[
                "",
                "9a",
                "-a",
                "a-",
                "a_",
                "a b",
                "ä",
                "a/b",
                &"a".repeat(61),
            ],
        );
        check::<WorkspaceName>(
            &["ab", "prod-1", &"a".repeat(40)],
            &["a", "Prod", "1a", "a-", "a_b", &"a".repeat(41)],
        );
        check::<CellName>(&["a", &"a".repeat(40)], &["", "A", &"a".repeat(41)]);
        check::<PackageVersion>(
            &["1", "1.0.0-rc.1+5", &"1".repeat(60)],
            &["", ".", "1/2", "1-", &"1".repeat(61)],
        );
        check::<FileName>(
            &["a", "shop-1.0.tar.gz", "_a", &"a".repeat(200)],
            &[
                "",
                ".",
                "..",
                "../a",
                "a/b",
                ".a",
                "-a",
                "a b",
                &"a".repeat(201),
            ],
        );
        check::<ServerName>(&["9a.b", &"a".repeat(128)], &["", "a.", &"a".repeat(129)]);
        check::<NamePrefix>(&["web-", &"a".repeat(50)], &["", "-web", &"a".repeat(51)]);
    }

    /// Every text of up to three characters out of those that some rule tells apart.
    #[test]
    fn the_documented_pattern_accepts_exactly_the_texts_that_parse() {
        let alphabet: Vec<char> = "aZ5-_./+~%?=&@!:, \n#\\;\0é".chars().collect();
        let mut texts = vec![String::new()];
        for length in 0..3 {
            let longer: Vec<String> = texts
                .iter()
                .filter(|text| text.chars().count() == length)
                .flat_map(|text| alphabet.iter().map(move |c| format!("{text}{c}")))
                .collect();
            texts.extend(longer);
        }
        for (rule, parses) in RULES {
            let pattern = regex::Regex::new(rule.pattern).expect(rule.pattern);
            for text in &texts {
                let length = text.chars().count();
                let documented = (rule.min..=rule.max).contains(&length) && pattern.is_match(text);
                assert_eq!(parses(text), documented, "{}: {text:?}", rule.what);
            }
        }
    }

    #[test]
    fn a_refusal_names_the_limit_and_the_figure() {
        let error = "a".repeat(61).parse::<AppName>().unwrap_err();
        assert_eq!((error.limit, error.current), (Some(60), Some(61)));
        assert_eq!(
            error.message,
            "the application name has 61 characters: 1 to 60 are allowed"
        );
        let error = "a b".parse::<AppName>().unwrap_err();
        assert!(error.message.contains("contains ' '"), "{error}");
    }

    #[test]
    fn env_keys_at_their_limits() {
        assert!(check_env_key("A.b-c_9").is_ok());
        assert!(check_env_key(&"a".repeat(128)).is_ok());
        for key in ["", "a b", "a=b", &"a".repeat(129)] {
            assert!(check_env_key(key).is_err(), "{key}");
        }
        assert!(check_variable("A", Some("b\n")).is_ok());
        assert!(check_variable("A", None).is_ok());
        for (key, value) in [("A b", ""), ("WINDLASS_A", ""), ("A", "b\0c")] {
            assert!(check_variable(key, Some(value)).is_err(), "{key}");
        }
    }
}
