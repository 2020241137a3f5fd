//! A small real HTTP application: what the demo and the tests release.
//!
//! Listens on `127.0.0.1:$PORT`. Its package holds this program and a file `VERSION` with one line, read from the directory
//! that it is started in. `/` (and anything below `/under/`) answers with version, process id and server; `/headers` with the
//! request's headers; `/healthz` answers 200, or 500 when the package holds a file `broken`. Files `delay_ms` and `fail_every`
//! in the package make `/` slow, or fail each so many-th time. Any method; connections are kept alive as HTTP/1.1 has it. It
//! ends on `SIGTERM` like any program that does not handle it.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// A request line and headers longer than this are not read on.
const MAX_HEADER_LINES: usize = 100;
/// A connection without a request for so long is closed.
const IDLE_WITHIN: Duration = Duration::from_secs(75);

fn main() -> ExitCode {
    let port = match env::var("PORT").map(|port| port.parse::<u16>()) {
        Ok(Ok(port)) => port,
        Ok(Err(_)) | Err(_) => {
            eprintln!("sample: PORT must be set to a port number, for example PORT=8080");
            return ExitCode::FAILURE;
        }
    };
    let version = match fs::read_to_string("VERSION") {
        Ok(version) => version.trim().to_owned(),
        Err(error) => {
            eprintln!("sample: the file VERSION cannot be read: {error}");
            return ExitCode::FAILURE;
        }
    };
    let listener = match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("sample: port {port} cannot be listened on: {error}");
            return ExitCode::FAILURE;
        }
    };
    let server = env::var("WINDLASS_SERVER").unwrap_or_default();
    println!("sample {version} listens on 127.0.0.1:{port}");
    for connection in listener.incoming() {
        let (version, server) = (version.clone(), server.clone());
        match connection {
            Ok(connection) => drop(thread::spawn(move || {
                if let Err(error) = answer(connection, &version, &server) {
                    eprintln!("sample: a connection ended early: {error}");
                }
            })),
            Err(error) => eprintln!("sample: a connection was not accepted: {error}"),
        }
    }
    ExitCode::SUCCESS
}

fn answer(connection: TcpStream, version: &str, server: &str) -> std::io::Result<()> {
    connection.set_read_timeout(Some(IDLE_WITHIN))?;
    connection.set_nodelay(true)?;
    let faults = Faults::of_package();
    let mut writer = connection.try_clone()?;
    let mut reader = BufReader::new(connection);
    while let Some(request) = read_request(&mut reader)? {
        let (status, body) = match request.path.as_str() {
            "/" => {
                thread::sleep(faults.delay);
                if faults.fails_now() {
                    (
                        "500 Internal Server Error",
                        format!("sample {version} was told to fail\n"),
                    )
                } else {
                    (
                        "200 OK",
                        format!("sample {version} pid {} {server}\n", std::process::id()),
                    )
                }
            }
            "/headers" => ("200 OK", request.headers.join("\n") + "\n"),
            "/healthz" if Path::new("broken").exists() => (
                "500 Internal Server Error",
                format!("sample {version} is broken\n"),
            ),
            "/healthz" => ("200 OK", format!("sample {version} is healthy\n")),
            path if path.starts_with("/under/") => (
                "200 OK",
                format!("sample {version} pid {} {server}\n", std::process::id()),
            ),
            _ => (
                "404 Not Found",
                "there is only /, /headers, /under/… and /healthz\n".to_owned(),
            ),
        };
        let length = body.len();
        let connection = if request.keep_alive {
            "keep-alive"
        } else {
            "close"
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}"
        );
        writer.write_all(answer.as_bytes())?;
        if !request.keep_alive {
            break;
        }
    }
    Ok(())
}

/// What a package makes go wrong on purpose, by files in it.
struct Faults {
    /// `delay_ms`: how long `/` takes.
    delay: Duration,
    /// `fail_every`: each so many-th answer of `/` is a 500.
    fail_every: u64,
}

impl Faults {
    fn of_package() -> Self {
        let figure = |file: &str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            text.trim().parse().unwrap_or(0)
        };
        Self {
            delay: Duration::from_millis(figure("delay_ms")),
            fail_every: figure("fail_every"),
        }
    }

    fn fails_now(&self) -> bool {
        static ANSWERS: AtomicU64 = AtomicU64::new(0);
        let number = ANSWERS.fetch_add(1, Ordering::Relaxed) + 1;
        self.fail_every > 0 && number.is_multiple_of(self.fail_every)
    }
}

struct Request {
    path: String,
    headers: Vec<String>,
    keep_alive: bool,
}

/// The next request with its body read; `None` when the client is done.
fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut keep_alive = line.trim_end().ends_with("HTTP/1.1");
    let mut body_bytes = 0;
    let mut headers = Vec::new();
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Ok(None);
        }
        let header = header.trim_end();
        if header.is_empty() {
            break;
        }
        if headers.len() == MAX_HEADER_LINES {
            return Err(std::io::Error::other("too many headers"));
        }
        if let Some((name, value)) = header.split_once(':') {
            match (name.to_ascii_lowercase().as_str(), value.trim()) {
                ("content-length", value) => body_bytes = value.parse().unwrap_or(0),
                ("connection", value) => keep_alive &= !value.eq_ignore_ascii_case("close"),
                (_, _) => {}
            }
        }
        headers.push(header.to_owned());
    }
    std::io::copy(&mut reader.take(body_bytes), &mut std::io::sink())?;
    Ok(Some(Request {
        path,
        headers,
        keep_alive,
    }))
}
