//! Files that are no plugins: each is rejected with its own code, leaves nothing behind and disturbs nobody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;

use support::{Home, guest, line, outline, until};
use windlass_runtime::{PluginState, RejectionCode};

/// A component that exports these interfaces, each with one function that takes and gives nothing.
fn component(imports: &str, exports: &[(&str, &str)]) -> Vec<u8> {
    let exports: String = exports
        .iter()
        .enumerate()
        .map(|(index, (interface, function))| {
            format!(
                "(instance $e{index} (export \"{function}\" (func $f)))
                 (export \"windlass:plugin/{interface}\" (instance $e{index}))"
            )
        })
        .collect();
    wat::parse_str(format!(
        "(component {imports}
            (core module $m (func (export \"f\")))
            (core instance $i (instantiate $m))
            (func $f (canon lift (core func $i \"f\")))
            {exports})"
    ))
    .unwrap()
}

const INFO: (&str, &str) = ("plugin-info@1.0.0", "describe");
const LIFECYCLE: (&str, &str) = ("lifecycle@1.0.0", "lifecycle");

fn precompiled() -> Vec<u8> {
    wasmtime::Engine::default()
        .precompile_component(&component("", &[INFO, LIFECYCLE]))
        .unwrap()
}

/// File, bytes, code.
fn bad_files() -> Vec<(&'static str, Vec<u8>, RejectionCode)> {
    use RejectionCode as Code;
    let marked = |mode: &str| guest("tech-stack", &format!("bad;1.0.0;{mode};"));
    vec![
        ("empty.wasm", Vec::new(), Code::NotWasm),
        ("text.wasm", b"I am text".to_vec(), Code::NotWasm),
        (
            "core.wasm",
            wat::parse_str("(module (func (export \"describe\")))").unwrap(),
            Code::CoreModule,
        ),
        ("precompiled.wasm", precompiled(), Code::Precompiled),
        ("large.wasm", vec![0; 33 * 1024 * 1024], Code::TooLarge),
        (
            "damaged.wasm",
            {
                let mut bytes = marked("ok");
                bytes.truncate(bytes.len() / 2);
                bytes
            },
            Code::InvalidComponent,
        ),
        ("no-world.wasm", component("", &[]), Code::NoWorld),
        ("only-info.wasm", component("", &[INFO]), Code::NoWorld),
        (
            "several.wasm",
            component("", &[INFO, LIFECYCLE, ("strategy@1.0.0", "plan")]),
            Code::SeveralWorlds,
        ),
        (
            "contract.wasm",
            component(
                "",
                &[
                    ("plugin-info@2.0.0", "describe"),
                    ("lifecycle@2.0.0", "lifecycle"),
                ],
            ),
            Code::ContractVersion,
        ),
        (
            "no-info.wasm",
            component("", &[LIFECYCLE]),
            Code::MissingExport,
        ),
        (
            "wrong-type.wasm",
            component("", &[INFO, LIFECYCLE]),
            Code::MissingExport,
        ),
        (
            "import.wasm",
            component(
                "(import \"evil:net/sockets@1.0.0\" (instance (export \"connect\" (func))))",
                &[INFO, LIFECYCLE],
            ),
            Code::UnknownImport,
        ),
        (
            "probes.wasm",
            component(
                "(import \"windlass:plugin/probes@1.0.0\" (instance (export \"available\" (func))))",
                &[INFO, LIFECYCLE],
            ),
            Code::UnknownImport,
        ),
        (
            "memory.wasm",
            wat::parse_str(
                "(component
                    (core module $m (memory 5000) (func (export \"f\")))
                    (core instance $i (instantiate $m))
                    (func $f (canon lift (core func $i \"f\")))
                    (instance $a (export \"describe\" (func $f)))
                    (instance $b (export \"lifecycle\" (func $f)))
                    (export \"windlass:plugin/plugin-info@1.0.0\" (instance $a))
                    (export \"windlass:plugin/lifecycle@1.0.0\" (instance $b)))",
            )
            .unwrap(),
            Code::MemoryLimit,
        ),
        ("loops.wasm", marked("loop"), Code::DescribeTimeout),
        ("allocates.wasm", marked("allocate"), Code::MemoryLimit),
        ("traps.wasm", marked("trap"), Code::DescribeFailed),
        ("recurses.wasm", marked("recurse"), Code::DescribeFailed),
        (
            "schema-broken.wasm",
            marked("schema-broken"),
            Code::SchemaInvalid,
        ),
        (
            "schema-wrong.wasm",
            marked("schema-wrong"),
            Code::SchemaInvalid,
        ),
        (
            "schema-enormous.wasm",
            marked("schema-enormous"),
            Code::SchemaTooLarge,
        ),
        (
            "schema-remote.wasm",
            marked("schema-remote"),
            Code::SchemaRemoteReference,
        ),
        (
            "schema-regex.wasm",
            marked("schema-regex"),
            Code::SchemaRegex,
        ),
        ("no-title.wasm", marked("no-title"), Code::DescriptorInvalid),
        (
            "bad-name.wasm",
            guest("tech-stack", "Bad Name;1.0.0;ok;"),
            Code::DescriptorInvalid,
        ),
        (
            "bad-version.wasm",
            guest("tech-stack", "bad;one;ok;"),
            Code::DescriptorInvalid,
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_bad_file_has_its_own_code_and_disturbs_nobody() {
    let home = Home::new();
    home.drop_file("good.wasm", &guest("tech-stack", "good;1.0.0;ok;"));
    let plugins = home.open().await;
    let bad = bad_files();
    for (name, bytes, _) in &bad {
        home.drop_file(name, bytes);
    }
    // What is wrong with the file itself, not with its bytes.
    fs::create_dir(home.file("directory.wasm")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", home.file("outside.wasm")).unwrap();
    std::os::unix::fs::symlink("nothing", home.file("dangling.wasm")).unwrap();
    std::os::unix::fs::symlink("good.wasm", home.file("inside.wasm")).unwrap();
    let mut expect: Vec<(&str, RejectionCode)> =
        bad.iter().map(|(name, _, code)| (*name, *code)).collect();
    expect.extend([
        ("directory.wasm", RejectionCode::NotAFile),
        ("outside.wasm", RejectionCode::SymlinkOutside),
        ("dangling.wasm", RejectionCode::Unreadable),
    ]);
    until(&plugins, "all rejected", |list| {
        list.iter()
            .filter(|status| status.state == PluginState::Rejected)
            .count()
            == expect.len()
    })
    .await;

    let list = plugins.list();
    for (name, code) in expect {
        let status = list
            .iter()
            .find(|status| status.file.as_deref() == Some(name))
            .unwrap();
        let rejection = status.rejection.as_ref().unwrap();
        assert_eq!(rejection.code, code, "{name}: {}", rejection.text);
        assert!(rejection.text.len() > 10, "{name}: {}", rejection.text);
    }
    // The good one still answers, and is the only one that is kept.
    let good = plugins.get("good", None).unwrap();
    good.lifecycle(&support::lifecycle(serde_json::json!({})))
        .await
        .unwrap();
    let kept = fs::read_dir(home.state().join("kept")).unwrap().count();
    assert_eq!(
        kept,
        2,
        "bytes and record of the good one: {:?}",
        outline(&plugins)
    );
    assert_eq!(
        fs::read_dir(home.state().join("staging")).unwrap().count(),
        0
    );
    assert_eq!(
        fs::read_dir(home.state().join("compiled")).unwrap().count(),
        1
    );
    plugins.close().await;
}

#[tokio::test]
async fn limits_stand_in_the_text_with_the_figure() {
    let home = Home::new();
    home.drop_file("large.wasm", &vec![0; 33 * 1024 * 1024]);
    home.drop_file("loops.wasm", &guest("tech-stack", "bad;1.0.0;loop;"));
    let plugins = home.open().await;
    for (file, figures) in [
        ("large.wasm", vec!["34603008", "33554432"]),
        ("loops.wasm", vec!["300 ms"]),
    ] {
        let list = plugins.list();
        let status = list
            .iter()
            .find(|status| status.file.as_deref() == Some(file))
            .unwrap();
        let text = &status.rejection.as_ref().unwrap().text;
        for figure in figures {
            assert!(text.contains(figure), "{text}");
        }
    }
    plugins.close().await;
}

#[tokio::test]
async fn a_compiling_child_that_hangs_is_killed_and_the_next_file_is_compiled() {
    let home = Home::new();
    home.drop_file("good.wasm", &guest("tech-stack", "good;1.0.0;ok;"));
    let pid_file = home.temp.path().join("pid");
    let mut config = home.config();
    config.limits.compile_time = std::time::Duration::from_millis(300);
    config.compile_command = vec![
        "/bin/sh".into(),
        "-c".into(),
        format!("echo $$ > {}; exec sleep 600", pid_file.display()).into(),
    ];
    let plugins = home.open_with(config).await;
    assert_eq!(outline(&plugins), ["good.wasm Rejected CompileLimit"]);
    let pid = fs::read_to_string(&pid_file).unwrap();
    let alive = std::path::Path::new("/proc").join(pid.trim()).exists();
    assert!(!alive, "the child {pid} still runs");
    plugins.close().await;
    drop(plugins);

    let plugins = home.open().await;
    assert_eq!(
        plugins.list().iter().map(line).collect::<Vec<_>>(),
        ["good.wasm good@1.0.0 Active default"]
    );
    plugins.close().await;
}
