//! A small real HTTP application: what the demo and the tests release.
//!
//! Listens on `127.0.0.1:$PORT`. Its package holds this program and a file `VERSION` with one line, read from the directory
//! that it is started in. `GET /` answers with version, process id and server; `GET /healthz` answers 200, or 500 when the
//! package holds a file `broken`. It ends on `SIGTERM` like any program that does not handle it.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

/// A request line and headers longer than this are not read on.
const MAX_HEADER_LINES: usize = 100;

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
    connection.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines.take(MAX_HEADER_LINES) {
        if line?.is_empty() {
            break;
        }
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    let (status, body) = match path {
        "/" => (
            "200 OK",
            format!("sample {version} pid {} {server}\n", std::process::id()),
        ),
        "/healthz" if Path::new("broken").exists() => (
            "500 Internal Server Error",
            format!("sample {version} is broken\n"),
        ),
        "/healthz" => ("200 OK", format!("sample {version} is healthy\n")),
        _ => ("404 Not Found", "there is only / and /healthz\n".to_owned()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let mut connection = connection;
    connection.write_all(head.as_bytes())?;
    connection.write_all(body.as_bytes())
}
