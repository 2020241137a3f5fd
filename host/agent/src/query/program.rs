//! External programs, for facts that no file has: a fixed list of arguments, no shell, no input, bounded in time and output, in a
//! process group that ends with the query.

use std::{os::unix::process::ExitStatusExt as _, path::PathBuf, process::Stdio};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
};
use windlass_protocol::{QueryError, QueryErrorCode};

use super::failed;

/// The most output that is read, in bytes.
const MAX_OUTPUT_BYTES: usize = 1024 * 1024;
/// Where programs are looked for: what only root's PATH has is there for an ordinary user, too.
const DIRECTORIES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// What a program said.
#[derive(Debug)]
pub(super) struct Said {
    /// Exit code; that of a shell for one that a signal ended.
    pub(super) code: i32,
    /// Standard output.
    pub(super) output: String,
    /// Standard error.
    pub(super) errors: String,
}

/// Where a program is.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|directory| PathBuf::from(directory).join(name))
        .find(|path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Runs a program to its end. Dropping the future kills it.
///
/// # Errors
/// `unsupported` where there is no such program; `limit-exceeded` when it says too much; `failed` when it cannot be run.
pub(super) async fn run(name: &str, arguments: &[&str]) -> Result<Said, QueryError> {
    let Some(path) = find(name) else {
        return Err(QueryError::new(
            QueryErrorCode::Unsupported,
            format!("the program `{name}` is not installed on this server"),
        ));
    };
    let mut child = Command::new(&path)
        .args(arguments)
        .env_clear()
        .env("PATH", DIRECTORIES.join(":"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("`{}` cannot be run: {error}", path.display())))?;
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let (output, errors, status) =
        tokio::try_join!(read(name, output), read(name, errors), async {
            child
                .wait()
                .await
                .map_err(|error| failed(format!("`{name}` was lost: {error}")))
        })?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1);
    Ok(Said {
        code,
        output,
        errors,
    })
}

async fn read(name: &str, stream: Option<impl AsyncRead + Unpin>) -> Result<String, QueryError> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream
            .take(MAX_OUTPUT_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
            .await
            .map_err(|error| failed(format!("the output of `{name}` was lost: {error}")))?;
    }
    if bytes.len() > MAX_OUTPUT_BYTES {
        return Err(QueryError::new(
            QueryErrorCode::LimitExceeded,
            format!("`{name}` says more than {MAX_OUTPUT_BYTES} bytes"),
        ));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_says_its_piece_or_is_missing() {
        let said = run("uname", &["-s"]).await.unwrap();
        assert_eq!((said.code, said.output.as_str()), (0, "Linux\n"));
        let said = run("ls", &["/no/such/directory"]).await.unwrap();
        assert!(said.code != 0 && said.errors.contains("/no/such/directory"));
        let missing = run("no-such-program", &[]).await.unwrap_err();
        assert_eq!(missing.code, QueryErrorCode::Unsupported);
        let endless = run("yes", &[]).await.unwrap_err();
        assert_eq!(endless.code, QueryErrorCode::LimitExceeded);
    }
}
