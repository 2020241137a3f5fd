//! The trampoline: becomes the program. It joins the cgroup, drops privileges, changes the directory and execs, in that order,
//! and says on the socket on its stdin what failed. When exec succeeds, the socket closes without a word.

use std::{
    io::{Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream, unix::process::CommandExt as _},
    process::Command,
};

use rustix::{
    process::{Gid, Uid},
    thread,
};

use windlass_domain::task::Fault;

use super::spec::{ExecSpec, NotStarted};

/// Runs as `windlass-agent exec`. Returns only when it failed.
#[must_use]
pub fn run() -> std::process::ExitCode {
    let failed = std::process::ExitCode::from(127);
    // The socket moves to a descriptor that closes at exec; stdin becomes empty.
    let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3) else {
        return failed;
    };
    let mut socket = UnixStream::from(socket);
    let failure = match std::fs::File::open("/dev/null")
        .and_then(|null| Ok(rustix::stdio::dup2_stdin(OwnedFd::from(null))?))
    {
        Ok(()) => become_program(&mut socket),
        Err(error) => format!("/dev/null cannot be opened: {error}").into(),
    };
    let said = serde_json::to_vec(&failure).unwrap_or_else(|_| failure.message.into_bytes());
    if socket.write_all(&said).is_err() {
        return failed;
    }
    failed
}

/// Why it failed.
fn become_program(socket: &mut UnixStream) -> NotStarted {
    let mut text = String::new();
    if let Err(error) = socket.read_to_string(&mut text) {
        return format!("the shim's request cannot be read: {error}").into();
    }
    let spec: ExecSpec = match serde_json::from_str(&text) {
        Ok(spec) => spec,
        Err(error) => return format!("the shim's request cannot be understood: {error}").into(),
    };
    if let Some(cgroup) = &spec.cgroup
        && let Err(error) = std::fs::write(cgroup.join("cgroup.procs"), "0")
    {
        return format!("the process cannot join {}: {error}", cgroup.display()).into();
    }
    if let Err(error) = rustix::process::setsid() {
        return format!("no new session: {error}").into();
    }
    if let Some(user) = &spec.user {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        let groups: Vec<Gid> = user
            .groups
            .iter()
            .copied()
            .chain([user.gid])
            .map(Gid::from_raw)
            .collect();
        // This process has one thread, so what is said of the thread holds for the process after exec.
        let dropped = thread::set_thread_groups(&groups)
            .and_then(|()| thread::set_thread_res_gid(gid, gid, gid))
            .and_then(|()| thread::set_thread_res_uid(uid, uid, uid));
        if let Err(error) = dropped {
            return format!(
                "the process cannot become the user `{}`: {error}",
                user.name
            )
            .into();
        }
    }
    if let Err(error) = std::env::set_current_dir(&spec.working_dir) {
        return NotStarted {
            message: format!(
                "the working directory {} cannot be entered: {error}",
                spec.working_dir.display()
            ),
            fault: Some(Fault::NoDirectory),
        };
    }
    let Some((program, arguments)) = spec.command.split_first() else {
        return "the command is empty".to_owned().into();
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(&spec.env);
    let error = command.exec();
    match error.kind() {
        std::io::ErrorKind::NotFound => NotStarted {
            message: format!(
                "`{program}` (or the interpreter that it names) does not exist on this server; install it or name another"
            ),
            fault: Some(Fault::NoInterpreter),
        },
        _ => format!("`{program}` cannot be run: {error}").into(),
    }
}
