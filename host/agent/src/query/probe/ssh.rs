//! The SSH service: whether it runs, on which ports, and what its configuration says.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{facts_of, sockets};
use crate::{proc, query::program};

const CONFIG: &str = "/etc/ssh/sshd_config";
/// Nested `Include`s that are followed, as sshd does.
const MAX_DEPTH: u32 = 16;

pub(super) fn ssh() -> Result<ProbeReply, QueryError> {
    let daemon = program::find("sshd");
    let mut files: Vec<PathBuf> = Vec::new();
    let mut lines = Vec::new();
    include(Path::new(CONFIG), 0, &mut files, &mut lines);
    let running: Vec<u32> = proc::all_pids()
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd")
        })
        .collect();
    if daemon.is_none() && running.is_empty() && lines.is_empty() {
        return Err(QueryError::new(
            QueryErrorCode::NotFound,
            format!("no SSH service is installed: there is no sshd and no {CONFIG}"),
        ));
    }
    let holders = sockets::holders();
    let mut ports: Vec<u16> = sockets::listening()
        .into_iter()
        .filter(|listener| listener.protocol == "tcp")
        .filter(|listener| {
            holders
                .get(&listener.inode)
                .is_some_and(|(pid, name)| name == "sshd" || running.contains(pid))
        })
        .map(|listener| listener.port)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    let config = Config::read(&lines);
    let file = |path: &Path| json!({ "path": path.to_string_lossy(), "present": path.exists() });
    let mut present: Vec<Value> = [Path::new(CONFIG)].into_iter().map(file).collect();
    for kind in ["ed25519", "ecdsa", "rsa"] {
        present.push(file(Path::new(&format!("/etc/ssh/ssh_host_{kind}_key"))));
    }
    let listening = sockets::listening();
    let open = |port: &u16| {
        listening
            .iter()
            .any(|listener| listener.protocol == "tcp" && listener.port == *port)
    };
    Ok(facts_of(
        json!({
            "installed": daemon.is_some(),
            "running": !running.is_empty(),
            "listening_ports": ports,
            // Known to everybody, also where the processes of root cannot be looked into.
            "configured_ports_open": config.ports.iter().all(open),
            "configured_ports": config.ports,
            "permit_root_login": config.permit_root_login,
            "password_authentication": config.password_authentication,
            "files": present,
        }),
        lines.join("\n"),
    ))
}

/// What sshd takes from its configuration: of each keyword the first value counts, before any `Match`.
#[derive(Debug, PartialEq, Eq)]
struct Config {
    ports: Vec<u16>,
    permit_root_login: String,
    password_authentication: String,
}

impl Config {
    fn read(lines: &[String]) -> Self {
        let mut ports = Vec::new();
        let (mut root, mut password) = (None, None);
        for line in lines {
            let Some((keyword, value)) = keyword(line) else {
                continue;
            };
            match keyword.as_str() {
                "match" => break,
                "port" => ports.extend(value.parse::<u16>().ok()),
                "permitrootlogin" => root = root.or(Some(value)),
                "passwordauthentication" => password = password.or(Some(value)),
                _ => {}
            }
        }
        if ports.is_empty() {
            ports.push(22);
        }
        Self {
            ports,
            permit_root_login: root.unwrap_or_else(|| "prohibit-password".into()),
            password_authentication: password.unwrap_or_else(|| "yes".into()),
        }
    }
}

/// Keyword in lower case, and its value; `None` for comments and empty lines.
fn keyword(line: &str) -> Option<(String, String)> {
    let line = line.split('#').next()?.trim();
    let (keyword, value) = line.split_once(|c: char| c.is_whitespace() || c == '=')?;
    let value = value.trim_start_matches(|c: char| c.is_whitespace() || c == '=');
    Some((
        keyword.to_ascii_lowercase(),
        value.trim_matches('"').trim().to_owned(),
    ))
}

/// The lines of a file, with those of the files that it includes in their place.
fn include(path: &Path, depth: u32, files: &mut Vec<PathBuf>, lines: &mut Vec<String>) {
    if depth > MAX_DEPTH {
        return;
    }
    let Ok(text) = fs::read_to_string(path) else {
        return;
    };
    files.push(path.to_owned());
    for line in text.lines() {
        match keyword(line) {
            Some((keyword, value)) if keyword == "include" => {
                for pattern in value.split_whitespace() {
                    for file in matching(pattern) {
                        include(&file, depth + 1, files, lines);
                    }
                }
            }
            Some(_) => lines.push(line.trim().to_owned()),
            None => {}
        }
    }
}

/// Files of a pattern with `*` in its last part, in their order; relative ones are below `/etc/ssh`.
fn matching(pattern: &str) -> Vec<PathBuf> {
    let path = Path::new("/etc/ssh").join(pattern);
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
    else {
        return Vec::new();
    };
    let Some((before, after)) = name.split_once('*') else {
        return vec![path];
    };
    let mut found: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| {
                    name.len() >= before.len() + after.len()
                        && name.starts_with(before)
                        && name.ends_with(after)
                })
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_counts_and_match_ends_it() {
        let lines = [
            "Port 2222 # ours",
            "port = 2223",
            "PermitRootLogin \"no\"",
            "PermitRootLogin yes",
            "# PasswordAuthentication no",
            "Match User deploy",
            "PasswordAuthentication no",
        ]
        .map(str::to_owned);
        assert_eq!(
            Config::read(&lines),
            Config {
                ports: vec![2222, 2223],
                permit_root_login: "no".into(),
                password_authentication: "yes".into(),
            }
        );
        assert_eq!(Config::read(&[]).ports, [22]);
    }

    #[test]
    fn included_files_stand_in_their_place() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("20.conf", "Port 20\n");
        write("10.conf", "Port 10\n");
        write("10.txt", "Port 99\n");
        let main = directory.path().join("main");
        let pattern = directory.path().join("*.conf");
        write(
            "main",
            &format!(
                "Port 1\nInclude {}\nPort 2\nInclude {}\n",
                pattern.display(),
                main.display()
            ),
        );
        let (mut files, mut lines) = (Vec::new(), Vec::new());
        include(&main, MAX_DEPTH, &mut files, &mut lines);
        assert_eq!(lines, ["Port 1", "Port 2"], "too deep for the included");
        let (mut files, mut lines) = (Vec::new(), Vec::new());
        include(&main, MAX_DEPTH - 1, &mut files, &mut lines);
        assert_eq!(lines[..4], ["Port 1", "Port 10", "Port 20", "Port 2"]);
        assert!(files.len() > 3);
    }
}
