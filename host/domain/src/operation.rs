//! Operations on applications as they are installed: restart, offline, online, static files, initialisation of servers.
//!
//! Owns what can be asked for, and which servers an operation is for, with the reason where one is not. Source: spec "Application operations".

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::{InstanceId, ServerId, TemplateId},
    limits::Limits,
    name::{InvalidValue, check_length, check_os_user},
    server::ReleaseState,
    task::FilesRef,
};

/// What is done to the servers of an application. JSON: `{"kind": "online", "initial_weight": 50}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Operation {
    /// Stop and start the application's process (not the machine), out of traffic.
    Restart,
    /// Start what was taken offline, or what a release left broken.
    Online {
        /// Its weight afterwards, 0 to 100.
        #[serde(default = "full")]
        initial_weight: u32,
    },
    /// Take it out of traffic and stop it. It stays so until it is brought online or released again.
    Offline,
    /// Replace a directory with the content of an archive. The application goes on, in traffic.
    StaticFiles(StaticFiles),
    /// Prepare the servers for the tech stack again. The application goes on, in traffic.
    Initialise,
}

const fn full() -> u32 {
    100
}

/// Files for a directory of each server. The agent downloads them, and has the last word on user and directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StaticFiles {
    /// Where the archive is: `http://` or `https://`, a `.tar.gz`.
    pub url: String,
    /// SHA-256 that it must have; without one, whatever is there is taken.
    #[serde(default)]
    pub sha256: Option<Digest>,
    /// The directory that is replaced: absolute, starts and ends with `/`, with nothing of `.`, `..` or empty in it.
    pub directory: String,
    /// OS user that the files belong to. Default: `root`.
    #[serde(default = "root")]
    pub user: String,
    /// The largest archive that is taken, in bytes: 1 to 2 GiB. Default: 200 MiB.
    #[serde(default = "archive_bytes")]
    pub max_bytes: u64,
}

fn root() -> String {
    "root".to_owned()
}

const fn archive_bytes() -> u64 {
    200 << 20
}

/// The largest archive of static files that can be allowed, in bytes.
pub const MAX_ARCHIVE_BYTES: u64 = 2 << 30;

impl StaticFiles {
    /// Checks what can be checked before a server is touched.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn validate(&self) -> Result<(), (&'static str, InvalidValue)> {
        let wrong = |field, message: String| (field, InvalidValue::rule(message));
        check_length("the URL", &self.url, 1, 2000).map_err(|error| ("url", error))?;
        let rest = ["http://", "https://"]
            .iter()
            .find_map(|scheme| self.url.strip_prefix(scheme));
        let plain = self.url.bytes().all(|byte| byte.is_ascii_graphic());
        let path = rest.unwrap_or_default().split(['?', '#']).next();
        let path = path.unwrap_or_default();
        if !plain || path.split_once('/').is_none_or(|(host, _)| host.is_empty()) {
            return Err(wrong(
                "url",
                format!(
                    "`{}` is not a URL of the form http://host/path or https://host/path",
                    self.url
                ),
            ));
        }
        if path
            .split('/')
            .next()
            .is_some_and(|host| host.contains('@'))
        {
            return Err(wrong(
                "url",
                "the URL holds a user's name: what is kept in plans is seen by everybody who may look at them".to_owned(),
            ));
        }
        if !path.ends_with(".tar.gz") {
            return Err(wrong(
                "url",
                format!("`{}` is not the URL of a .tar.gz archive", self.url),
            ));
        }
        check_length("the directory", &self.directory, 1, 1000)
            .map_err(|error| ("directory", error))?;
        let named = self
            .directory
            .strip_prefix('/')
            .and_then(|rest| rest.strip_suffix('/'));
        let is_clean =
            |name: &str| !matches!(name, "" | "." | "..") && !name.chars().any(char::is_control);
        if !named.is_some_and(|rest| rest.split('/').all(is_clean)) {
            return Err(wrong(
                "directory",
                format!(
                    "`{}` is not a directory that can be replaced: it starts and ends with `/`, is not the root, and has no `.`, `..` or empty name in it",
                    self.directory
                ),
            ));
        }
        check_os_user(&self.user).map_err(|error| ("user", error))?;
        if !(1..=MAX_ARCHIVE_BYTES).contains(&self.max_bytes) {
            let limit = if self.max_bytes == 0 {
                1
            } else {
                MAX_ARCHIVE_BYTES
            };
            let message = format!(
                "`max_bytes` is {}: 1 to {MAX_ARCHIVE_BYTES} are allowed",
                self.max_bytes
            );
            let bad = InvalidValue::limit(message, limit, self.max_bytes);
            return Err(("max_bytes", bad));
        }
        Ok(())
    }

    /// As an agent needs to know them.
    #[must_use]
    pub fn reference(&self) -> FilesRef {
        FilesRef {
            url: self.url.clone(),
            sha256: self.sha256,
            directory: self.directory.clone(),
            max_bytes: self.max_bytes,
        }
    }
}

/// What is asked for. JSON: `{"title": …, "operation": {"kind": "restart"}, "targets": [{"instance": …}]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationSpec {
    /// 1 to 50 characters.
    pub title: String,
    /// What is done.
    pub operation: Operation,
    /// The strategy plugin: `name` for its default version or `name@version`.
    #[serde(default = "grouped")]
    pub strategy: String,
    /// The strategy's parameters, valid against its schema.
    #[serde(default = "empty_object")]
    pub parameters: serde_json::Value,
    /// Of which applications.
    pub targets: Vec<OperationTarget>,
    /// The safety envelope.
    #[serde(default)]
    pub limits: Limits,
    /// How long to wait for connections to end after a weight was set to 0, in milliseconds. Default 30 s.
    #[serde(default = "drain_deadline")]
    pub drain_deadline_ms: u64,
    /// How long a task may wait for its server before it is not started any more, in milliseconds. Default 10 min.
    #[serde(default = "delivery_deadline")]
    pub delivery_deadline_ms: u64,
    /// A process template for this kind of operation, which replaces its fixed flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<TemplateId>,
    /// Whether the workspace's notification channels are told. Default: yes.
    #[serde(default = "yes")]
    pub notifications: bool,
}

const fn yes() -> bool {
    true
}

/// One service instance of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OperationTarget {
    /// The service instance.
    pub instance: InstanceId,
    /// Only servers of these cells (identifiers); empty: of all.
    #[serde(default)]
    pub cells: Vec<String>,
    /// Only these of its servers; empty: all.
    #[serde(default)]
    pub servers: Vec<ServerId>,
}

fn grouped() -> String {
    "grouped".to_owned()
}

fn empty_object() -> serde_json::Value {
    serde_json::Value::Object(serde_json::Map::new())
}

const fn drain_deadline() -> u64 {
    30_000
}

const fn delivery_deadline() -> u64 {
    600_000
}

/// What decides whether a server can take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// How releases and operations left it.
    pub state: ReleaseState,
    /// Whether something is installed on it.
    pub installed: bool,
    /// Whether its agent is connected.
    pub online: bool,
    /// Whether it has no weight in a pool of its service instance: a release can leave it so (gray traffic).
    pub without_traffic: bool,
}

impl Operation {
    /// What people call it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Online { .. } => "online",
            Self::Offline => "offline",
            Self::StaticFiles(_) => "static_files",
            Self::Initialise => "initialise",
        }
    }

    /// Whether it works on what is installed: by that's own steps, and in that's own environment.
    #[must_use]
    pub const fn is_of_installed(&self) -> bool {
        match self {
            Self::Restart | Self::Online { .. } | Self::Offline => true,
            Self::StaticFiles(_) | Self::Initialise => false,
        }
    }

    /// Why a server cannot take part; `None`: it can.
    #[must_use]
    pub const fn refuses(&self, server: Standing) -> Option<&'static str> {
        if !server.online {
            return Some("its agent is not connected");
        }
        if matches!(server.state, ReleaseState::Releasing) {
            return Some("an order works on it");
        }
        if self.is_of_installed() && !server.installed {
            return Some("nothing is installed on it: release to it first");
        }
        match (self, server.state) {
            (Self::Restart, ReleaseState::Offline) => {
                Some("it is offline: bring it online instead")
            }
            (Self::Online { .. }, ReleaseState::Released) if !server.without_traffic => {
                Some("it is online already")
            }
            (Self::Offline, ReleaseState::Offline) => Some("it is offline already"),
            (
                Self::Restart
                | Self::Online { .. }
                | Self::Offline
                | Self::StaticFiles(_)
                | Self::Initialise,
                ReleaseState::AwaitingRelease
                | ReleaseState::Releasing
                | ReleaseState::Released
                | ReleaseState::ReleaseFailed
                | ReleaseState::Offline,
            ) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> StaticFiles {
        let json = r#"{"url": "https://files.example/site.tar.gz", "directory": "/srv/www/site/"}"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn static_files_are_checked_before_a_server_is_touched() {
        let files = files();
        assert_eq!((files.user.as_str(), files.max_bytes), ("root", 200 << 20));
        assert_eq!(files.validate(), Ok(()));
        let field = |change: fn(&mut StaticFiles, &str), value: &str| {
            let mut files = files.clone();
            change(&mut files, value);
            files.validate().err().map(|(field, _)| field)
        };
        for (url, good) in [
            ("http://h/x.tar.gz", true),
            ("http://h:8080/a/b.tar.gz?token=1#part", true),
            ("https:///x.tar.gz", false),
            ("https://x.tar.gz", false),
            ("ftp://h/x.tar.gz", false),
            ("file:///etc/x.tar.gz", false),
            ("http://u:p@h/x.tar.gz", false),
            ("http://h/x.zip", false),
            ("http://h/?file=x.tar.gz", false),
            ("http://h/a b.tar.gz", false),
            ("http://h/\n.tar.gz", false),
            ("", false),
        ] {
            let found = field(|files, url| files.url = url.to_owned(), url);
            assert_eq!(found, (!good).then_some("url"), "{url}");
        }
        for (directory, good) in [
            ("/a/", true),
            ("/srv/w w/ü/", true),
            ("/", false),
            ("//", false),
            ("/srv", false),
            ("srv/", false),
            ("/srv/../etc/", false),
            ("/srv/./a/", false),
            ("/srv//a/", false),
            ("/srv/\0/", false),
            ("", false),
        ] {
            let found = field(|files, path| files.directory = path.to_owned(), directory);
            assert_eq!(found, (!good).then_some("directory"), "{directory}");
        }
        for (user, good) in [
            ("www-data", true),
            ("", false),
            ("-x", false),
            ("a b", false),
        ] {
            let found = field(|files, user| files.user = user.to_owned(), user);
            assert_eq!(found, (!good).then_some("user"), "{user}");
        }
        for max_bytes in [0, MAX_ARCHIVE_BYTES + 1] {
            let files = StaticFiles {
                max_bytes,
                ..files.clone()
            };
            assert_eq!(files.validate().unwrap_err().0, "max_bytes");
        }
    }

    #[test]
    fn each_operation_is_for_some_servers() {
        use ReleaseState as S;
        let states = [
            S::AwaitingRelease,
            S::Releasing,
            S::Released,
            S::ReleaseFailed,
            S::Offline,
        ];
        // In the order of the states: with something installed, then without.
        for (operation, installed, bare) in [
            (Operation::Restart, "y-yy-", "-----"),
            (Operation::Online { initial_weight: 5 }, "y--yy", "-----"),
            (Operation::Offline, "y-yy-", "-----"),
            (Operation::Initialise, "y-yyy", "y-yyy"),
            (Operation::StaticFiles(files()), "y-yyy", "y-yyy"),
        ] {
            for (expect, installed) in [(installed, true), (bare, false)] {
                let found: String = states
                    .iter()
                    .map(|state| {
                        let standing = Standing {
                            state: *state,
                            installed,
                            online: true,
                            without_traffic: false,
                        };
                        let away = Standing {
                            online: false,
                            ..standing
                        };
                        assert!(operation.refuses(away).is_some());
                        match operation.refuses(standing) {
                            None => 'y',
                            Some(_) => '-',
                        }
                    })
                    .collect();
                assert_eq!(found, expect, "{operation:?}, installed: {installed}");
            }
        }
        // What a release left without traffic is brought online.
        let gray = Standing {
            state: S::Released,
            installed: true,
            online: true,
            without_traffic: true,
        };
        assert_eq!(Operation::Online { initial_weight: 5 }.refuses(gray), None);
    }
}
