//! The compiling child as a program of its own, for this crate's tests and benches. The server is its own child.

use std::process::ExitCode;

fn main() -> ExitCode {
    windlass_runtime::compile_child_main(std::env::args_os().skip(1))
}
