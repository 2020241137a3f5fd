//! Stages of an order: which application comes before which.
//!
//! Source: spec "Release orders", "Dependencies".

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Why dependencies are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadDependencies {
    /// A part of the short form is not `a>b`.
    #[error("`{0}` is not a dependency: expected `a>b`, where a depends on b, separated by commas")]
    Malformed(String),
    /// An application that the order does not release.
    #[error("`{0}` is not released by this order: dependencies name its applications")]
    Unknown(String),
    /// They go round in a circle.
    #[error("the dependencies go round in a circle: {0}")]
    Cycle(String),
}

/// What depends on what. JSON: the short form `"a>b,c>d"` (a depends on b), or pairs `[{"app": "a", "depends_on": "b"}]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(
    untagged,
    expecting = "expected the short form `a>b,c>d`, or pairs with `app` and `depends_on`"
)]
pub enum Dependencies {
    /// The short form.
    Short(String),
    /// Pairs.
    Pairs(Vec<Dependency>),
}

/// One application that depends on another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Dependency {
    /// The application's name.
    pub app: String,
    /// The one that is released before it.
    pub depends_on: String,
}

impl Default for Dependencies {
    fn default() -> Self {
        Self::Short(String::new())
    }
}

impl Dependencies {
    /// Pairs of names: the first depends on the second.
    ///
    /// # Errors
    /// [`BadDependencies::Malformed`].
    pub fn pairs(&self) -> Result<Vec<(String, String)>, BadDependencies> {
        match self {
            Self::Pairs(pairs) => Ok(pairs
                .iter()
                .map(|pair| (pair.app.clone(), pair.depends_on.clone()))
                .collect()),
            Self::Short(text) => text
                .split(',')
                .map(str::trim)
                .filter(|part| !part.is_empty())
                .map(|part| {
                    let malformed = || BadDependencies::Malformed(part.to_owned());
                    let (from, to) = part.split_once('>').ok_or_else(malformed)?;
                    let (from, to) = (from.trim(), to.trim());
                    if from.is_empty() || to.is_empty() || to.contains('>') {
                        return Err(malformed());
                    }
                    Ok((from.to_owned(), to.to_owned()))
                })
                .collect(),
        }
    }
}

/// The stage of each application, from 1: those without dependencies, then those that depend on them, and so on.
///
/// # Errors
/// [`BadDependencies`].
pub fn stages(
    applications: &[&str],
    dependencies: &Dependencies,
) -> Result<BTreeMap<String, u32>, BadDependencies> {
    let pairs = dependencies.pairs()?;
    let known: BTreeSet<&str> = applications.iter().copied().collect();
    let mut needs: BTreeMap<&str, BTreeSet<&str>> =
        known.iter().map(|name| (*name, BTreeSet::new())).collect();
    for (from, to) in &pairs {
        if !known.contains(to.as_str()) {
            return Err(BadDependencies::Unknown(to.clone()));
        }
        needs
            .get_mut(from.as_str())
            .ok_or_else(|| BadDependencies::Unknown(from.clone()))?
            .insert(to);
    }
    let mut stages: BTreeMap<String, u32> = BTreeMap::new();
    let mut stage = 1;
    while stages.len() < needs.len() {
        let ready: Vec<&str> = needs
            .iter()
            .filter(|(name, on)| {
                !stages.contains_key(**name) && on.iter().all(|on| stages.contains_key(*on))
            })
            .map(|(name, _)| *name)
            .collect();
        if ready.is_empty() {
            return Err(BadDependencies::Cycle(cycle(&needs, &stages)));
        }
        stages.extend(ready.into_iter().map(|name| (name.to_owned(), stage)));
        stage += 1;
    }
    Ok(stages)
}

/// One circle among the applications that got no stage, as `a>b>a`.
fn cycle(needs: &BTreeMap<&str, BTreeSet<&str>>, done: &BTreeMap<String, u32>) -> String {
    let open = |name: &&&str| !done.contains_key(**name);
    let Some(mut at) = needs.keys().find(open).copied() else {
        return String::new();
    };
    let mut path = vec![at];
    // Every application without a stage depends on another one, so this comes round.
    while let Some(next) = needs.get(at).and_then(|on| on.iter().find(open)).copied() {
        if let Some(start) = path.iter().position(|name| *name == next) {
            path.push(next);
            return path[start..].join(">");
        }
        path.push(next);
        at = next;
    }
    path.join(">")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(dependencies: &str, expect: Result<&[(&str, u32)], &str>) {
        let short = Dependencies::Short(dependencies.to_owned());
        let found = stages(&["a", "b", "c"], &short);
        // Pairs say the same.
        if let Ok(pairs) = short.pairs() {
            let pairs = Dependencies::Pairs(
                pairs
                    .into_iter()
                    .map(|(app, depends_on)| Dependency { app, depends_on })
                    .collect(),
            );
            assert_eq!(stages(&["a", "b", "c"], &pairs), found, "{dependencies}");
        }
        match expect {
            Ok(expect) => {
                let expect = expect
                    .iter()
                    .map(|(name, stage)| ((*name).to_owned(), *stage))
                    .collect();
                assert_eq!(found, Ok(expect), "{dependencies}");
            }
            Err(text) => {
                let error = found.unwrap_err().to_string();
                assert!(error.contains(text), "{dependencies}: {error}");
            }
        }
    }

    #[test]
    fn stages_follow_from_dependencies() {
        check("", Ok(&[("a", 1), ("b", 1), ("c", 1)]));
        check("a>b", Ok(&[("a", 2), ("b", 1), ("c", 1)]));
        check("a>b, b>c", Ok(&[("a", 3), ("b", 2), ("c", 1)]));
        check("a>b,b>a", Err("a>b>a"));
        check("a>a", Err("a>a"));
        check("c>a,a>b,b>a", Err("a>b>a"));
        check("a>x", Err("`x`"));
        check("a", Err("`a` is not a dependency"));
        check("a>b>c", Err("`a>b>c`"));
    }
}
