//! `windlass plugin …`: what authors of plugins use.
//!
//! | command | what it does |
//! | --- | --- |
//! | `new` | makes a project that builds |
//! | `check` | says what a component is, and what it costs |
//! | `call` | calls one function |
//! | `test` | runs the conformance kit |
//! | `replay` | makes the calls of an exported journal again |
//! | `wit-diff` | says which differences of two WIT packages break plugins that exist |
//!
//! Exit codes: 0, all is well; 1, a fault was found, or it could not be done, and standard error says which; 2, the command
//! line is wrong.

/// Prints a line to standard output, as `println!` does; see [`print_out`].
macro_rules! say {
    ($($text:tt)*) => {
        $crate::plugin_cli::print_out(format_args!("{}\n", format_args!($($text)*)))
    };
}

mod call;
mod check;
mod new;
mod open;
mod replay;
mod test;

use std::{
    fmt, io,
    io::Write as _,
    path::PathBuf,
    process::{self, ExitCode},
};

use clap::Subcommand;
use windlass_runtime::compatibility::{self, Effect, WitPackage};

pub use call::CallOptions;
pub use check::CheckOptions;
pub use new::{Kind, Language, NewError, NewOptions, code, files, new_project};
pub use replay::ReplayOptions;
pub use test::TestOptions;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Make a project for a new plugin.
    New(NewOptions),
    /// Say what a component is: kind, name, versions, imports, schema, size, and what calls cost.
    Check(CheckOptions),
    /// Call one function of a component here, without a server.
    Call(CallOptions),
    /// Run the conformance kit on a project, a component, or a directory of components.
    Test(TestOptions),
    /// Make the calls of an exported journal again with a component, and compare the answers.
    Replay(ReplayOptions),
    /// Compare two versions of a WIT package: what breaks plugins that exist, and what they survive.
    WitDiff {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// The old package: a directory of .wit files, or one file.
        old: PathBuf,
        /// The new one.
        new: PathBuf,
    },
}

/// Runs one command.
///
/// # Errors
/// What could not be done; the program then ends with 1.
pub async fn run(command: PluginCommand) -> anyhow::Result<ExitCode> {
    match command {
        PluginCommand::New(options) => {
            let directory = new_project(&options)?;
            say!(
                "{} is made. README.md says how it is built, tested and made live.",
                directory.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        PluginCommand::Check(options) => check::check(&options).await.map(exit),
        PluginCommand::Call(options) => call::call(&options).await.map(exit),
        PluginCommand::Test(options) => test::test(&options).await.map(exit),
        PluginCommand::Replay(options) => replay::replay(&options).await.map(exit),
        PluginCommand::WitDiff { json, old, new } => {
            let changes =
                compatibility::compare(&WitPackage::read(&old)?, &WitPackage::read(&new)?)?;
            if json {
                say!("{}", serde_json::to_string_pretty(&changes)?);
            } else if changes.is_empty() {
                say!("nothing changed that a plugin could see");
            } else {
                for change in &changes {
                    say!("{change}");
                }
            }
            let breaks = changes.iter().any(|change| change.effect == Effect::Breaks);
            Ok(exit(!breaks))
        }
    }
}

/// Prints. Where nobody reads any more (`| head`) the program ends there, with the code that a shell expects of one that SIGPIPE
/// ended.
fn print_out(text: fmt::Arguments<'_>) {
    match io::stdout().lock().write_fmt(text) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(141),
        Err(error) => {
            eprintln!("windlass: standard output cannot be written: {error}");
            process::exit(1)
        }
    }
}

fn exit(is_good: bool) -> ExitCode {
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
