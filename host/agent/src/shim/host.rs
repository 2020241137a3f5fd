//! The shim's own process: `windlass-agent shim <dir>`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::{
    fs::{FallocateFlags, Mode as FileMode},
    process::{Signal, WaitOptions},
};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    signal::unix::{Signal as Signals, SignalKind, signal},
    time::{Instant, sleep_until},
};
use windlass_domain::task::{Fault, Restart};

use super::spec::{End, ExecSpec, Mode, NotStarted, RunDir, RunIdentity, RunStatus, Spec};
use crate::{
    capture::Capture,
    clock,
    files::{self, Context as _, FileError, write_durable, write_replaced},
    mask::Masker,
    proc::{self, Cgroup, ProcessId},
};

/// Of a script's output this much is kept in the file for live reading; the result has head and tail in any case.
const SCRIPT_FILE_BYTES: u64 = 1 << 20;
/// An application's log is renamed at this size; two parts are kept.
const APP_FILE_BYTES: u64 = 4 << 20;
/// Room for `status.json`: 24 KiB of output as JSON numbers and the rest.
const STATUS_BYTES: u64 = 160 * 1024;
/// The first and the longest pause before an application is started again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After running for so long, the pause begins anew.
const SETTLED: Duration = Duration::from_secs(60);
/// How long a killed tree may take to vanish before the shim says that it did not.
const KILL_DEADLINE: Duration = Duration::from_secs(20);
/// How long after an application's end the shim looks whether that is the machine's end, too.
const SHUTDOWN_SEEN: Duration = Duration::from_millis(100);
/// Grace when the shim itself gets SIGTERM.
const TERM_GRACE: Duration = Duration::from_secs(10);

/// Runs a shim in `dir`. Its end is in `status.json`; what keeps it from writing that goes to the caller.
///
/// # Errors
/// When the directory or the spec cannot be used: then nothing was run.
pub fn run(dir: PathBuf) -> Result<(), FileError> {
    let dir = RunDir::new(dir);
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .during("read the spec for", dir.path())?;
    let spec: Spec = serde_json::from_str(&text)
        .map_err(io::Error::from)
        .during("understand the spec for", dir.path())?;
    drop(text);
    // A session leader has no session to make; that it is alone is all that counts.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "the shim has a session already");
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .during("become the subreaper for", dir.path())?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .during("start the runtime for", dir.path())?
        .block_on(Host::start(dir, spec)?.supervise())
}

enum Request {
    Stop(Duration),
    Kill,
}

/// What made the shim end the tree.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    TimeOut,
    Stop,
    /// The shim itself was told to go, as everything is when the machine shuts down.
    Terminated,
}

/// How the pause before an application's next start ended.
enum Rest {
    Over,
    Stopped,
    Terminated,
}

/// What the shim listens to.
struct Ears {
    control: pipe::Receiver,
    children: Signals,
    terminate: Signals,
    hangup: Signals,
    interrupt: Signals,
}

impl Ears {
    async fn rest(&mut self, pause: Duration) -> Rest {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                () = sleep_until(until) => return Rest::Over,
                _ = next_request(&mut self.control) => return Rest::Stopped,
                _ = self.terminate.recv() => return Rest::Terminated,
                _ = self.children.recv() => { reap(0); }
            }
        }
    }
}

struct Host {
    dir: RunDir,
    spec: Spec,
    identity: RunIdentity,
    output: Output,
    status_file: File,
}

impl Host {
    fn start(dir: RunDir, spec: Spec) -> Result<Self, FileError> {
        let status_path = temporary(&dir.status());
        let status_file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&status_path)
            .during("create", &status_path)?;
        // The space for the end is taken before the begin, so that a full disk cannot swallow an exit code.
        rustix::fs::fallocate(&status_file, FallocateFlags::empty(), 0, STATUS_BYTES)
            .during("take the space of", &status_path)?;
        let control = dir.control();
        match rustix::fs::mkfifoat(rustix::fs::CWD, &control, FileMode::RUSR | FileMode::WUSR) {
            Err(error) if error != rustix::io::Errno::EXIST => {
                Err(error).during("make", &control)?
            }
            Ok(()) | Err(_) => {}
        }
        let shim = ProcessId::of(std::process::id())
            .ok_or_else(|| io::Error::other("no /proc entry of its own"))
            .during("identify the shim of", dir.path())?;
        let identity = RunIdentity {
            shim,
            main: None,
            started_at: None,
            restarts: 0,
            message: String::new(),
        };
        let output = Output::new(&dir, &spec);
        let host = Self {
            dir,
            spec,
            identity,
            output,
            status_file,
        };
        let bytes = host.identity_json()?;
        write_durable(&host.dir.identity(), &bytes, 0o600)?;
        Ok(host)
    }

    fn identity_json(&self) -> Result<Vec<u8>, FileError> {
        serde_json::to_vec(&self.identity)
            .map_err(io::Error::from)
            .during("write", &self.dir.identity())
    }

    /// Says who runs; readers see the old or the new content. What matters after a power failure was synced before.
    fn publish_identity(&self) {
        let written = self
            .identity_json()
            .and_then(|bytes| write_replaced(&self.dir.identity(), &bytes, 0o600));
        if let Err(error) = written {
            tracing::warn!(error = %files::chain(&error), "the identity cannot be updated");
        }
    }

    async fn supervise(mut self) -> Result<(), FileError> {
        let control_path = self.dir.control();
        let control = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(&control_path)
            .during("open", &control_path)?;
        let signals =
            |kind| signal(kind).during("watch the signals and children of", self.dir.path());
        let mut ears = Ears {
            control,
            children: signals(SignalKind::child())?,
            terminate: signals(SignalKind::terminate())?,
            hangup: signals(SignalKind::hangup())?,
            interrupt: signals(SignalKind::interrupt())?,
        };

        let mut pause = FIRST_PAUSE;
        let mut fault = None;
        let (end, mut reader) = loop {
            let (main, mut reader) = match self.spawn().await {
                Ok(started) => started,
                // Whoever asked for its start has had an answer: now it is kept running.
                Err(not_started) if self.is_kept_running() => {
                    self.say_again(not_started.message, pause);
                    match ears.rest(pause).await {
                        Rest::Over => {}
                        Rest::Stopped => break (Some(End::Stopped), None),
                        Rest::Terminated => break (None, None),
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
                Err(not_started) => {
                    fault = not_started.fault;
                    break (Some(End::NotStarted(not_started.message)), None);
                }
            };
            let started = Instant::now();
            self.identity.main = ProcessId::of(main);
            self.identity.started_at = Some(clock::now());
            self.identity.message.clear();
            self.publish_identity();

            let mut deadline = match self.spec.mode {
                Mode::Script { timeout_ms } => Some(started + Duration::from_millis(timeout_ms)),
                Mode::App { .. } => None,
            };
            let mut ending: Option<Ending> = None;
            let mut buffer = vec![0; 8192];
            let mut open = true;
            let ended = loop {
                // Looking before waiting: a child may have ended before its signal was watched.
                if let Some(status) = reap(main) {
                    break status;
                }
                let far = started + Duration::from_secs(86_400 * 365);
                tokio::select! {
                    _ = ears.children.recv() => {}
                    read = reader.read(&mut buffer), if open => match read {
                        Ok(0) | Err(_) => open = false,
                        Ok(count) => self.output.push(&buffer[..count]),
                    },
                    request = next_request(&mut ears.control) => {
                        ending.get_or_insert(Ending::Stop);
                        match request {
                            Request::Kill => { self.kill_tree(main).await; deadline = None; }
                            Request::Stop(grace) => { self.terminate_tree(); deadline = Some(Instant::now() + grace); }
                        }
                    }
                    _ = ears.terminate.recv() => {
                        ending.get_or_insert(Ending::Terminated);
                        self.terminate_tree();
                        deadline = Some(Instant::now() + TERM_GRACE);
                    }
                    _ = ears.hangup.recv() => {}
                    _ = ears.interrupt.recv() => {}
                    () = sleep_until(deadline.unwrap_or(far)), if deadline.is_some() => {
                        ending.get_or_insert(Ending::TimeOut);
                        deadline = None;
                        self.kill_tree(main).await;
                    }
                }
            };
            self.drain(&mut reader);

            match (ending, self.spec.mode.clone()) {
                (Some(Ending::TimeOut), _) => {
                    self.kill_tree(main).await;
                    self.drain(&mut reader);
                    break (Some(End::TimedOut), None);
                }
                (Some(ending @ (Ending::Stop | Ending::Terminated)), _) => {
                    // The rest of the tree has what is left of the grace.
                    if let Some(deadline) = deadline {
                        self.await_tree(deadline).await;
                    }
                    self.kill_tree(main).await;
                    self.drain(&mut reader);
                    let end = (ending == Ending::Stop).then_some(End::Stopped);
                    break (end, None);
                }
                (None, Mode::Script { .. }) => break (Some(ended), open.then_some(reader)),
                (None, Mode::App { restart, .. }) => {
                    self.kill_tree(main).await;
                    self.drain(&mut reader);
                    match restart {
                        // When the machine shuts down, everything is told to go at once: this may be the first to hear of it.
                        Restart::Never => match ears.rest(SHUTDOWN_SEEN).await {
                            Rest::Over | Rest::Stopped => break (Some(ended), None),
                            Rest::Terminated => break (None, None),
                        },
                        Restart::Always => {}
                    }
                    if started.elapsed() >= SETTLED {
                        pause = FIRST_PAUSE;
                    }
                    self.say_again(describe(&ended), pause);
                    match ears.rest(pause).await {
                        Rest::Over => {}
                        Rest::Stopped => break (Some(End::Stopped), None),
                        Rest::Terminated => break (None, None),
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    self.identity.restarts += 1;
                }
            }
        };

        self.output.finish();
        // Told to go: it leaves no end, as one that was killed. Whether what it ran goes on is for the agent to say, later.
        if let Some(end) = end {
            self.write_status(end, fault)?;
        }
        self.identity.main = None;
        // Services that the script left keep their output read, so that they do not die of a broken pipe.
        if let Some(reader) = &mut reader {
            let mut buffer = vec![0; 4096];
            loop {
                tokio::select! {
                    read = reader.read(&mut buffer) => match read {
                        Ok(0) | Err(_) => break,
                        Ok(_) => {}
                    },
                    _ = ears.children.recv() => { reap(0); }
                    _ = next_request(&mut ears.control) => { self.kill_tree(0).await; break; }
                    _ = ears.terminate.recv() => break,
                }
            }
        }
        if let Some(cgroup) = &self.spec.cgroup {
            Cgroup::at(cgroup.clone()).remove_if_empty();
        }
        Ok(())
    }

    /// Whether the application is tried again when it cannot be started.
    fn is_kept_running(&self) -> bool {
        match self.spec.mode {
            Mode::App {
                restart: Restart::Always,
                again,
            } => again || self.identity.restarts > 0,
            Mode::App {
                restart: Restart::Never,
                ..
            }
            | Mode::Script { .. } => false,
        }
    }

    /// Says that the application does not run, why, and when it is started again.
    fn say_again(&mut self, why: String, pause: Duration) {
        self.identity.main = None;
        self.identity.message = format!("{why}; it is started again in {} s", pause.as_secs());
        self.publish_identity();
    }

    /// Starts the program: its number, and the reading end of its output.
    async fn spawn(&self) -> Result<(u32, pipe::Receiver), NotStarted> {
        let text = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| NotStarted::from(format!("{what}: {error}"))
        };
        let (ours, theirs) = UnixStream::pair().map_err(text("no socket for the trampoline"))?;
        let (reader, writer) = io::pipe().map_err(text("no pipe for the output"))?;
        let second = writer.try_clone().map_err(text("no pipe for the output"))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("exec")
            .env_clear()
            .stdin(std::os::fd::OwnedFd::from(theirs))
            .stdout(writer)
            .stderr(second);
        let child = command
            .spawn()
            .map_err(text("the trampoline cannot be started"))?;
        // Our copies of the writing ends are in the command: without them gone, the output would never end.
        drop(command);
        let spec = ExecSpec {
            command: self.spec.command.clone(),
            env: self.spec.env.clone(),
            working_dir: self.spec.working_dir.clone(),
            user: self.spec.user.clone(),
            cgroup: self.spec.cgroup.clone(),
        };
        let request = serde_json::to_vec(&spec).map_err(|error| error.to_string())?;
        let failure = tokio::task::spawn_blocking(move || {
            let mut ours = ours;
            ours.write_all(&request)?;
            ours.shutdown(std::net::Shutdown::Write)?;
            let mut failure = String::new();
            ours.read_to_string(&mut failure)?;
            io::Result::Ok(failure)
        })
        .await
        .map_err(|error| error.to_string())?
        .map_err(text("the trampoline does not answer"))?;
        if !failure.is_empty() {
            return Err(serde_json::from_str(&failure).unwrap_or_else(|_| failure.into()));
        }
        rustix::io::ioctl_fionbio(&reader, true)
            .map_err(|error| format!("the output cannot be read: {error}"))?;
        let reader = pipe::Receiver::from_owned_fd(reader.into())
            .map_err(text("the output cannot be read"))?;
        Ok((child.id(), reader))
    }

    /// Takes what is in the pipe now, without waiting for its end.
    fn drain(&mut self, reader: &mut pipe::Receiver) {
        let mut buffer = [0; 8192];
        // What a pipe holds is at most 1 MiB: a tree that writes without end cannot keep the shim here.
        for _ in 0..256 {
            // Not `try_read`: the runtime may not have heard of the bytes yet.
            match rustix::io::read(&*reader, &mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => self.output.push(&buffer[..count]),
            }
        }
    }

    fn terminate_tree(&self) {
        for process in proc::descendants(std::process::id()) {
            proc::signal(&process, Signal::TERM);
        }
    }

    /// Waits until nothing of the tree is left, or the deadline.
    async fn await_tree(&self, deadline: Instant) {
        while Instant::now() < deadline {
            reap(0);
            if proc::descendants(std::process::id()).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the whole tree, however it forked. `main` is left to be reaped by the caller.
    async fn kill_tree(&self, main: u32) {
        let deadline = Instant::now() + KILL_DEADLINE;
        loop {
            if let Some(path) = &self.spec.cgroup {
                Cgroup::at(path.clone()).kill();
            }
            let tree = proc::descendants(std::process::id());
            for process in &tree {
                proc::signal(process, Signal::KILL);
            }
            if main == 0 {
                reap(0);
            } else {
                reap_others(main);
            }
            let populated = self
                .spec
                .cgroup
                .as_ref()
                .is_some_and(|path| Cgroup::at(path.clone()).is_populated());
            // A zombie main process keeps its group populated until the caller reaps it.
            let only_main = tree.is_empty() && (!populated || main != 0);
            if only_main {
                return;
            }
            if Instant::now() >= deadline {
                tracing::error!(left = tree.len(), "a process tree does not end");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The end, into the space that was taken at the begin.
    fn write_status(&mut self, end: End, fault: Option<Fault>) -> Result<(), FileError> {
        let status = RunStatus {
            end,
            started_at: self.identity.started_at,
            finished_at: clock::now(),
            output: self.output.capture.clone(),
            fault,
        };
        let path = self.dir.status();
        let bytes = serde_json::to_vec(&status)
            .map_err(io::Error::from)
            .during("write", &path)?;
        let file = &mut self.status_file;
        file.rewind()
            .and_then(|()| file.write_all(&bytes))
            .and_then(|()| file.set_len(bytes.len() as u64))
            .and_then(|()| file.sync_all())
            .during("write", &path)?;
        std::fs::rename(temporary(&path), &path).during("replace", &path)?;
        files::sync_dir(self.dir.path())
    }
}

fn temporary(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// For people.
#[must_use]
pub fn describe(end: &End) -> String {
    match end {
        End::Exited(code) => format!("it ended with exit code {code}"),
        End::Signaled(signal) => format!("it was ended by signal {signal}"),
        End::TimedOut => "it ran longer than its time-out and its process tree was killed".into(),
        End::Stopped => "it was stopped".into(),
        End::NotStarted(message) => message.clone(),
    }
}

/// Collects ended children; the end of `main` when it is among them (0: of none).
fn reap(main: u32) -> Option<End> {
    let mut found = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        if u32::try_from(pid.as_raw_nonzero().get()).ok() == Some(main) {
            found = Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => End::Exited(code),
                (None, signal) => End::Signaled(signal.unwrap_or(0)),
            });
        }
    }
    found
}

/// Collects ended children except the main one, whose status belongs to the caller.
fn reap_others(main: u32) {
    for pid in proc::all_pids() {
        if pid != main
            && let Some(pid) = i32::try_from(pid)
                .ok()
                .and_then(rustix::process::Pid::from_raw)
            && let Ok(Some(_)) = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG)
        {
            tracing::trace!(pid = pid.as_raw_nonzero().get(), "a descendant ended");
        }
    }
}

/// The next well-formed line of the control FIFO. The shim holds both ends, so it never ends.
async fn next_request(control: &mut pipe::Receiver) -> Request {
    loop {
        let mut line = Vec::new();
        loop {
            match control.read_u8().await {
                Ok(b'\n') => break,
                Ok(byte) if line.len() < 64 => line.push(byte),
                Ok(_) => {}
                Err(_) => return std::future::pending().await,
            }
        }
        let line = String::from_utf8_lossy(&line);
        match line
            .split_once(' ')
            .map_or((&*line, None), |(verb, argument)| {
                (verb, argument.parse().ok())
            }) {
            ("kill", None) => return Request::Kill,
            ("stop", Some(grace_ms)) => return Request::Stop(Duration::from_millis(grace_ms)),
            (_, _) => {}
        }
    }
}

/// Masked output: a bounded file for live reading, head and tail in memory for the result.
struct Output {
    masker: Masker,
    capture: Capture,
    path: PathBuf,
    file: Option<File>,
    written: u64,
    rotates: bool,
}

impl Output {
    fn new(dir: &RunDir, spec: &Spec) -> Self {
        let path = dir.output();
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .ok();
        let written = file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |meta| meta.len());
        Self {
            masker: Masker::new(spec.secrets.iter().map(String::as_str)),
            capture: Capture::default(),
            path,
            file,
            written,
            rotates: matches!(spec.mode, Mode::App { .. }),
        }
    }

    fn push(&mut self, piece: &[u8]) {
        let masked = self.masker.push(piece);
        self.write(&masked);
    }

    fn finish(&mut self) {
        let masked = self.masker.finish();
        self.write(&masked);
    }

    fn write(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.capture.push(bytes);
        if self.rotates && self.written >= APP_FILE_BYTES {
            let older = self.path.with_extension("1");
            if std::fs::rename(&self.path, older).is_ok() {
                self.file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(&self.path)
                    .ok();
                self.written = 0;
            }
        }
        let limit = if self.rotates {
            APP_FILE_BYTES * 2
        } else {
            SCRIPT_FILE_BYTES
        };
        if self.written >= limit {
            return;
        }
        // A full disk costs the live copy only.
        if let Some(file) = &mut self.file
            && file.write_all(bytes).is_ok()
        {
            self.written += bytes.len() as u64;
        }
    }
}
