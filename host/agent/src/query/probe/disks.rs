//! File systems: room and inodes.
//!
//! Each file system once, at its shortest mount point. Kernel file systems (`proc`, `sysfs`…) are no disks. Network and FUSE file
//! systems are named and not looked at: one whose server is gone would hang.

use std::collections::BTreeMap;

use rustix::fs::{StatVfs, statvfs};
use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::{Arguments, facts_of, percent};
use crate::query::{read_text, unreadable};

/// File systems that hold nothing that could run full.
const KERNEL: [&str; 24] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "squashfs",
    "sysfs",
    "tracefs",
    "iso9660",
];
/// File systems whose answer may never come.
const REMOTE: [&str; 9] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "glusterfs",
    "9p",
    "afs",
    "lustre",
];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    number: String,
    path: String,
    device: String,
    kind: String,
    read_only: bool,
}

/// Mounts of disks, each file system once. Of two mounts at one path the later one is seen.
fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mut by_path: BTreeMap<String, Mount> = BTreeMap::new();
    for mount in mountinfo.lines().filter_map(mount) {
        by_path.insert(mount.path.clone(), mount);
    }
    let mut by_number: BTreeMap<String, Mount> = BTreeMap::new();
    for mount in by_path.into_values() {
        let known = by_number.get(&mount.number);
        if known.is_none_or(|known| mount.path.len() < known.path.len()) {
            by_number.insert(mount.number.clone(), mount);
        }
    }
    let mut mounts: Vec<Mount> = by_number
        .into_values()
        .filter(|mount| !KERNEL.contains(&mount.kind.as_str()))
        .collect();
    mounts.sort_by(|one, two| one.path.cmp(&two.path));
    mounts
}

/// One line of `/proc/self/mountinfo` (proc(5)).
fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let number = left.nth(2)?.to_owned();
    let path = unescape(left.nth(1)?);
    let options = left.next()?;
    let mut right = right.split(' ');
    Some(Mount {
        number,
        path,
        kind: right.next()?.to_owned(),
        device: unescape(right.next()?),
        read_only: options.split(',').any(|option| option == "ro"),
    })
}

/// Blanks and the like stand as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let octal = more
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn is_remote(kind: &str) -> bool {
    REMOTE.contains(&kind) || kind.starts_with("fuse")
}

pub(super) fn disk(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    each(arguments, |mount, stat| {
        let unit = stat.f_frsize;
        let kib = |blocks: u64| blocks.saturating_mul(unit) / 1024;
        let total = kib(stat.f_blocks);
        let used = kib(stat.f_blocks.saturating_sub(stat.f_bfree));
        let available = kib(stat.f_bavail);
        if total == 0 {
            return None;
        }
        Some(json!({
            "path": mount.path,
            "device": mount.device,
            "type": mount.kind,
            "read_only": mount.read_only,
            "total_kib": total,
            "used_kib": used,
            "available_kib": available,
            // Like df: of what an ordinary user may have.
            "used_percent": percent(used, used + available),
        }))
    })
}

pub(super) fn inodes(arguments: &Arguments) -> Result<ProbeReply, QueryError> {
    each(arguments, |mount, stat| {
        let used = stat.f_files.saturating_sub(stat.f_ffree);
        if stat.f_files == 0 {
            return Some(json!({
                "path": mount.path,
                "type": mount.kind,
                "skipped": format!("{} has no fixed number of inodes", mount.kind),
            }));
        }
        Some(json!({
            "path": mount.path,
            "device": mount.device,
            "type": mount.kind,
            "total": stat.f_files,
            "used": used,
            "free": stat.f_ffree,
            "used_percent": percent(used, stat.f_files),
        }))
    })
}

fn each(
    arguments: &Arguments,
    look: impl Fn(&Mount, &StatVfs) -> Option<Value>,
) -> Result<ProbeReply, QueryError> {
    let text = read_text("/proc/self/mountinfo")?;
    let mounts = match arguments.get("path") {
        Some(path) => vec![holding(&text, path)?],
        None => mounts(&text),
    };
    let mut found = Vec::new();
    for mount in mounts {
        let skipped =
            |reason: String| json!({ "path": mount.path, "type": mount.kind, "skipped": reason });
        if is_remote(&mount.kind) {
            found.push(skipped(format!(
                "a file system of the kind {} is not looked at: it could hang",
                mount.kind
            )));
            continue;
        }
        match statvfs(&mount.path) {
            Ok(stat) => found.extend(look(&mount, &stat)),
            Err(error) => found.push(skipped(format!("cannot be looked at: {error}"))),
        }
    }
    Ok(facts_of(found.into(), text))
}

/// The mount that holds a path.
fn holding(mountinfo: &str, path: &str) -> Result<Mount, QueryError> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(QueryError::new(
            QueryErrorCode::InvalidRequest,
            format!("the argument `path` must be an absolute path, not `{path}`"),
        ));
    }
    let real = std::fs::canonicalize(path).map_err(|error| unreadable(path, &error))?;
    // In the order of mounting, so that of two at one path the later is taken.
    mountinfo
        .lines()
        .filter_map(mount)
        .filter(|mount| real.starts_with(&mount.path))
        .max_by_key(|mount| mount.path.len())
        .ok_or_else(|| {
            QueryError::new(
                QueryErrorCode::NotFound,
                format!("no mounted file system holds `{path}`"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
24 22 8:1 /srv /mnt/srv\\040a ro,relatime shared:1 - ext4 /dev/sda1 rw
25 22 0:40 / /net rw - nfs4 files:/x rw
26 22 0:41 / /data rw - xfs /dev/old rw
27 22 8:17 / /data ro,noatime master:2 - xfs /dev/sdb1 rw
";

    #[test]
    fn each_file_system_is_seen_once() {
        let found: Vec<_> = mounts(MOUNTINFO)
            .into_iter()
            .map(|mount| (mount.path, mount.device, mount.kind, mount.read_only))
            .collect();
        let mount = |path: &str, device: &str, kind: &str, read_only| {
            (
                path.to_owned(),
                device.to_owned(),
                kind.to_owned(),
                read_only,
            )
        };
        assert_eq!(
            found,
            [
                mount("/", "/dev/sda1", "ext4", false),
                mount("/data", "/dev/sdb1", "xfs", true),
                mount("/net", "files:/x", "nfs4", false),
            ]
        );
    }

    #[test]
    fn paths_are_read_as_they_are() {
        assert_eq!(unescape("/mnt/srv\\040a\\134"), "/mnt/srv a\\");
        assert_eq!(unescape("\\04"), "\\04");
        assert_eq!(unescape("\\xyz"), "\\xyz");
    }

    #[test]
    fn a_path_is_held_by_the_nearest_mount() {
        assert_eq!(holding(MOUNTINFO, "/").unwrap().device, "/dev/sda1");
        assert_eq!(holding(MOUNTINFO, "/proc/self").unwrap().kind, "proc");
        let code = |path| holding(MOUNTINFO, path).unwrap_err().code;
        assert_eq!(code("relative"), QueryErrorCode::InvalidRequest);
        assert_eq!(code("/no/such/path"), QueryErrorCode::NotFound);
    }

    #[test]
    fn this_machine_has_a_disk() {
        let all = |arguments: &[(&str, &str)]| -> Arguments {
            arguments
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        let root = disk(&all(&[("path", "/")])).unwrap().data;
        assert!(root[0]["total_kib"].as_u64().unwrap() > 0, "{root}");
        assert!(root[0]["used_percent"].as_f64().unwrap() <= 100.0, "{root}");
        assert!(!disk(&all(&[])).unwrap().data.as_array().unwrap().is_empty());
        assert!(inodes(&all(&[("path", "/")])).unwrap().data[0]["path"].is_string());
    }
}
