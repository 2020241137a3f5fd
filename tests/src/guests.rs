//! Plugin directories that hold test guests beside the shipped plugins.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::host;

/// The text in a guest's bytes that says what it is (see the crate `windlass-test-guests`).
const MARKER: &[u8] = b"windlass-test-marker:;1.0.0;ok;";
/// Length of the whole marker.
const MARKER_BYTES: usize = 160;

/// The bytes of the test guest of a kind (`deployment-strategy`, `tech-stack`, …) under a name and version of its own.
///
/// # Panics
/// When the test guests are not built.
#[must_use]
pub fn guest(kind: &str, name: &str, version: &str) -> Vec<u8> {
    guest_that(kind, name, version, "ok")
}

/// The same, of a guest whose `describe` does something else: `loop`, `allocate`, `trap`, `schema-broken`, …
///
/// # Panics
/// When the test guests are not built.
#[must_use]
pub fn guest_that(kind: &str, name: &str, version: &str, mode: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent");
    // Relative to the workspace, as in tests/bench.sh.
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    let path = root
        .join(target)
        .join(format!("test-guests/test-{kind}.wasm"));
    let mut bytes = fs::read(&path).unwrap_or_else(|_| {
        panic!("test guests are not built: run `sh plugins/build.sh --guests`")
    });
    let at = bytes
        .windows(MARKER.len())
        .position(|window| window == MARKER)
        .expect("the guest holds its marker");
    let text = format!("windlass-test-marker:{name};{version};{mode};");
    assert!(text.len() <= MARKER_BYTES, "the marker is full");
    bytes[at..at + MARKER_BYTES].fill(b' ');
    bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A plugin directory of a test's own, gone with it.
pub struct PluginDirectory {
    directory: TempDir,
}

impl PluginDirectory {
    /// The shipped plugins.
    ///
    /// # Panics
    /// When they cannot be copied.
    #[must_use]
    pub fn shipped() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for entry in fs::read_dir(host::plugins()).expect("the built plugins") {
            let path = entry.expect("an entry").path();
            if path
                .extension()
                .is_some_and(|extension| extension == "wasm")
            {
                fs::copy(
                    &path,
                    directory
                        .path()
                        .join(path.file_name().expect("a file name")),
                )
                .expect("a plugin is copied");
            }
        }
        Self { directory }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// Puts a plugin into it, whole from its first moment.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn drop_in(&self, file: &str, bytes: &[u8]) {
        let hidden = self.directory.path().join(format!(".{file}.new"));
        fs::write(&hidden, bytes).expect("a plugin is written");
        fs::rename(&hidden, self.directory.path().join(file)).expect("a plugin is dropped");
    }
}

/// Waits until a plugin (`name@version`) can be planned with.
pub async fn wait_active(host: &host::TestHost, plugin: &str) {
    host::eventually(&format!("the plugin {plugin} is active"), || async {
        let found = host
            .api
            .get(&format!("/v1/plugins/{plugin}"))
            .await
            .map_err(|error| error.to_string())?;
        if found["state"] == "active" {
            Ok(())
        } else {
            Err(found.to_string())
        }
    })
    .await;
}
