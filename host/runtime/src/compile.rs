//! Compiling a component in a child process: one at a time, low priority, with limits.
//!
//! Compiling bytes that nobody has looked at yet is the most expensive thing a dropped file can cause, so it happens in a
//! process of its own: the server's own binary, run again with `compile-plugin`. The child writes into the cache of
//! compiled code that the server reads; the server then finds the code there. Artefacts come from the child alone: the
//! cache belongs to the platform (mode 0700), and precompiled bytes in the plugin directory are refused.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt, process::Command, sync::Mutex};
use wasmtime::{Engine, component::Component};

use crate::{
    error::{Rejection, RejectionCode, millis},
    sandbox::{cache, config},
};

/// The sub-command of the server's binary that is the compiling child.
pub const COMPILE_SUBCOMMAND: &str = "compile-plugin";
/// Bytes of the child's message that are read.
const MESSAGE_BYTES: u64 = 8 * 1024;
/// The child ends with this when the bytes are not a valid component.
const EXIT_INVALID: u8 = 65;

/// Runs the compiling child.
#[derive(Debug)]
pub(crate) struct Compiler {
    command: Vec<OsString>,
    cache_dir: PathBuf,
    time: Duration,
    memory_bytes: u64,
    one_at_a_time: Mutex<()>,
}

impl Compiler {
    pub(crate) fn new(
        command: Vec<OsString>,
        cache_dir: PathBuf,
        time: Duration,
        memory_bytes: u64,
    ) -> Self {
        Self {
            command,
            cache_dir,
            time,
            memory_bytes,
            one_at_a_time: Mutex::new(()),
        }
    }

    /// Compiles the component in `file` into the cache.
    pub(crate) async fn compile(&self, file: &Path) -> Result<(), Rejection> {
        let failed = |reason: String| {
            Rejection::new(
                RejectionCode::CompileFailed,
                format!("the compiling process could not be used: {reason}"),
            )
        };
        let Some((program, arguments)) = self.command.split_first() else {
            return Err(failed("no command is configured".into()));
        };
        let _turn = self.one_at_a_time.lock().await;
        let mut child = Command::new(program)
            .args(arguments)
            .arg("--component")
            .arg(file)
            .arg("--cache")
            .arg(&self.cache_dir)
            .arg("--memory-bytes")
            .arg(self.memory_bytes.to_string())
            .arg("--cpu-seconds")
            .arg(self.time.as_secs().max(1).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| failed(format!("{}: {error}", program.display())))?;
        let mut message = Vec::new();
        let waited = tokio::time::timeout(self.time, async {
            if let Some(output) = child.stdout.take() {
                output.take(MESSAGE_BYTES).read_to_end(&mut message).await?;
            }
            child.wait().await
        })
        .await;
        let status = match waited {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(_) => {
                if let Err(error) = child.kill().await {
                    tracing::error!("the compiling process cannot be killed: {error}");
                }
                return Err(Rejection::new(
                    RejectionCode::CompileLimit,
                    format!(
                        "compiling took longer than the limit of {} ms",
                        millis(self.time)
                    ),
                ));
            }
        };
        let message = String::from_utf8_lossy(&message).trim().to_owned();
        match status.code() {
            Some(0) => Ok(()),
            Some(code) if code == i32::from(EXIT_INVALID) => Err(Rejection::new(
                RejectionCode::InvalidComponent,
                format!("not a valid component: {message}"),
            )),
            Some(code) => Err(failed(format!("exit code {code}: {message}"))),
            // A signal: the limits of CPU time and memory end the child this way.
            None => Err(Rejection::new(
                RejectionCode::CompileLimit,
                format!(
                    "compiling used more than {} s of processor time or {} bytes of memory ({status})",
                    self.time.as_secs(),
                    self.memory_bytes
                ),
            )),
        }
    }
}

/// The compiling child: what the server's `main` runs for [`COMPILE_SUBCOMMAND`], with the arguments after it. Prints one line
/// about what is wrong, if anything is.
#[must_use]
pub fn compile_child_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(arguments).and_then(|job| compile(&job)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(ChildError { exit, message }) => {
            println!("{message}");
            ExitCode::from(exit)
        }
    }
}

struct ChildError {
    exit: u8,
    message: String,
}

fn usage(message: impl Into<String>) -> ChildError {
    ChildError {
        exit: 64,
        message: message.into(),
    }
}

#[derive(Default)]
struct Job {
    component: PathBuf,
    cache: PathBuf,
    memory_bytes: u64,
    cpu_seconds: u64,
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Job, ChildError> {
    let mut job = Job::default();
    let mut arguments = arguments.into_iter();
    while let Some(name) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| usage(format!("{} needs a value", name.display())))?;
        let figure = || {
            value
                .to_str()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| usage(format!("{} needs a number", name.display())))
        };
        match name.to_str() {
            Some("--component") => job.component = value.into(),
            Some("--cache") => job.cache = value.into(),
            Some("--memory-bytes") => job.memory_bytes = figure()?,
            Some("--cpu-seconds") => job.cpu_seconds = figure()?,
            _ => return Err(usage(format!("unknown argument {}", name.display()))),
        }
    }
    if job.component.as_os_str().is_empty() || job.cache.as_os_str().is_empty() {
        return Err(usage("--component and --cache are needed"));
    }
    Ok(job)
}

fn compile(job: &Job) -> Result<(), ChildError> {
    limit_this_process(job).map_err(|error| ChildError {
        exit: 71,
        message: format!("limits cannot be set: {error}"),
    })?;
    let bytes = std::fs::read(&job.component).map_err(|error| ChildError {
        exit: 66,
        message: format!("the component cannot be read: {error}"),
    })?;
    let engine = cache(&job.cache)
        .and_then(|cache| Engine::new(&config(Some(cache))))
        .map_err(|error| ChildError {
            exit: 70,
            message: format!("the engine cannot be set up: {error:#}"),
        })?;
    Component::from_binary(&engine, &bytes)
        .map(drop)
        .map_err(|error| ChildError {
            exit: EXIT_INVALID,
            message: format!("{error:#}").replace('\n', " "),
        })
}

/// Limits that this process keeps to for the rest of its life.
fn limit_this_process(job: &Job) -> rustix::io::Result<()> {
    use rustix::process::{Resource, Rlimit, nice, setrlimit};
    let at_most = |figure| Rlimit {
        current: Some(figure),
        maximum: Some(figure),
    };
    setrlimit(Resource::Core, at_most(0))?;
    if job.memory_bytes > 0 {
        setrlimit(Resource::As, at_most(job.memory_bytes))?;
    }
    if job.cpu_seconds > 0 {
        setrlimit(Resource::Cpu, at_most(job.cpu_seconds))?;
    }
    nice(10)?;
    Ok(())
}
