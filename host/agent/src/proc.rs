//! Processes as `/proc` shows them: who they are across restarts of the agent, whose descendants they are, and how whole trees
//! of them are ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// One process, told apart from a later one with the same number: its start time in clock ticks since the machine's start, and
/// which start of the machine that was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessId {
    /// The process that has this number now; `None` when there is none (a zombie counts as none).
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        (!stat.is_zombie()).then(|| Self {
            pid,
            start_ticks: stat.start_ticks,
            boot_id: boot_id(),
        })
    }

    /// Whether exactly this process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

/// The kernel's id of this start of the machine; empty where `/proc` does not tell.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

#[derive(Debug, Clone, Copy)]
struct Stat {
    state: char,
    parent: u32,
    start_ticks: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command in parentheses may hold anything; fields are counted from its last parenthesis.
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        Some(Self {
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
            start_ticks: fields.nth(17)?.parse().ok()?,
        })
    }

    fn is_zombie(self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// The numbers of all processes.
pub fn all_pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Every living descendant of `root`, without itself. Complete for a child subreaper: a process that forks twice or leaves its
/// session is still below it.
#[must_use]
pub fn descendants(root: u32) -> Vec<ProcessId> {
    let stats: BTreeMap<u32, Stat> = all_pids()
        .filter_map(|pid| Some((pid, Stat::read(pid)?)))
        .collect();
    let mut found = BTreeSet::from([root]);
    // A child's number may be smaller than its parent's, so go over the list until nothing is added.
    loop {
        let before = found.len();
        for (pid, stat) in &stats {
            if found.contains(&stat.parent) {
                found.insert(*pid);
            }
        }
        if found.len() == before {
            break;
        }
    }
    let boot_id = boot_id();
    found
        .into_iter()
        .filter(|pid| *pid != root)
        .filter_map(|pid| {
            let stat = stats.get(&pid)?;
            (!stat.is_zombie()).then(|| ProcessId {
                pid,
                start_ticks: stat.start_ticks,
                boot_id: boot_id.clone(),
            })
        })
        .collect()
}

/// Sends a signal to exactly this process. `false`: it was gone, or may not be signalled.
pub fn signal(process: &ProcessId, signal: Signal) -> bool {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    // The descriptor is taken first and the identity checked after it, so a number that was given away is not hit.
    let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    process.is_alive() && pidfd_send_signal(&descriptor, signal).is_ok()
}

/// Processes whose environment holds this line, for example `WINDLASS_TASK=…`. Sees only processes that this user may look into.
#[must_use]
pub fn with_environment(accept: impl Fn(&[u8]) -> bool) -> Vec<ProcessId> {
    let own = std::process::id();
    all_pids()
        .filter(|pid| *pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environment| environment.split(|byte| *byte == 0).any(&accept))
        })
        .filter_map(ProcessId::of)
        .collect()
}

/// A cgroup v2 directory in which one process tree is kept, so that it can be ended at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The agent's own subtree for one data directory, made when it is missing. `None` where no v2 hierarchy is mounted or it may
    /// not be written: trees are then ended by walking them.
    #[must_use]
    pub fn subtree(data_dir: &Path) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup2 ")
                .then(|| left.split(' ').nth(4))
                .flatten()
        })?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        // An agent that a shim or a script started must not nest for ever: the subtree is beside the outermost one.
        let own = own.split("/windlass-").next().unwrap_or(own);
        let own = if own.starts_with("windlass-") {
            ""
        } else {
            own
        };
        let name = windlass_domain::Digest::of(data_dir.as_os_str().as_encoded_bytes()).short();
        let path = Path::new(mount).join(own).join(format!("windlass-{name}"));
        let made = match fs::create_dir(&path) {
            Ok(()) => true,
            Err(error) => error.kind() == std::io::ErrorKind::AlreadyExists,
        };
        (made
            && path.join("cgroup.kill").exists()
            && rustix::fs::access(path.join("cgroup.kill"), rustix::fs::Access::WRITE_OK).is_ok())
        .then_some(Self(path))
    }

    /// A group that exists already.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// A child group, made when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn child(&self, name: &str) -> std::io::Result<Self> {
        let path = self.0.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(Self(path)),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Sends SIGKILL to every process in it, at once.
    pub fn kill(&self) {
        if let Err(error) = fs::write(self.0.join("cgroup.kill"), "1") {
            tracing::debug!(%error, "a cgroup cannot be killed");
        }
    }

    /// Whether a process is in it or below it.
    #[must_use]
    pub fn is_populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events"))
            .is_ok_and(|text| text.contains("populated 1"))
    }

    /// Removes it and the empty groups below it. One with processes stays.
    pub fn remove_if_empty(&self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                Self(entry.path()).remove_if_empty();
            }
        }
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::trace!(%error, "a cgroup is still used");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.is_alive());
        let other = ProcessId {
            start_ticks: own.start_ticks + 1,
            ..own.clone()
        };
        assert!(!other.is_alive());
        assert!(
            !ProcessId {
                boot_id: "x".into(),
                ..own
            }
            .is_alive()
        );
    }

    #[test]
    fn children_are_found_and_signalled() {
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let found = descendants(std::process::id());
        let id = found
            .iter()
            .find(|process| process.pid == child.id())
            .unwrap();
        assert!(signal(id, Signal::KILL));
        child.wait().unwrap();
        assert!(!signal(id, Signal::KILL));
    }

    #[test]
    fn a_cgroup_ends_a_tree_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let Some(subtree) = Cgroup::subtree(dir.path()) else {
            eprintln!("skipped: no cgroup v2 hierarchy can be written here");
            return;
        };
        let group = subtree.child("run").unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", "echo $$ > $PROCS; setsid sleep 600 & sleep 600"])
            .env("PROCS", group.path().join("cgroup.procs"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let until = |what: &str, look: &dyn Fn() -> bool| {
            while !look() {
                assert!(std::time::Instant::now() < deadline, "{what}");
                std::thread::yield_now();
            }
        };
        let members = || fs::read_to_string(group.path().join("cgroup.procs")).unwrap();
        until("no three members", &|| members().lines().count() == 3);
        assert!(subtree.is_populated());
        group.kill();
        child.wait().unwrap();
        until("members are left", &|| !subtree.is_populated());
        subtree.remove_if_empty();
        assert!(!subtree.path().exists());
    }
}
