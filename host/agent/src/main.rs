//! `windlass-agent`: the command line.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use windlass_agent::{
    RunError,
    config::{DataDir, Policy},
    register, shim, stop_all, unpack,
};

/// Carries out the platform's tasks on this server.
#[derive(Parser)]
#[command(name = "windlass-agent", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Register this server with an activation code.
    Register(Register),
    /// Run the agent of a registered server.
    Run {
        /// The data directory.
        #[arg(long)]
        data: PathBuf,
    },
    /// End the agent of a data directory with all its scripts and applications, and wait until they are gone.
    StopAll {
        /// The data directory.
        #[arg(long)]
        data: PathBuf,
    },
    /// Print the version.
    Version,
    /// Stand between the agent and a process (started by the agent only).
    #[command(hide = true)]
    Shim {
        /// The run's directory.
        dir: PathBuf,
    },
    /// Become a process (started by a shim only).
    #[command(hide = true)]
    Exec,
    /// Unpack a package as the application's user (started by the agent only).
    #[command(hide = true)]
    Unpack {
        /// What to unpack, as JSON.
        order: String,
    },
}

#[derive(clap::Args)]
struct Register {
    /// Address of the platform's agent listener: `https://host:port`.
    #[arg(long)]
    server: String,
    /// The activation code.
    #[arg(long, env = "WINDLASS_ACTIVATION_CODE", hide_env_values = true)]
    code: String,
    /// The data directory, made when it is missing.
    #[arg(long)]
    data: PathBuf,
    /// A name for this server; without it, the code's prefix and the host name.
    #[arg(long)]
    name: Option<String>,
    /// An OS user that tasks may run as (may be given several times).
    #[arg(long = "allow-user")]
    allow_users: Vec<String>,
    /// Let tasks run as root. Without it an agent that runs as root refuses tasks that name no user.
    #[arg(long)]
    allow_root: bool,
    /// Whom tasks that name no user run as, when the agent runs as root.
    #[arg(long)]
    default_user: Option<String>,
    /// A directory below which tasks may write files by absolute path (may be given several times).
    #[arg(long = "path-root")]
    path_roots: Vec<PathBuf>,
}

/// The exit status of an agent that was deregistered; the unit file does not restart it then.
const DEREGISTERED: u8 = 79;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Before anything else is set up: these have to stay small.
    match &arguments.command {
        Command::Exec => return shim::exec::run(),
        Command::Unpack { order } => return unpack::child::run(order),
        Command::Shim { dir } => {
            return match shim::host::run(dir.clone()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Command::Register(_) | Command::Run { .. } | Command::StopAll { .. } | Command::Version => {
        }
    }
    let filter = EnvFilter::try_from_env("WINDLASS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match execute(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            match error.downcast_ref::<RunError>() {
                Some(RunError::Deregistered) => ExitCode::from(DEREGISTERED),
                Some(_) | None => ExitCode::FAILURE,
            }
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // Queries take two of them at most.
            .max_blocking_threads(6)
            .thread_stack_size(512 * 1024)
            .build()
            .context("the runtime cannot be started")
    };
    match command {
        Command::Register(arguments) => {
            let policy = Policy {
                users: arguments.allow_users,
                root: arguments.allow_root,
                default_user: arguments.default_user,
                path_roots: arguments.path_roots,
                ..Policy::default()
            };
            let registered = register::register(
                &arguments.server,
                &arguments.code,
                &arguments.data,
                arguments.name,
                policy,
            );
            let config = runtime()?.block_on(registered)?;
            tracing::info!(server.id = %config.server_id, name = %config.name, "registered");
            Ok(())
        }
        Command::Run { data } => {
            let data = DataDir::open(&data)?;
            Ok(runtime()?.block_on(windlass_agent::run(&data))?)
        }
        Command::StopAll { data } => {
            let ended = stop_all::stop_all(&DataDir::open(&data)?)?;
            tracing::info!(ended, "everything under the data directory has ended");
            Ok(())
        }
        Command::Version => {
            use std::io::Write as _;
            writeln!(
                std::io::stdout(),
                "windlass-agent {}",
                env!("CARGO_PKG_VERSION")
            )
            .context("no output")
        }
        Command::Shim { .. } | Command::Exec | Command::Unpack { .. } => Ok(()),
    }
}
