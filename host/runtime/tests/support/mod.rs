//! Directories, guests and waiting, for the tests of this crate.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use windlass_domain::{
    plugin::{LifecycleRequest, Phase, ServerFacts},
    task::{PackageFormat, PackageRef},
};
use windlass_runtime::{PluginState, PluginStatus, Plugins, PluginsConfig};

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn build(arguments: &[&str]) {
    let output = Command::new("sh")
        .arg(root().join("plugins/build.sh"))
        .args(arguments)
        .output()
        .expect("sh runs");
    assert!(
        output.status.success(),
        "plugins/build.sh: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The directory of the shipped plugins, built.
pub(crate) fn shipped() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| build(&[]));
    root().join("target/plugins")
}

/// The bytes of a test guest; `marker` is `name;version;mode;` (see the crate `windlass-test-guests`).
pub(crate) fn guest(kind: &str, marker: &str) -> Vec<u8> {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| build(&["--guests"]));
    let path = root().join(format!("target/test-guests/test-{kind}.wasm"));
    let mut bytes = fs::read(&path).unwrap();
    let found = b"windlass-test-marker:;1.0.0;ok;";
    let at = bytes
        .windows(found.len())
        .position(|window| window == found)
        .expect("the guest holds its marker");
    let text = format!("windlass-test-marker:{marker}");
    assert!(text.len() <= 160, "the marker is full");
    bytes[at..at + 160].fill(b' ');
    bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A plugin directory and the platform's own, which vanish with it.
pub(crate) struct Home {
    pub(crate) temp: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("plugins")).unwrap();
        Self { temp }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.temp.path().join("plugins").join(name)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.temp.path().join("state")
    }

    /// Drops a file as a person would who is careful: complete at once.
    pub(crate) fn drop_file(&self, name: &str, bytes: &[u8]) {
        let hidden = self.file(&format!(".{name}"));
        fs::write(&hidden, bytes).unwrap();
        fs::rename(hidden, self.file(name)).unwrap();
    }

    pub(crate) fn config(&self) -> PluginsConfig {
        let mut config =
            PluginsConfig::new(self.temp.path().join("plugins"), self.state()).unwrap();
        config.compile_command = vec![env!("CARGO_BIN_EXE_windlass-compile-plugin").into()];
        config.limits.guest_time = Duration::from_millis(300);
        config
    }

    pub(crate) async fn open(&self) -> Plugins {
        self.open_with(self.config()).await
    }

    pub(crate) async fn open_with(&self, config: PluginsConfig) -> Plugins {
        let plugins = Plugins::open(config).await.unwrap();
        plugins.settled().await;
        plugins
    }
}

/// Waits until the list is as wanted; reports the last one if it never is.
pub(crate) async fn until(plugins: &Plugins, what: &str, wanted: impl Fn(&[PluginStatus]) -> bool) {
    let mut changes = plugins.changes();
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !wanted(&plugins.list()) {
            changes.changed().await.unwrap();
        }
    })
    .await;
    assert!(waited.is_ok(), "never {what}: {:#?}", outline(plugins));
}

/// The list as text: `file name@version state code`.
pub(crate) fn outline(plugins: &Plugins) -> Vec<String> {
    plugins.list().iter().map(line).collect()
}

pub(crate) fn line(status: &PluginStatus) -> String {
    let plugin = status
        .descriptor
        .as_ref()
        .map_or_else(String::new, |descriptor| {
            format!(" {}@{}", descriptor.name, descriptor.version)
        });
    let rejection = status
        .rejection
        .as_ref()
        .map_or_else(String::new, |rejection| format!(" {:?}", rejection.code));
    let default = if status.is_default { " default" } else { "" };
    format!(
        "{}{plugin} {:?}{rejection}{default}",
        status.file.as_deref().unwrap_or("-"),
        status.state
    )
}

pub(crate) fn state_of(list: &[PluginStatus], file: &str) -> Option<PluginState> {
    list.iter()
        .rev()
        .find(|status| status.file.as_deref() == Some(file))
        .map(|status| status.state)
}

/// A small request: one server, the phases of a release.
pub(crate) fn lifecycle(parameters: serde_json::Value) -> LifecycleRequest {
    LifecycleRequest {
        application: "shop".into(),
        instance: "shop-prod".into(),
        package: Some(PackageRef {
            digest: windlass_domain::Digest::of(b"package"),
            size_bytes: 7,
            format: PackageFormat::Plain,
            file_name: "shop".into(),
            version: "1".into(),
        }),
        parameters,
        env: BTreeMap::new(),
        phases: vec![Phase::Configure, Phase::Stop, Phase::Start, Phase::Check],
        servers: vec![server("s1")],
    }
}

pub(crate) fn server(id: &str) -> ServerFacts {
    ServerFacts {
        id: id.into(),
        name: id.into(),
        os: "debian".into(),
        os_version: "12".into(),
        arch: "x86_64".into(),
        address: "127.0.0.1".into(),
        cell: "a".into(),
        variables: BTreeMap::new(),
    }
}
