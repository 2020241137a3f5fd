//! Tasks as an order would hold them.

use windlass_domain::{
    Digest, Timestamp,
    id::{AppId, InstanceId, OrderId},
    manifest::{Manifest, PluginRef},
    task::{Action, PackageFormat, PackageRef, Script, Supervise, Task, TaskId},
    value::Environment,
};

use super::{Gateway, id};

/// Makes tasks of one order and one instance.
pub(crate) struct Order {
    pub(crate) order: OrderId,
    pub(crate) instance: InstanceId,
    node: u32,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self {
            order: OrderId::from_uuid(id()),
            instance: InstanceId::from_uuid(id()),
            node: 0,
        }
    }

    pub(crate) fn task(&mut self, action: Action) -> Task {
        self.node += 1;
        Task {
            id: TaskId {
                order: self.order,
                node: self.node,
                attempt: 1,
            },
            instance: Some(self.instance),
            release: None,
            fence: 1,
            expires_at: Timestamp::from_unix_ms(253_000_000_000_000),
            timeout_ms: 50_000,
            run_as: None,
            env: Environment::new(),
            action,
        }
    }

    pub(crate) fn script(&mut self, text: &str) -> Task {
        self.task(Action::Script(script(text)))
    }

    pub(crate) fn manifest(&self, release: &str, package: &PackageRef) -> Manifest {
        Manifest {
            instance: self.instance,
            app: AppId::from_uuid(id()),
            release: release.into(),
            package: package.clone(),
            stack: PluginRef {
                name: "binary".into(),
                version: "1.0.0".parse().unwrap(),
                digest: Digest::of(b"p"),
            },
            stop: vec![],
            start: vec![],
            check: vec![],
            env: Environment::new(),
            plan: None,
            prepared: None,
        }
    }

    pub(crate) fn start(&mut self, command: &[&str]) -> Task {
        self.task(Action::Start(Supervise {
            command: command.iter().map(ToString::to_string).collect(),
            working_dir: None,
            restart: windlass_domain::task::Restart::Always,
            keep_running: false,
        }))
    }
}

pub(crate) fn script(text: &str) -> Script {
    Script {
        interpreter: vec!["/bin/sh".into(), "-eu".into()],
        text: text.into(),
        working_dir: None,
    }
}

pub(crate) fn package(
    gateway: &Gateway,
    bytes: Vec<u8>,
    format: PackageFormat,
    file_name: &str,
) -> PackageRef {
    let digest = Digest::of(&bytes);
    let package = PackageRef {
        digest,
        size_bytes: bytes.len() as u64,
        format,
        file_name: file_name.into(),
        version: "1".into(),
    };
    gateway.state().blobs.insert(digest, bytes);
    package
}
