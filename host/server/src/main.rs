//! The `windlass` program: reads options, starts what they name, ends in order on SIGTERM and SIGINT.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use windlass::{
    config::{self, JournalLimits, PluginTrust, ServerConfig, Tls, UPLOAD_DISK_RESERVE_PERCENT},
    demo, dev, platform, plugin_cli,
    telemetry::{self, LogFormat},
};
use windlass_domain::{invocation::quota::INVOCATIONS_PER_DAY, load_balancer::PortRanges};

/// A platform for running applications on fleets of Linux servers.
#[derive(Parser)]
#[command(name = "windlass", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Form of the log, which goes to standard error; WINDLASS_LOG filters it.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        env = "WINDLASS_LOG_FORMAT"
    )]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Run the platform server.
    Server(Box<Server>),
    /// Run a server with agents of its own on this machine, in a workspace `dev`.
    Dev(Dev),
    /// Show three releases of a real application on three agents.
    Demo(Demo),
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
    /// Make, check, call and test plugins.
    #[command(subcommand)]
    Plugin(plugin_cli::PluginCommand),
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
    /// A network that notifications are not sent to, for example 10.0.0.0/8; repeat it for more. It replaces the default:
    /// loopback, link-local, metadata services of clouds, multicast and reserved addresses.
    #[arg(long)]
    notification_deny: Vec<ipnet::IpNet>,
    /// An exception from the denied networks: a network such as 127.0.0.0/8, or one port of one address such as
    /// 127.0.0.1:25 (a local mail relay). Repeat it for more.
    #[arg(long)]
    notification_allow: Vec<windlass::notify::destination::Allowed>,
    /// Uploads leave this share of the data directory's disk free, in percent: 0 to 99. An upload that would leave less is
    /// refused with 507.
    #[arg(long, default_value_t = UPLOAD_DISK_RESERVE_PERCENT, value_parser = clap::value_parser!(u8).range(0..=99))]
    upload_disk_reserve: u8,
    /// Ed25519 public keys whose signatures of plugins (`name.wasm.sig`) are checked: a file, or a directory of `*.pub` and
    /// `*.pem`.
    #[arg(long)]
    plugin_keys: Option<PathBuf>,
    /// Refuse plugins that none of the keys signed.
    #[arg(long, requires = "plugin_keys")]
    require_signed_plugins: bool,
    /// Accept only plugins whose SHA-256 stands in this file, one a line.
    #[arg(long)]
    plugin_allow_list: Option<PathBuf>,
    /// Recorded calls of plugins are kept for so many days.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=3650))]
    plugin_calls_days: u64,
    /// And for so many MiB, whichever is less.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    plugin_calls_mib: u64,
    /// Front ports that listeners of load balancers may have, for example `80,443,8000-8999`.
    #[arg(long, env = "WINDLASS_FRONT_PORTS", default_value_t)]
    front_ports: PortRanges,
    /// Invocations of public commands that a workspace may make in a day (UTC).
    #[arg(long, default_value_t = INVOCATIONS_PER_DAY, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    invocations_per_day: u32,
    /// Seconds for which an agent may be disconnected before the outcome of a step that runs on its server counts as unknown.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    agent_lost_after_s: u64,
}

#[derive(Args)]
struct Dev {
    /// Data of the server and the agents; made if it is missing.
    #[arg(long, default_value = "windlass-dev")]
    data: PathBuf,
    /// Where the API listens.
    #[arg(long, default_value = "127.0.0.1:7460")]
    listen: SocketAddr,
    /// How many agents.
    #[arg(long, default_value_t = 3)]
    agents: u32,
    /// The plugin directory; one among the data, with the shipped plugins in it, unless given.
    #[arg(long)]
    plugins: Option<PathBuf>,
}

#[derive(Args)]
struct Demo {
    /// Data; a directory that is removed at the end unless given.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Where the API listens; any free port unless given.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The plugin directory; the shipped plugins unless given.
    #[arg(long)]
    plugins: Option<PathBuf>,
    /// End when everything was shown, with status 0 only if it was as expected.
    #[arg(long)]
    exit: bool,
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
    let filter = match &arguments.command {
        // What people came to see is on standard output.
        Command::Dev(_) | Command::Demo(_) => "warn",
        // What a plugin logs is for its author.
        Command::Plugin(_) => "warn,windlass_runtime::state=info",
        Command::Server(_)
        | Command::Backup { .. }
        | Command::Restore { .. }
        | Command::CompilePlugin { .. } => "info",
    };
    telemetry::init(arguments.log_format, filter);
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("windlass: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(async {
        match command {
            Command::Plugin(command) => return plugin_cli::run(command).await,
            Command::Server(options) => serve(*options).await?,
            Command::Dev(Dev {
                data,
                listen,
                agents,
                plugins,
            }) => {
                dev::run(&dev::DevOptions {
                    data,
                    listen,
                    agents,
                    plugins,
                })
                .await?;
            }
            Command::Demo(Demo {
                data,
                listen,
                plugins,
                exit,
            }) => {
                demo::run(&demo::DemoOptions {
                    data,
                    listen,
                    plugins: shipped(plugins)?,
                    exit,
                })
                .await?;
            }
            Command::Backup { data, archive } => {
                let manifest = platform::back_up(&data, &archive).await?;
                println!(
                    "{}: revision {}, {} blobs",
                    archive.display(),
                    manifest.revision.0,
                    manifest.blobs
                );
            }
            Command::Restore { data, archive } => {
                let manifest = windlass_store::backup::restore(&archive, &data).await?;
                println!(
                    "{}: revision {}, {} blobs",
                    data.display(),
                    manifest.revision.0,
                    manifest.blobs
                );
            }
            Command::CompilePlugin { .. } => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// The plugin directory that was given, or the shipped one.
fn shipped(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    given
        .or_else(config::shipped_plugins)
        .context("the shipped plugins are not beside this program: build them with `make build`, or give --plugins")
}

async fn serve(options: Server) -> anyhow::Result<()> {
    let tls = match (options.tls, options.tls_certificate, options.tls_key) {
        (TlsChoice::Off, ..) => Tls::Off,
        (TlsChoice::Auto | TlsChoice::On, Some(certificate), Some(key)) => {
            Tls::Files { certificate, key }
        }
        (TlsChoice::On, ..) => Tls::Own,
        (TlsChoice::Auto, ..) => Tls::ByAddress,
    };
    let shipped = config::shipped_plugins();
    let plugins = options
        .plugins
        .or_else(|| shipped.clone())
        .unwrap_or_else(|| options.data.join("plugins"));
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
        notification_deny: if options.notification_deny.is_empty() {
            windlass::notify::destination::denied_by_default()
        } else {
            options.notification_deny
        },
        notification_allow: options.notification_allow,
        upload_disk_reserve_percent: options.upload_disk_reserve,
        trust: PluginTrust {
            keys: options.plugin_keys,
            require_signature: options.require_signed_plugins,
            allow_list: options.plugin_allow_list,
        },
        journal: JournalLimits {
            max_age: Duration::from_secs(options.plugin_calls_days * 24 * 3600),
            max_bytes: options.plugin_calls_mib * 1024 * 1024,
        },
        front_ports: options.front_ports,
        invocations_per_day: options.invocations_per_day,
        agent_lost_after: Duration::from_secs(options.agent_lost_after_s),
        compile_command: None,
    })
    .await?;
    println!("API     {}", running.api_url);
    println!(
        "agents  {} (key {})",
        running.agent_url, running.fingerprint
    );
    println!("token   {}", running.admin_token_file.display());
    tokio::select! {
        _ = ended.recv() => {}
        _ = interrupted.recv() => {}
    }
    tracing::info!("the server ends");
    running
        .shutdown()
        .await
        .context("the store was not closed well")
}
