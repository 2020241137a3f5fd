//! HAProxy as a process: tried, started under a shim, reloaded without a dropped connection, stopped; and its peak bandwidth.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::Stdio,
    time::Duration,
};

use rustix::process::Signal;
use tokio::{process::Command, time::Instant};
use windlass_domain::{
    load_balancer::{Configuration, render},
    task::Restart,
};

use super::{BalancerError, admin, checked, files::BalancerDir};
use crate::{
    files::{remove_file, write_durable},
    proc,
    shim::{
        client::{self, Found},
        host::describe,
        spec::{Mode, Spec},
    },
};

/// The socket of HAProxy's master.
pub(super) const ADMIN_SOCKET: &str = "admin.sock";
const HAPROXY: &str = "/usr/sbin/haproxy";
const NFT: &str = "/usr/sbin/nft";
/// How long a program that only looks may take.
const PROGRAM_WITHIN: Duration = Duration::from_secs(20);
/// How long HAProxy may take until it runs a configuration: one that cannot have a port tries for seconds.
const TAKEN_WITHIN: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// For connections that are under way when a load balancer is stopped.
const STOP_GRACE: Duration = Duration::from_secs(5);
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// Whether HAProxy runs and answers.
pub(super) async fn answers(dir: &BalancerDir) -> bool {
    admin::command(dir, "show proc").await.is_ok()
}

/// Whether its current worker runs a configuration.
pub(super) async fn runs(dir: &BalancerDir, description: &str) -> bool {
    let info = admin::command(dir, "@1 show info").await;
    info.is_ok_and(|info| {
        info.lines()
            .any(|line| line.strip_prefix("description: ") == Some(description))
    })
}

/// Tries a configuration without touching the one that runs.
pub(super) async fn check(
    dir: &BalancerDir,
    wanted: &Configuration,
    before: Option<&Configuration>,
) -> Result<(), BalancerError> {
    if !Path::new(HAPROXY).exists() {
        return Err(BalancerError::Missing("HAProxy"));
    }
    dir.write_next(wanted)?;
    let (good, said) = run(dir, HAPROXY, &["-c", "-f", "next.cfg"]).await?;
    if !good {
        remove_file(&dir.next())?;
        return Err(BalancerError::Refused(alerts(&said)));
    }
    check_bandwidth(dir, wanted).await?;
    // HAProxy would pause its listeners while it waits for a port that somebody else has.
    let running = answers(dir).await;
    for listener in &wanted.listeners {
        let port = listener.front_port;
        let ours = running
            && before.is_some_and(|before| {
                before
                    .listeners
                    .iter()
                    .any(|listener| listener.front_port == port)
            });
        if !ours {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                .map_err(|source| BalancerError::Port { port, source })?;
        }
    }
    Ok(())
}

/// Has HAProxy run a configuration that was checked: started, or reloaded.
pub(super) async fn replace(
    dir: &BalancerDir,
    wanted: &Configuration,
) -> Result<(), BalancerError> {
    let running = answers(dir).await;
    dir.forget_state()?;
    if running {
        let shown = admin::command(dir, "@1 show servers state").await?;
        if let Some(state) = checked::state_for(&shown, wanted) {
            write_durable(&dir.state(), state.as_bytes(), 0o600)?;
        }
    }
    dir.write_configuration(wanted)?;
    remove_file(&dir.next())?;
    let replaced = if running {
        reload(dir, wanted).await
    } else {
        start(dir, wanted).await
    };
    dir.forget_state()?;
    replaced
}

async fn reload(dir: &BalancerDir, wanted: &Configuration) -> Result<(), BalancerError> {
    let master = admin::processes(dir).await?.master;
    let master = proc::ProcessId::of(master)
        .ok_or_else(|| BalancerError::NotTaken("its master process is gone".into()))?;
    let said_before = output(dir).len();
    if !proc::signal(&master, Signal::USR2) {
        return Err(BalancerError::NotTaken(
            "its master process cannot be signalled".into(),
        ));
    }
    await_taken(dir, wanted, said_before).await
}

/// Starts HAProxy, where its shim does not keep it running already.
pub(super) async fn start(dir: &BalancerDir, wanted: &Configuration) -> Result<(), BalancerError> {
    if !Path::new(HAPROXY).exists() {
        return Err(BalancerError::Missing("HAProxy"));
    }
    let run = dir.run();
    let mut said_before = 0;
    match client::find_settled(&run).await? {
        // The shim starts it again by itself.
        Found::Live => said_before = output(dir).len(),
        Found::Nothing | Found::Ended(_) | Found::Lost(_) => {
            // Left by a shim that was killed, and mute: it would keep the ports.
            kill_left(dir);
            let path = dir.path().display().to_string();
            let spec = Spec {
                command: [
                    HAPROXY,
                    "-W",
                    "-S",
                    &format!("unix@{ADMIN_SOCKET},mode,600"),
                    "-f",
                    render::CONFIGURATION_FILE,
                ]
                .map(str::to_owned)
                .to_vec(),
                env: BTreeMap::from([
                    (
                        "PATH".to_owned(),
                        "/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
                    ),
                    // By it `stop-all` finds what belongs to a data directory.
                    ("WINDLASS_INSTANCE_DIR".to_owned(), path),
                ]),
                working_dir: dir.path().to_owned(),
                user: None,
                secrets: Vec::new(),
                cgroup: None,
                mode: Mode::App {
                    restart: Restart::Always,
                    again: false,
                },
            };
            client::start(&run, &spec, None).await?;
        }
    }
    let taken = await_taken(dir, wanted, said_before).await;
    if taken.is_err() {
        // It would be started again and again, and nobody wants it like this.
        client::kill(&run);
    }
    taken
}

/// Waits until HAProxy's worker says that it runs this revision.
async fn await_taken(
    dir: &BalancerDir,
    wanted: &Configuration,
    said_before: usize,
) -> Result<(), BalancerError> {
    let deadline = Instant::now() + TAKEN_WITHIN;
    let description = render::description(wanted);
    loop {
        if runs(dir, &description).await {
            return Ok(());
        }
        let output = output(dir);
        let said = output.get(said_before..).unwrap_or(&output);
        let run = dir.run();
        if let Ok(Found::Ended(status)) = client::find(&run) {
            let why = describe(&status.end);
            return Err(BalancerError::NotTaken(format!("{why}; {}", alerts(said))));
        }
        if said.contains("Loading failure!") || Instant::now() > deadline {
            return Err(BalancerError::NotTaken(alerts(said)));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn output(dir: &BalancerDir) -> String {
    let bytes = std::fs::read(dir.run().output()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Ends HAProxy, after a moment for requests that are under way.
pub(super) async fn stop(dir: &BalancerDir) -> Result<(), BalancerError> {
    let run = dir.run();
    let grace_ms = u64::try_from(STOP_GRACE.as_millis()).unwrap_or(u64::MAX);
    let deadline = Instant::now() + STOP_WITHIN;
    let mut asked = false;
    while client::is_live(&run)? {
        if Instant::now() > deadline {
            return Err(BalancerError::Admin(
                "its shim does not end; it will be tried again".into(),
            ));
        }
        if !asked && run.identity().exists() && run.control().exists() {
            if let Ok(processes) = admin::processes(dir).await
                && let Some(master) = proc::ProcessId::of(processes.master)
            {
                // Listeners are closed, what is under way is finished; what takes longer is ended by the shim.
                let told = proc::signal(&master, Signal::USR1);
                tracing::debug!(told, "HAProxy was asked to finish");
            }
            client::stop(&run, grace_ms);
            asked = true;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    kill_left(dir);
    remove_file(&dir.admin())?;
    Ok(())
}

/// Ends processes of this directory that no shim has.
fn kill_left(dir: &BalancerDir) {
    let line = format!("WINDLASS_INSTANCE_DIR={}", dir.path().display());
    for process in proc::with_environment(|found| found == line.as_bytes()) {
        tracing::warn!(pid = process.pid, load_balancer = %dir.id(), "a process of a load balancer was left without its shim; it is killed");
        proc::signal(&process, Signal::KILL);
    }
}

// ---------------------------------------------------------------------------------------------- bandwidth

async fn check_bandwidth(dir: &BalancerDir, wanted: &Configuration) -> Result<(), BalancerError> {
    let Some(script) = render::nftables(wanted) else {
        return Ok(());
    };
    if !rustix::process::geteuid().is_root() {
        return Err(BalancerError::NotRoot(crate::users::own().name));
    }
    if !Path::new(NFT).exists() {
        return Err(BalancerError::Missing("nft"));
    }
    nft(dir, &script, &["-c"]).await
}

/// Sets the peaks that are wanted, and takes away all others.
pub(super) async fn set_bandwidth(
    dir: &BalancerDir,
    wanted: &Configuration,
) -> Result<(), BalancerError> {
    match render::nftables(wanted) {
        Some(script) => nft(dir, &script, &[]).await,
        None => clear_bandwidth(dir, wanted).await,
    }
}

/// Whether the kernel has the load balancer's table, where it is to have one.
pub(super) async fn has_bandwidth(dir: &BalancerDir, wanted: &Configuration) -> bool {
    if render::nftables(wanted).is_none() {
        return true;
    }
    let table = render::table(wanted.load_balancer);
    let listed = run(dir, NFT, &["list", "table", "inet", &table]).await;
    listed.is_ok_and(|(there, _)| there)
}

/// Takes the load balancer's table away, where there ever was one.
pub(super) async fn clear_bandwidth(
    dir: &BalancerDir,
    wanted: &Configuration,
) -> Result<(), BalancerError> {
    if dir.bandwidth().exists() {
        nft(dir, &render::nftables_removed(wanted.load_balancer), &[]).await?;
        remove_file(&dir.bandwidth())?;
    }
    Ok(())
}

async fn nft(dir: &BalancerDir, script: &str, options: &[&str]) -> Result<(), BalancerError> {
    let path = dir.bandwidth();
    let file = path.display().to_string();
    write_durable(&path, script.as_bytes(), 0o600)?;
    let arguments: Vec<&str> = options.iter().copied().chain(["-f", &file]).collect();
    match run(dir, NFT, &arguments).await? {
        (true, _) => Ok(()),
        (false, said) => Err(BalancerError::Bandwidth(said)),
    }
}

// ---------------------------------------------------------------------------------------------- programs

/// Runs a program in the load balancer's directory; whether it succeeded, and what it said.
async fn run(
    dir: &BalancerDir,
    program: &'static str,
    arguments: &[&str],
) -> Result<(bool, String), BalancerError> {
    let lost = |error: &dyn std::fmt::Display| {
        BalancerError::Refused(format!("{program} could not be run: {error}"))
    };
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir.path())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PROGRAM_WITHIN, output)
        .await
        .map_err(|_| lost(&"it took too long"))?
        .map_err(|error| lost(&error))?;
    let said = [&*output.stderr, &*output.stdout].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&said).trim().to_owned(),
    ))
}

/// The lines that say what is wrong, or the last ones.
fn alerts(said: &str) -> String {
    const MOST: usize = 10;
    let wrong: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("[ALERT]"))
        .map(str::trim)
        .collect();
    let lines = if wrong.is_empty() {
        let all: Vec<&str> = said.lines().map(str::trim).collect();
        all[all.len().saturating_sub(MOST)..].to_vec()
    } else {
        wrong.into_iter().take(MOST).collect()
    };
    lines.join("; ").chars().take(2000).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_are_told_before_anything_else() {
        let said =
            "[NOTICE] (1) : version\n[ALERT] (1) : config : unknown keyword\n[ALERT] (1) : fatal\n";
        assert_eq!(
            alerts(said),
            "[ALERT] (1) : config : unknown keyword; [ALERT] (1) : fatal"
        );
        assert_eq!(alerts("a\nb\n"), "a; b");
    }
}
