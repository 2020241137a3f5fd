//! The files of one load balancer.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use windlass_domain::{
    id::{CertificateId, LoadBalancerId},
    load_balancer::{
        Configuration,
        render::{self, Machine},
    },
};
use windlass_protocol::SecretText;

use super::tally::Kept;
use crate::{
    config::DataDir,
    files::{Context as _, FileError, make_dir, read_json, remove_file, write_durable, write_json},
    shim::spec::RunDir,
    tree::remove_tree,
};

/// The directory of one load balancer.
pub(super) struct BalancerDir {
    id: LoadBalancerId,
    path: PathBuf,
}

/// The load balancers that have a directory.
pub(super) fn all(data: &DataDir) -> Vec<LoadBalancerId> {
    fs::read_dir(data.balancers())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

impl BalancerDir {
    pub(super) fn new(data: &DataDir, id: LoadBalancerId) -> Self {
        let path = data.balancers().join(id.to_string());
        Self { id, path }
    }

    pub(super) fn id(&self) -> LoadBalancerId {
        self.id
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn run(&self) -> RunDir {
        RunDir::new(self.path.join("run"))
    }

    /// The socket of HAProxy's master.
    pub(super) fn admin(&self) -> PathBuf {
        self.path.join(super::process::ADMIN_SOCKET)
    }

    pub(super) fn configuration(&self) -> PathBuf {
        self.path.join(render::CONFIGURATION_FILE)
    }

    pub(super) fn next(&self) -> PathBuf {
        self.path.join("next.cfg")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.path.join(render::STATE_FILE)
    }

    pub(super) fn bandwidth(&self) -> PathBuf {
        self.path.join("bandwidth.nft")
    }

    fn desired_file(&self) -> PathBuf {
        self.path.join("desired.json")
    }

    fn certificates(&self) -> PathBuf {
        self.path.join(render::CERTIFICATES_DIRECTORY)
    }

    /// Makes the directories.
    pub(super) fn make(&self) -> Result<(), FileError> {
        // Others may pass through to the sockets' names and no further: each file has a mode of its own.
        make_dir(&self.path, 0o711)?;
        make_dir(&self.certificates(), 0o700)
    }

    pub(super) fn remove(&self) -> Result<(), FileError> {
        remove_tree(&self.path)
    }

    pub(super) fn desired(&self) -> Result<Option<Configuration>, FileError> {
        read_json(&self.desired_file())
    }

    fn counted_file(&self) -> PathBuf {
        self.path.join("counted.json")
    }

    pub(super) fn counted(&self) -> Result<Option<Kept>, FileError> {
        read_json(&self.counted_file())
    }

    /// Keeps what HAProxy's processes have counted.
    pub(super) fn keep_counted(&self, kept: &Kept) -> Result<(), FileError> {
        write_json(&self.counted_file(), kept, 0o600)
    }

    /// Keeps what HAProxy has taken.
    pub(super) fn keep(&self, configuration: &Configuration) -> Result<(), FileError> {
        write_json(&self.desired_file(), configuration, 0o600)
    }

    /// Writes what HAProxy reads when it starts or reloads.
    pub(super) fn write_configuration(
        &self,
        configuration: &Configuration,
    ) -> Result<(), FileError> {
        let text = render::haproxy(configuration, &machine());
        write_durable(&self.configuration(), text.as_bytes(), 0o600)
    }

    pub(super) fn write_next(&self, configuration: &Configuration) -> Result<(), FileError> {
        let text = render::haproxy(configuration, &machine());
        write_durable(&self.next(), text.as_bytes(), 0o600)
    }

    /// What checks had found is known for one reload only: later it would be wrong.
    pub(super) fn forget_state(&self) -> Result<(), FileError> {
        remove_file(&self.state())
    }

    /// A certificate never changes: another one has another id.
    pub(super) fn put_certificate(
        &self,
        id: CertificateId,
        pem: &SecretText,
    ) -> Result<(), FileError> {
        let path = self.certificates().join(format!("{id}.pem"));
        if fs::read(&path).is_ok_and(|there| there == pem.reveal().as_bytes()) {
            return Ok(());
        }
        write_durable(&path, pem.reveal().as_bytes(), 0o600)
    }

    pub(super) fn drop_certificates_except(
        &self,
        configuration: &Configuration,
    ) -> Result<(), FileError> {
        let shown: BTreeSet<String> = configuration
            .certificates()
            .map(|id| format!("{id}.pem"))
            .collect();
        let path = self.certificates();
        for entry in fs::read_dir(&path).during("read", &path)?.flatten() {
            let wanted = entry
                .file_name()
                .to_str()
                .is_some_and(|name| shown.contains(name));
            if !wanted {
                remove_file(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// What HAProxy has on this machine. Workers of an agent that runs as root become the packaged user.
fn machine() -> Machine {
    let root = rustix::process::geteuid().is_root();
    let worker = root
        .then(|| {
            ["haproxy", "nobody"]
                .into_iter()
                .find_map(crate::users::lookup)
        })
        .flatten()
        .and_then(|user| Some((user.name, group(user.gid)?)));
    Machine {
        worker,
        ipv6: fs::read_to_string("/proc/net/if_inet6").is_ok_and(|text| !text.is_empty()),
    }
}

fn group(gid: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/group").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse::<u32>() == Ok(gid)).then(|| name.to_owned())
    })
}
