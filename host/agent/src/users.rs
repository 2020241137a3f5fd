//! OS users: looked up in `/etc/passwd` and `/etc/group`, and checked against the local allow-list.
//!
//! Names from other sources (LDAP, systemd) are not seen: the agent has no name service. Source: design, "Plugins", "Consent":
//! the agent has its own local allow-list, root off unless enabled.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::config::Policy;

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Its main group.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// Why a task may not run as a user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// There is none of this name.
    #[error("there is no OS user `{0}` in /etc/passwd on this server; create it or choose another")]
    NotExists(String),
    /// Not on the allow-list.
    #[error(
        "the OS user `{user}` is not on this agent's allow-list (allowed: {allowed}); add it with `policy.users` in the agent's config.json"
    )]
    NotAllowed {
        /// Who was asked for.
        user: String,
        /// Who is allowed.
        allowed: String,
    },
    /// Root is off.
    #[error(
        "tasks may not run as root on this agent; name another OS user, set `policy.default_user`, or enable `policy.root` in the agent's config.json"
    )]
    RootDisabled,
    /// An ordinary user cannot become another.
    #[error(
        "this agent runs as the ordinary user `{own}` and cannot run anything as `{user}`; run the agent as root or leave the user out"
    )]
    NotPrivileged {
        /// Who was asked for.
        user: String,
        /// Who the agent is.
        own: String,
    },
}

/// The user that a task runs as. `None` asks for the agent's own user: for an agent that runs as root, `policy.default_user`
/// where it is set, root itself only where root is enabled.
///
/// # Errors
/// When the user does not exist or is not allowed.
pub fn resolve(run_as: Option<&str>, policy: &Policy) -> Result<User, UserError> {
    resolve_in(run_as, policy, &own(), lookup)
}

fn resolve_in(
    run_as: Option<&str>,
    policy: &Policy,
    own: &User,
    lookup: impl Fn(&str) -> Option<User>,
) -> Result<User, UserError> {
    let wanted = run_as.or(policy.default_user.as_deref().filter(|_| own.uid == 0));
    let user = match wanted {
        None => own.clone(),
        Some(name) if name == own.name => own.clone(),
        Some(name) => lookup(name).ok_or_else(|| UserError::NotExists(name.to_owned()))?,
    };
    if user.uid == 0 && !policy.root {
        return Err(if own.uid == 0 {
            UserError::RootDisabled
        } else {
            UserError::NotPrivileged {
                user: user.name,
                own: own.name.clone(),
            }
        });
    }
    if own.uid != 0 && user.uid != own.uid {
        return Err(UserError::NotPrivileged {
            user: user.name,
            own: own.name.clone(),
        });
    }
    let by_default = run_as.is_none() || user.uid == own.uid;
    if !by_default && user.uid != 0 && !policy.users.contains(&user.name) {
        return Err(UserError::NotAllowed {
            user: user.name,
            allowed: if policy.users.is_empty() {
                "nobody".into()
            } else {
                policy.users.join(", ")
            },
        });
    }
    Ok(user)
}

/// The agent's own user.
#[must_use]
pub fn own() -> User {
    let uid = rustix::process::geteuid().as_raw();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    entries(&passwd)
        .find(|user| user.uid == uid)
        .map(with_groups)
        .unwrap_or_else(|| User {
            name: uid.to_string(),
            uid,
            gid: rustix::process::getegid().as_raw(),
            groups: Vec::new(),
            home: "/".into(),
        })
}

/// The user of this name.
#[must_use]
pub fn lookup(name: &str) -> Option<User> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    entries(&passwd)
        .find(|user| user.name == name)
        .map(with_groups)
}

fn entries(passwd: &str) -> impl Iterator<Item = User> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?.to_owned();
        Some(User {
            name,
            uid,
            gid,
            groups: Vec::new(),
            home,
        })
    })
}

fn with_groups(mut user: User) -> User {
    let text = fs::read_to_string("/etc/group").unwrap_or_default();
    user.groups = text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let gid = fields.nth(2)?.parse().ok()?;
            let members = fields.next()?;
            members
                .split(',')
                .any(|member| member == user.name)
                .then_some(gid)
        })
        .collect();
    user
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, uid: u32) -> User {
        User {
            name: name.into(),
            uid,
            gid: uid,
            groups: vec![],
            home: "/".into(),
        }
    }

    #[test]
    fn who_may_run_as_whom() {
        let known = |name: &str| match name {
            "root" => Some(user("root", 0)),
            "app" => Some(user("app", 1000)),
            "log" => Some(user("log", 1001)),
            _ => None,
        };
        let policy = |root, default_user: Option<&str>| Policy {
            users: vec!["app".into()],
            root,
            default_user: default_user.map(Into::into),
            ..Policy::default()
        };
        let root = user("root", 0);
        let app = user("app", 1000);
        type Expect<'a> = Result<&'a str, fn(&UserError) -> bool>;
        let cases: [(Option<&str>, Policy, &User, Expect<'_>); 10] = [
            (Some("app"), policy(false, None), &root, Ok("app")),
            (
                Some("log"),
                policy(false, None),
                &root,
                Err(|e| matches!(e, UserError::NotAllowed { .. })),
            ),
            (
                Some("nobody-here"),
                policy(false, None),
                &root,
                Err(|e| matches!(e, UserError::NotExists(_))),
            ),
            (
                Some("root"),
                policy(false, None),
                &root,
                Err(|e| matches!(e, UserError::RootDisabled)),
            ),
            (
                None,
                policy(false, None),
                &root,
                Err(|e| matches!(e, UserError::RootDisabled)),
            ),
            (None, policy(false, Some("app")), &root, Ok("app")),
            (None, policy(true, None), &root, Ok("root")),
            (None, policy(false, None), &app, Ok("app")),
            (Some("app"), policy(false, None), &app, Ok("app")),
            (
                Some("root"),
                policy(true, None),
                &app,
                Err(|e| matches!(e, UserError::NotPrivileged { .. })),
            ),
        ];
        for (run_as, policy, own, expect) in cases {
            let got = resolve_in(run_as, &policy, own, known);
            match (&got, expect) {
                (Ok(user), Ok(name)) => assert_eq!(user.name, name),
                (Err(error), Err(is)) => assert!(is(error), "{run_as:?} {error}"),
                (_, _) => panic!("{run_as:?} as {}: {got:?}", own.name),
            }
        }
    }
}
