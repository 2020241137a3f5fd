//! What authors do, as they do it: projects made by `windlass plugin new` in a directory outside of this repository are built,
//! tested natively, and their components examined; the examples are what the templates make.
//!
//! Compiled things are kept in `target/authoring`, so that a second run is quick. Python and JavaScript tools come from their
//! registries, in the versions that the projects' own build scripts name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;
use windlass_tests::host;

const KINDS: [&str; 4] = [
    "tech-stack",
    "deployment-strategy",
    "diagnostic",
    "public-command",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Where tools and compiled things are kept between runs.
fn kept(name: &str) -> PathBuf {
    let directory = root().join("target/authoring").join(name);
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// A command that finds everything that is kept.
fn command(program: impl AsRef<std::ffi::OsStr>, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(directory)
        .env("WINDLASS", host::program("windlass"))
        .env("XDG_CACHE_HOME", kept("cache"))
        .env("CARGO_TARGET_DIR", kept("cargo"))
        .env("WINDLASS_PYTHON_TOOLS", kept("python"))
        .env("WINDLASS_NODE_TOOLS", kept("node"))
        // What runs this test is no business of the project's build.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Runs to the end; answers standard output.
fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn windlass(directory: &Path, arguments: &[&str]) -> String {
    run(command(host::program("windlass"), directory)
        .arg("plugin")
        .args(arguments))
}

/// A project of its own for each kind: `hello-KIND`.
fn projects(temp: &TempDir, language: &str) -> Vec<(&'static str, PathBuf)> {
    KINDS
        .into_iter()
        .map(|kind| {
            let name = format!("hello-{kind}");
            windlass(
                temp.path(),
                &["new", "--kind", kind, "--lang", language, &name],
            );
            (kind, temp.path().join(name))
        })
        .collect()
}

/// The kit's report on a component: one entry.
fn examined(directory: &Path, component: &Path) -> Value {
    let samples = directory.join("samples");
    let report = windlass(
        directory,
        &[
            "test",
            "--json",
            "--samples",
            samples.to_str().unwrap(),
            component.to_str().unwrap(),
        ],
    );
    serde_json::from_str::<Value>(&report).unwrap()[0].clone()
}

fn assert_kind(report: &Value, kind: &str) {
    assert_eq!(report["kind"], kind);
    let samples = report["examination"]["rules"]
        .as_array()
        .unwrap()
        .iter()
        .find(|rule| rule["rule"] == "samples")
        .unwrap();
    assert_eq!(samples["severity"], "passed", "{samples:#}");
}

#[test]
fn rust_projects_build_test_and_conform() {
    let temp = tempfile::tempdir().unwrap();
    for (kind, project) in projects(&temp, "rust") {
        run(command("cargo", &project).args(["fmt", "--check"]));
        symlink(kept("cargo"), project.join("target")).unwrap();
        let target = wasm_target();
        let mut tests = command("cargo", &project);
        tests.args(["test", "--quiet", "--release"]);
        if target == TARGET {
            // Unit tests, and the project's own integration test: it builds the component and runs the kit.
            run(&mut tests);
        } else {
            run(tests.arg("--lib"));
            let mut build = command("cargo", &project);
            run(build.args(["build", "--quiet", "--release", "--lib", "--target", target]));
        }
        let component = project.join(format!(
            "target/{target}/release/hello_{}_plugin.wasm",
            kind.replace('-', "_")
        ));
        assert_kind(&examined(&project, &component), kind);
        let told = windlass(&project, &["check", component.to_str().unwrap()]);
        assert!(told.contains(&format!("kind        {kind}")), "{told}");
    }
}

/// What projects are built for.
const TARGET: &str = "wasm32-unknown-unknown";

/// Where the standard library for it can be had, as `plugins/build.sh` finds out.
fn wasm_target() -> &'static str {
    let installed = run(Command::new("rustc").args(["--print", "sysroot"]));
    let library = |target: &str| {
        Path::new(installed.trim())
            .join("lib/rustlib")
            .join(target)
            .join("lib")
            .is_dir()
    };
    [TARGET, "wasm32-wasip2"]
        .into_iter()
        .find(|target| library(target))
        .expect("`rustup target add wasm32-unknown-unknown` gives the standard library that authors need")
}

#[test]
fn python_projects_test_natively_and_the_example_conforms() {
    let temp = tempfile::tempdir().unwrap();
    let example = copy_of_example(&temp, "python-disk-space");
    // The project's own integration test builds it and runs the kit.
    for tests in ["tests.test_component", "tests.test_plugin"] {
        run(command("python3", &example).args(["-m", "unittest", tests]));
    }
    let component = example.join("target/disk-space.wasm");
    assert_kind(&examined(&example, &component), "diagnostic");
    for (kind, project) in projects(&temp, "python") {
        let tool = kept("python").join("bin/componentize-py");
        let world = format!("windlass:plugin/{kind}");
        run(command(tool, &project).args([
            "-q",
            "-d",
            "wit",
            "-w",
            &world,
            "bindings",
            "target/bindings",
        ]));
        run(command("python3", &project).args(["-m", "unittest", "tests.test_plugin"]));
    }
}

#[test]
fn javascript_projects_test_natively_and_the_example_conforms() {
    let temp = tempfile::tempdir().unwrap();
    let example = copy_of_example(&temp, "javascript-batches");
    // The project's own integration test builds it and runs the kit.
    run(command("node", &example).args(["--test", "test/component.test.js"]));
    let component = example.join("target/batches.wasm");
    assert_kind(&examined(&example, &component), "deployment-strategy");
    for (kind, project) in projects(&temp, "javascript") {
        run(command("node", &project).args(["--test", "test/plugin.test.js"]));
        // The small engine: quick enough for all kinds.
        run(command("sh", &project).args(["build.sh", "--engine", "quickjs"]));
        let component = project.join(format!("target/hello-{kind}.wasm"));
        assert_kind(&examined(&project, &component), kind);
    }
}

/// The project of `plugins/examples`, with the contract beside it as in a project of its own.
fn copy_of_example(temp: &TempDir, name: &str) -> PathBuf {
    let to = temp.path().join(name);
    for (path, text) in tree(&root().join("plugins/examples").join(name)) {
        let path = to.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    to
}

/// Files and their texts; links are followed, and what builds make is left out.
fn tree(directory: &Path) -> BTreeMap<String, String> {
    fn walk(base: &Path, directory: &Path, files: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if ["target", "node_modules", "__pycache__"].contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                walk(base, &path, files);
            } else {
                let relative = path.strip_prefix(base).unwrap().display().to_string();
                files.insert(relative, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut files = BTreeMap::new();
    walk(directory, directory, &mut files);
    files
}

#[test]
fn the_examples_are_what_the_templates_make() {
    let temp = tempfile::tempdir().unwrap();
    for (example, kind, language, name) in [
        ("python-disk-space", "diagnostic", "python", "disk-space"),
        (
            "javascript-batches",
            "deployment-strategy",
            "javascript",
            "batches",
        ),
    ] {
        windlass(
            temp.path(),
            &["new", "--kind", kind, "--lang", language, name],
        );
        let (made, kept) = (
            tree(&temp.path().join(name)),
            tree(&root().join("plugins/examples").join(example)),
        );
        for (path, text) in &made {
            assert_eq!(
                kept.get(path),
                Some(text),
                "{example}/{path} is not what `windlass plugin new` makes"
            );
        }
        assert_eq!(
            made.len(),
            kept.len(),
            "{example} has other files: {:?}",
            kept.keys()
        );
    }
}

#[test]
fn faults_end_with_their_exit_code_and_say_what_is_wrong() {
    let temp = tempfile::tempdir().unwrap();
    let text = temp.path().join("text.wasm");
    fs::write(&text, "no component").unwrap();
    let text = text.to_str().unwrap();
    let binary = host::plugins().join("binary.wasm");
    let binary = binary.to_str().unwrap();
    for (arguments, code, says) in [
        (vec!["check", text], 1, "not WebAssembly"),
        (
            vec!["call", binary, "lifecycle", "--input", "{"],
            1,
            "--input is not JSON",
        ),
        (vec!["call", binary, "plan"], 1, "TechStack"),
        (vec!["call", binary, "deploy"], 2, "lifecycle"),
        (
            vec!["call", binary, "lifecycle", "--input", r#"{"phase":[]}"#],
            1,
            "/phase",
        ),
        (vec!["test", temp.path().to_str().unwrap()], 1, "text.wasm"),
        (
            vec!["new", "--kind", "tech-stack", "Bad_Name"],
            1,
            "not a plugin's name",
        ),
        (vec!["new", "--kind", "stack", "x"], 2, "tech-stack"),
        (vec!["wit-diff", text, text], 1, "not a WIT package"),
    ] {
        let output = command(host::program("windlass"), temp.path())
            .arg("plugin")
            .args(&arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    assert_eq!(
        fs::read_dir(temp.path()).unwrap().count(),
        1,
        "nothing is left behind"
    );
    // Nobody reads what is printed: no panic.
    let mut closed = command(host::program("windlass"), temp.path());
    let file = host::plugins().join("system-info.wasm");
    closed.args(["plugin", "check"]).arg(file);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = closed.stdout(writer).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_call_prints_its_answer_and_the_contract_is_compared() {
    let temp = tempfile::tempdir().unwrap();
    let file = host::plugins().join("system-info.wasm");
    let answer = windlass(
        temp.path(),
        &[
            "call",
            file.to_str().unwrap(),
            "render",
            "--input",
            r#"{"parameters":{"disk_path":"/data"}}"#,
        ],
    );
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["env"]["DISK_PATH"]["plain"], "/data");

    let wit = root().join("wit");
    let changed = temp.path().join("wit");
    fs::create_dir(&changed).unwrap();
    for entry in fs::read_dir(&wit).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, changed.join(path.file_name().unwrap())).unwrap();
    }
    let told = windlass(
        temp.path(),
        &["wit-diff", wit.to_str().unwrap(), changed.to_str().unwrap()],
    );
    assert!(told.contains("nothing changed"), "{told}");
    let host_wit = changed.join("host.wit");
    let text = fs::read_to_string(&host_wit).unwrap();
    fs::write(
        &host_wit,
        text.replacen("trace,", "verbose,\n        trace,", 1),
    )
    .unwrap();
    let output = command(host::program("windlass"), temp.path())
        .args([
            "plugin",
            "wit-diff",
            wit.to_str().unwrap(),
            changed.to_str().unwrap(),
        ])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("logging.level: the case `verbose` is new"),
        "{told}"
    );
}
