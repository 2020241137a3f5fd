//! The `windlass` program: reads options, starts what they name, ends in order on SIGTERM and SIGINT.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use windlass::{
    config::{self, ServerConfig, Tls},
    platform,
    telemetry::{self, LogFormat},
};

/// A platform for running applications on fleets of Linux servers.
#[derive(Parser)]
#[command(name = "windlass", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Form of the log, which goes to standard error; WINDLASS_LOG filters it.
    #[arg(long, global = true, value_enum, default_value_t, env = "WINDLASS_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Run the platform server.
    Server(Server),
    /// Write everything of a data directory to a new archive, whether a server runs there or not.
    Backup {
        /// The data directory.
        #[arg(long, env = "WINDLASS_DATA")]
        data: PathBuf,
        /// The archive to be made. It holds the platform's keys: keep it safe.
        archive: PathBuf,
    },
    /// Fill a new or empty data directory with an archive.
    Restore {
        /// The data directory.
        #[arg(long, env = "WINDLASS_DATA")]
        data: PathBuf,
        /// The archive.
        archive: PathBuf,
    },
    /// Compiles a plugin for a server, which starts it.
    #[command(name = windlass_runtime::COMPILE_SUBCOMMAND, hide = true)]
    CompilePlugin {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Args)]
struct Server {
    /// Everything that lasts; made if it is missing.
    #[arg(long, env = "WINDLASS_DATA", default_value = "windlass-data")]
    data: PathBuf,
    /// Where the API listens. Other addresses than loopback have TLS unless `--tls off`.
    #[arg(long, default_value = "127.0.0.1:7460")]
    listen: SocketAddr,
    /// Where agents connect.
    #[arg(long, default_value = "127.0.0.1:7461")]
    agent_listen: SocketAddr,
    /// What agents are told to connect to, `host:port`, where that is another address.
    #[arg(long)]
    agent_advertise: Option<String>,
    /// The plugin directory, made if it is missing; the shipped plugins unless given.
    #[arg(long)]
    plugins: Option<PathBuf>,
    /// TLS of the API.
    #[arg(long, value_enum, default_value_t)]
    tls: TlsChoice,
    /// The API's certificate chain, PEM.
    #[arg(long, requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The key of that certificate, PEM.
    #[arg(long, requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum TlsChoice {
    /// Off on loopback addresses, on elsewhere.
    #[default]
    Auto,
    /// Plain HTTP.
    Off,
    /// On.
    On,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The child is not a server: no log, no runtime.
    if let Command::CompilePlugin { arguments } = arguments.command {
        return windlass_runtime::compile_child_main(arguments);
    }
    telemetry::init(arguments.log_format);
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("windlass: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(async {
        match command {
            Command::Server(options) => serve(options).await,
            Command::Backup { data, archive } => {
                let manifest = platform::back_up(&data, &archive).await?;
                println!("{}: revision {}, {} blobs", archive.display(), manifest.revision.0, manifest.blobs);
                Ok(())
            }
            Command::Restore { data, archive } => {
                let manifest = windlass_store::backup::restore(&archive, &data).await?;
                println!("{}: revision {}, {} blobs", data.display(), manifest.revision.0, manifest.blobs);
                Ok(())
            }
            Command::CompilePlugin { .. } => unreachable!("main has run it"),
        }
    })
}

async fn serve(options: Server) -> anyhow::Result<()> {
    let tls = match (options.tls, options.tls_certificate, options.tls_key) {
        (TlsChoice::Off, ..) => Tls::Off,
        (TlsChoice::Auto | TlsChoice::On, Some(certificate), Some(key)) => Tls::Files { certificate, key },
        (TlsChoice::On, ..) => Tls::Own,
        (TlsChoice::Auto, ..) => Tls::ByAddress,
    };
    let shipped = config::shipped_plugins();
    let plugins = options.plugins.or_else(|| shipped.clone()).unwrap_or_else(|| options.data.join("plugins"));
    let mut ended = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let running = platform::start(ServerConfig {
        data: options.data,
        listen: options.listen,
        agent_listen: options.agent_listen,
        agent_advertise: options.agent_advertise,
        plugins,
        shipped_plugins: shipped,
        tls,
        compile_command: None,
    })
    .await?;
    println!("API     {}", running.api_url);
    println!("agents  {} (key {})", running.agent_url, running.fingerprint);
    println!("token   {}", running.admin_token_file.display());
    tokio::select! {
        _ = ended.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("the server ends");
    running.shutdown().await.context("the store was not closed well")
}
