//! Files of installed packages that are not as they were delivered.

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts_of};
use crate::query::{failed, program};

/// Files that are named.
const NAMED: usize = 500;

pub(super) async fn verify(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    let package = arguments.get("package").map(String::as_str);
    if let Some(name) = package
        && !is_name(name)
    {
        return Err(QueryError::new(
            QueryErrorCode::InvalidRequest,
            format!("the argument `package` must be the name of a package, not `{name}`"),
        ));
    }
    let (tool, all, missing) = if program::find("dpkg").is_some() {
        ("dpkg", vec!["--verify"], "is not installed")
    } else if program::find("rpm").is_some() {
        let all = if package.is_some() { "-V" } else { "-Va" };
        ("rpm", vec![all], "is not installed")
    } else {
        return Err(QueryError::new(
            QueryErrorCode::Unsupported,
            "neither `dpkg` nor `rpm` is installed on this server",
        ));
    };
    let mut words = all;
    words.extend(package);
    // Both end with another code than 0 when a file differs.
    let said = program::run(tool, &words).await?;
    if let Some(name) = package
        && (said.errors.contains(missing) || said.output.contains(missing))
    {
        return Err(QueryError::new(
            QueryErrorCode::NotFound,
            format!("the package `{name}` is not installed on this server"),
        ));
    }
    let changed: Vec<Value> = said.output.lines().filter_map(changed_file).collect();
    if changed.is_empty() && said.code != 0 {
        return Err(failed(format!(
            "{tool} ended with {}: {}",
            said.code,
            said.errors.trim()
        )));
    }
    let configuration = |file: &&Value| file["configuration"] == true;
    let facts = json!({
        "tool": tool,
        "changed_count": changed.len(),
        "changed_configuration_count": changed.iter().filter(configuration).count(),
        "changed": changed.iter().take(NAMED).collect::<Vec<_>>(),
    });
    Ok(facts_of(facts, said.output))
}

/// What both package managers take for a name; never an option.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-._:".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.len() <= 200
        && text.chars().all(allowed)
}

/// `??5?????? c /etc/x`, `missing     /usr/x`: the same form in both.
fn changed_file(line: &str) -> Option<Value> {
    let at = line.find(" /")? + 1;
    let (marks, path) = line.split_at(at);
    let mut words = marks.split_whitespace();
    let first = words.next()?;
    let what = if first == "missing" {
        "missing"
    } else if first.contains('5') {
        "content"
    } else {
        "attributes"
    };
    // rpm and dpkg put the reason of an unreadable file behind its name.
    let path = path.split(" (").next()?.trim();
    Some(json!({
        "path": path,
        "what": what,
        "configuration": words.next() == Some("c"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_apart() {
        let file = |line| {
            changed_file(line).map(|file| {
                (
                    file["path"].as_str().unwrap().to_owned(),
                    file["what"].clone(),
                    file["configuration"].clone(),
                )
            })
        };
        let expect = |path: &str, what: &str, configuration: bool| {
            Some((path.to_owned(), json!(what), json!(configuration)))
        };
        assert_eq!(
            file("??5?????? c /etc/a b"),
            expect("/etc/a b", "content", true)
        );
        assert_eq!(
            file("missing     /usr/bin/x"),
            expect("/usr/bin/x", "missing", false)
        );
        assert_eq!(
            file("missing   c /etc/y (Permission denied)"),
            expect("/etc/y", "missing", true)
        );
        assert_eq!(
            file(".M.......    /usr/z"),
            expect("/usr/z", "attributes", false)
        );
        assert_eq!(file("package x is not installed"), None);
    }

    #[test]
    fn a_name_is_never_an_option() {
        assert!(is_name("libc6:amd64") && is_name("g++-12"));
        for wrong in ["", "--root=/", "a b", "a;b", "/etc/passwd"] {
            assert!(!is_name(wrong), "{wrong}");
        }
    }
}
