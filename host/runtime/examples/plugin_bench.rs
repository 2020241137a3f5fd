//! Figures of the plugin host, one `name value unit` line each.
//!
//! `plugin_bench [PLUGIN_DIR]` (default `target/plugins`, built by `plugins/build.sh`).
//!
//! - `plugin_call_p50_us`, `plugin_call_p99_us`: `lifecycle` of the `binary` stack for one server, through the public API: a
//!   fresh store, instance, call, conversion both ways. 5,000 calls one after the other, after 500 that are not counted.
//! - `plugin_drop_ms`: a plugin's file renamed into the watched directory → it can be had and was called, with nothing in
//!   the cache. The worst of all shipped plugins, each dropped once.

use std::{
    collections::BTreeMap,
    error::Error,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use windlass_domain::{
    plugin::{LifecycleRequest, Phase, ServerFacts},
    task::{PackageFormat, PackageRef},
};
use windlass_runtime::{COMPILE_SUBCOMMAND, Plugins, PluginsConfig, compile_child_main};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some(OsStr::new(COMPILE_SUBCOMMAND)) {
        return compile_child_main(arguments);
    }
    let dir = first.map_or_else(|| PathBuf::from("target/plugins"), PathBuf::from);
    match run(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plugin_bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(shipped: &Path) -> Result<(), Box<dyn Error>> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(measure(shipped))
}

async fn measure(shipped: &Path) -> Result<(), Box<dyn Error>> {
    let temp = tempfile::tempdir()?;
    let dir = temp.path().join("plugins");
    fs::create_dir(&dir)?;
    let state = temp.path().join("state");
    let plugins = Plugins::open(PluginsConfig::new(dir.clone(), state.clone())?).await?;

    let mut worst = Duration::ZERO;
    for name in [
        "binary",
        "blue-green",
        "canary",
        "grouped",
        "server-basics",
        "system-info",
    ] {
        let file = format!("{name}.wasm");
        let hidden = dir.join(format!(".{file}"));
        fs::copy(shipped.join(&file), &hidden)?;
        let started = Instant::now();
        fs::rename(&hidden, dir.join(&file))?;
        let mut changes = plugins.changes();
        while plugins.get(name, None).is_err() {
            tokio::time::timeout(Duration::from_secs(30), changes.changed()).await??;
        }
        worst = worst.max(started.elapsed());
    }
    println!("plugin_drop_ms {} ms", worst.as_millis());
    plugins.close().await;
    drop(plugins);

    let started = Instant::now();
    let plugins = Plugins::open(PluginsConfig::new(dir, state)?).await?;
    println!(
        "plugin_open_warm_ms {:.1} ms",
        started.elapsed().as_secs_f64() * 1e3
    );

    let stack = plugins.get("binary", None)?;
    let request = request();
    let mut times = Vec::new();
    for round in 0..5_500 {
        let started = Instant::now();
        stack.lifecycle(&request).await?;
        if round >= 500 {
            times.push(started.elapsed());
        }
    }
    times.sort();
    for (name, share) in [("plugin_call_p50_us", 50), ("plugin_call_p99_us", 99)] {
        let time = times[times.len() * share / 100];
        println!("{name} {:.1} us", time.as_secs_f64() * 1e6);
    }
    plugins.close().await;
    Ok(())
}

fn request() -> LifecycleRequest {
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
        parameters: serde_json::json!({ "port": 8080, "health": { "kind": "http", "path": "/" } }),
        env: BTreeMap::new(),
        phases: vec![Phase::Stop, Phase::Start, Phase::Check],
        servers: vec![ServerFacts {
            id: "s1".into(),
            name: "s1".into(),
            os: "debian".into(),
            os_version: "12".into(),
            arch: "x86_64".into(),
            address: "127.0.0.1".into(),
            cell: "a".into(),
            variables: BTreeMap::new(),
        }],
    }
}
