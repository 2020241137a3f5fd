//! The shipped tech stacks on the runtimes that they are for: Java, Node, Python, nginx. One host with one server each.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use serde_json::{Value, json};
use windlass_tests::{
    host::{Setup, TestHost, WORKSPACE, eventually, free_port, tar_gz, text},
    scene::{act, nodes, nodes_when, step},
};

/// The user whom the site's nginx runs as: every Debian has it.
const SITE_USER: &str = "www-data";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stack_is_released_and_rolled_back_on_its_real_runtime() {
    let mut host = TestHost::start(Setup {
        agents: 4,
        ..Setup::default()
    })
    .await;
    let site_agent = host
        .agents
        .iter()
        .position(|agent| agent.name == "agent-4")
        .expect("the fourth agent");
    allow_only_the_user(&mut host, site_agent).await;

    let build = tempfile::tempdir().expect("a directory");
    let class = java_class(build.path());
    let mut apps = Vec::new();
    for (index, (stack, parameters)) in stacks().into_iter().enumerate() {
        apps.push(App::prepare(&host, stack, index, parameters, &class).await);
    }

    release(&host, &apps, 0).await;
    for app in &apps {
        app.answers("v1").await;
    }
    let java = get(apps[0].port).expect("an answer");
    assert!(java.ends_with("java v1 all in one"), "{java}");
    let site = &apps[3];
    let nginx = site.main_process(&host).await;

    // While the site changes its release, somebody always asks for it, with a new connection each time.
    let crowd = Crowd::come(site.port);
    let second = release(&host, &apps, 1).await;
    for app in &apps {
        app.answers("v2").await;
    }
    eventually("the crowd has seen the second release", || async {
        crowd
            .has_seen_the_second()
            .then_some(())
            .ok_or_else(|| "not yet".to_owned())
    })
    .await;
    let order = act(
        &host,
        &second,
        &json!({ "action": "roll_back", "reason": "try it" }),
    )
    .await
    .expect("a rollback");
    let rollback = host.order_ended(&text(&order["id"])).await;
    assert_eq!(rollback["state"], "succeeded", "{rollback}");
    for app in &apps {
        app.answers("v1").await;
    }
    let seen = crowd.go();
    assert_eq!(
        seen.failed,
        Vec::<String>::new(),
        "of {} requests",
        seen.asked
    );
    assert!(seen.asked > 100, "{} requests", seen.asked);
    assert_eq!(
        site.main_process(&host).await,
        nginx,
        "one nginx served all releases"
    );

    // A Java program had the time for its shutdown hook.
    let java = host.agents[0]
        .data
        .join("instances")
        .join(&apps[0].instance);
    let farewells = std::fs::read_to_string(java.join("data/farewell"));
    assert_eq!(farewells.ok().as_deref(), Some("v1\nv2\n"));
    // Requirements and dependencies came from the packages.
    let planned = nodes(&host, &second).await;
    for (agent, name) in [
        ("agent-2", "install dependencies"),
        ("agent-3", "make the environment"),
        ("agent-4", "reload"),
    ] {
        assert_eq!(step(&planned, agent, name)["state"], "succeeded", "{agent}");
    }
    assert!(
        planned
            .iter()
            .all(|node| node["server_name"] != "agent-4" || node["name"] != "stop"),
        "a site is not stopped for a release"
    );
    what_is_complete_is_not_made_again(&host, &apps).await;
}

/// Dependencies of a release that is released again as it is stay, since the application runs from them; what is left of an
/// attempt that broke off is made anew.
async fn what_is_complete_is_not_made_again(host: &TestHost, apps: &[App]) {
    let made: Vec<PathBuf> = apps[1..3]
        .iter()
        .zip(["node_modules", ".venv"])
        .map(|(app, made)| app.directory(host).join("current").join(made))
        .collect();
    for made in &made {
        std::fs::write(made.join("mark"), "").expect("a mark");
    }
    release(host, apps, 0).await;
    for made in &made {
        assert!(
            made.join("mark").is_file(),
            "{} was made again",
            made.display()
        );
        std::fs::remove_file(made.join(".windlass-complete")).expect("it was complete");
    }
    release(host, apps, 0).await;
    for made in &made {
        assert!(!made.join("mark").exists(), "{} was kept", made.display());
    }
    for app in apps {
        app.answers("v1").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_lacks_is_said_before_anything_is_stopped() {
    let host = TestHost::start(Setup {
        agents: 1,
        ..Setup::default()
    })
    .await;
    let parameters = json!({ "port": free_port(), "script": "app.py", "runtime_version": "99" });
    let app = App::prepare(&host, "python", 0, parameters, &Bytes::new()).await;
    let id = host.order(&app.order(&[&app], 0)).await.expect("an order");
    let blocked = host.order_in(&id, &["blocked"]).await;
    let planned = nodes(&host, &id).await;
    let failed = step(&planned, "agent-1", "look for the runtime");
    let details = host
        .api
        .get(&host.ws(&format!("orders/{id}/nodes/{}", failed["node"])))
        .await
        .expect("the step");
    let output = details.to_string();
    assert!(
        output.contains("at least 99 is needed")
            && output.contains("sudo apt-get install -y python3"),
        "{blocked}: {output}"
    );
}

fn stacks() -> [(&'static str, Value); 4] {
    let port = free_port;
    let health = json!({ "kind": "http", "path": "/", "interval_ms": 200 });
    [
        (
            "java-jar",
            json!({ "port": port(), "jvm_options": ["-Xmx64m", "-XX:TieredStopAtLevel=1", "-Dshop.motto=all in one"], "health": health, "runtime_version": "11" }),
        ),
        (
            "nodejs",
            json!({ "port": port(), "dependencies": "offline", "health": health }),
        ),
        (
            "python",
            json!({ "port": port(), "module": "app", "dependencies": "wheels", "health": health }),
        ),
        (
            "static-site",
            json!({ "port": port(), "root": "public", "run_as": SITE_USER, "health": health }),
        ),
    ]
}

/// One application on one server.
struct App {
    stack: &'static str,
    instance: String,
    packages: Vec<String>,
    port: u16,
}

impl App {
    async fn prepare(
        host: &TestHost,
        stack: &'static str,
        agent: usize,
        parameters: Value,
        class: &Bytes,
    ) -> Self {
        let name = format!("on-{stack}");
        let app = host
            .api
            .post(
                "/v1/apps",
                &json!({ "name": name, "tech_stack": { "name": stack, "version": "*" } }),
            )
            .await
            .expect("an application");
        let mut packages = Vec::new();
        for version in ["v1", "v2"] {
            let (file_name, file) = package(stack, version, class);
            let path = host.ws(&format!(
                "packages?app={name}&version={version}&file_name={file_name}"
            ));
            packages.push(text(
                &host.api.upload(&path, file).await.expect("a package")["id"],
            ));
        }
        let port = parameters["port"].as_u64().expect("a port");
        let instance = json!({ "name": name, "app": app["id"], "parameters": parameters });
        let instance = host
            .api
            .post(&host.ws("service-instances"), &instance)
            .await
            .expect("an instance");
        let instance = text(&instance["id"]);
        let servers = host.servers().await;
        let path = host.ws(&format!("service-instances/{instance}/servers"));
        let body = json!({ "servers": [servers[agent].1] });
        host.api
            .post(&path, &body)
            .await
            .expect("a server is bound");
        Self {
            stack,
            instance,
            packages,
            port: u16::try_from(port).expect("a port"),
        }
    }

    fn order(&self, apps: &[&Self], package: usize) -> Value {
        let targets: Vec<Value> = apps
            .iter()
            .map(|app| json!({ "instance": app.instance, "package": app.packages[package] }))
            .collect();
        json!({
            "title": format!("release {package}"),
            "targets": targets,
            "limits": { "max_unavailable": "100%" },
            "run": true,
        })
    }

    /// Waits until this version answers.
    async fn answers(&self, version: &str) {
        eventually(&format!("{} {version} answers", self.stack), || async {
            match get(self.port) {
                Ok(body) if body.contains(version) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// Its directory on its server.
    fn directory(&self, host: &TestHost) -> PathBuf {
        let agents = host.agents.iter();
        agents
            .map(|agent| agent.data.join("instances").join(&self.instance))
            .find(|path| path.is_dir())
            .expect("its directory")
    }

    /// The process that its server's agent keeps running.
    async fn main_process(&self, host: &TestHost) -> u64 {
        let file = self.directory(host).join("data/nginx/nginx.pid");
        let pid = std::fs::read_to_string(file).expect("the file of nginx's number");
        pid.trim().parse().expect("a number")
    }
}

async fn release(host: &TestHost, apps: &[App], package: usize) -> String {
    let all: Vec<&App> = apps.iter().collect();
    let id = host
        .order(&all[0].order(&all, package))
        .await
        .expect("an order");
    let at_work = ["running", "failed", "unknown"];
    nodes_when(host, &id, "every stack is released", |nodes| {
        let of = |level: &str, states: &[&str]| {
            let mut of = nodes.iter().filter(|node| node["level"] == level);
            of.any(|node| states.iter().any(|state| node["state"] == *state))
        };
        assert!(
            !of("step", &["failed", "unknown"]),
            "{}",
            shown(nodes, &at_work)
        );
        of("order", &["succeeded"])
    })
    .await;
    id
}

/// The steps that are in some states, with what is said of them.
fn shown(nodes: &[Value], states: &[&str]) -> String {
    let steps = nodes.iter().filter(|node| {
        node["level"] == "step" && states.iter().any(|state| node["state"] == *state)
    });
    let lines = steps.map(|node| {
        format!(
            "{} on {}: {} {}\n",
            node["name"], node["server_name"], node["state"], node["message"]
        )
    });
    lines.collect()
}

/// Lets tasks on one agent run as the site's user and as nobody else, root included; the user must reach the agent's directories.
async fn allow_only_the_user(host: &mut TestHost, index: usize) {
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(host.path(), open).expect("the directory is opened");
    host.kill_agent(index);
    let file = host.agents[index].data.join("config.json");
    let config = std::fs::read_to_string(&file).expect("the agent's configuration");
    let mut config: Value = serde_json::from_str(&config).expect("JSON");
    config["policy"]["users"] = json!([SITE_USER]);
    config["policy"]["root"] = false.into();
    std::fs::write(&file, config.to_string()).expect("the configuration is written");
    let name = host.agents[index].name.clone();
    host.start_agent(index, &[]);
    let path = format!("/v1/workspaces/{WORKSPACE}/servers?page_size=50");
    eventually(&format!("{name} is back"), || async {
        let page = host
            .api
            .get(&path)
            .await
            .map_err(|error| error.to_string())?;
        let online = windlass_tests::host::items(&page)
            .iter()
            .filter(|server| server["connection"] == "online")
            .count();
        (online == host.agents.len())
            .then_some(())
            .ok_or_else(|| page.to_string())
    })
    .await;
}

/// `GET /` with a connection of its own.
fn get(port: u16) -> Result<String, String> {
    let fail = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let mut connection = TcpStream::connect(("127.0.0.1", port)).map_err(|e| fail("connect", e))?;
    connection
        .set_read_timeout(Some(Duration::from_secs(20)))
        .map_err(|e| fail("time-out", e))?;
    connection
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .map_err(|e| fail("write", e))?;
    let mut answer = String::new();
    connection
        .read_to_string(&mut answer)
        .map_err(|e| fail("read", e))?;
    if answer.starts_with("HTTP/1.1 200") {
        Ok(answer)
    } else {
        Err(format!("answered: {answer}"))
    }
}

/// Somebody who asks a port again and again.
struct Crowd {
    leave: Arc<AtomicBool>,
    seen: Arc<std::sync::Mutex<Seen>>,
    thread: std::thread::JoinHandle<()>,
}

#[derive(Default, Clone)]
struct Seen {
    asked: u32,
    second: bool,
    failed: Vec<String>,
}

impl Crowd {
    fn come(port: u16) -> Self {
        let leave = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(std::sync::Mutex::new(Seen::default()));
        let (left, notes) = (leave.clone(), seen.clone());
        let thread = std::thread::spawn(move || {
            while !left.load(Ordering::Relaxed) {
                let answer = get(port);
                let mut seen = notes.lock().expect("nobody panics with it");
                seen.asked += 1;
                match answer {
                    Ok(body) => seen.second |= body.contains("v2"),
                    Err(error) => seen.failed.push(error),
                }
            }
        });
        Self {
            leave,
            seen,
            thread,
        }
    }

    fn has_seen_the_second(&self) -> bool {
        self.seen.lock().expect("nobody panics with it").second
    }

    fn go(self) -> Seen {
        self.leave.store(true, Ordering::Relaxed);
        self.thread.join().expect("the crowd");
        self.seen.lock().expect("nobody panics with it").clone()
    }
}

fn package(stack: &str, version: &str, class: &Bytes) -> (String, Bytes) {
    match stack {
        "java-jar" => (
            format!("shop-{version}.jar"),
            zip(&[
                (
                    "META-INF/MANIFEST.MF",
                    b"Manifest-Version: 1.0\r\nMain-Class: Shop\r\n\r\n",
                ),
                ("Shop.class", class),
                ("VERSION", version.as_bytes()),
            ]),
        ),
        "nodejs" => (format!("shop-{version}.tar.gz"), node_package(version)),
        "python" => (format!("shop-{version}.tar.gz"), python_package(version)),
        "static-site" => (
            format!("site-{version}.tar.gz"),
            tar_gz(&[(
                "public/index.html",
                0o644,
                format!("<h1>{version}</h1>").as_bytes(),
            )]),
        ),
        other => panic!("no package for {other}"),
    }
}

const SHOP_JAVA: &str = r#"
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.file.*;

public class Shop {
    public static void main(String[] arguments) throws Exception {
        String motto = System.getProperty("shop.motto");
        String version = new String(Shop.class.getResourceAsStream("/VERSION").readAllBytes());
        int port = Integer.parseInt(System.getenv("SERVER_PORT"));
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", port), 0);
        server.createContext("/", exchange -> {
            byte[] body = ("java " + version + " " + motto).getBytes();
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        Path farewell = Path.of(System.getenv("WINDLASS_DATA_DIR"), "farewell");
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                Files.writeString(farewell, version + "\n", StandardOpenOption.CREATE, StandardOpenOption.APPEND);
            } catch (java.io.IOException error) {
                throw new java.io.UncheckedIOException(error);
            }
        }));
        server.start();
    }
}
"#;

/// Compiles the program; the packages differ in a resource.
fn java_class(directory: &Path) -> Bytes {
    let source = directory.join("Shop.java");
    std::fs::write(&source, SHOP_JAVA).expect("the source");
    let output = Command::new("javac")
        .args(["-J-XX:TieredStopAtLevel=1", "-proc:none", "-d"])
        .arg(directory)
        .arg(&source)
        .output()
        .expect("javac: `make setup` installs it");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    std::fs::read(directory.join("Shop.class"))
        .expect("the class")
        .into()
}

fn node_package(version: &str) -> Bytes {
    let program = format!(
        "const greet = require('greet');\n\
         require('http').createServer((_, answer) => answer.end(greet('{version}')))\n\
         .listen(process.env.PORT, '127.0.0.1');\n"
    );
    let manifest = json!({
        "name": "shop", "version": "1.0.0", "main": "server.js", "dependencies": { "greet": "file:greet" },
    });
    let lock = json!({
        "name": "shop", "version": "1.0.0", "lockfileVersion": 3, "requires": true,
        "packages": {
            "": manifest,
            "greet": { "version": "1.0.0" },
            "node_modules/greet": { "resolved": "greet", "link": true },
        },
    });
    tar_gz(&[
        ("package.json", 0o644, manifest.to_string().as_bytes()),
        ("package-lock.json", 0o644, lock.to_string().as_bytes()),
        ("server.js", 0o644, program.as_bytes()),
        (
            "greet/package.json",
            0o644,
            br#"{ "name": "greet", "version": "1.0.0" }"#,
        ),
        (
            "greet/index.js",
            0o644,
            b"module.exports = (who) => `node ${who}`;\n",
        ),
        (".npm-cache/README", 0o644, b"nothing but links is needed\n"),
    ])
}

fn python_package(version: &str) -> Bytes {
    let program = format!(
        "import http.server, os\nimport greet\n\n\
         class Answer(http.server.BaseHTTPRequestHandler):\n\
         \x20   def do_GET(self):\n\
         \x20       body = greet.greet('{version}').encode()\n\
         \x20       self.send_response(200)\n\
         \x20       self.send_header('Content-Length', str(len(body)))\n\
         \x20       self.end_headers()\n\
         \x20       self.wfile.write(body)\n\n\
         class Server(http.server.ThreadingHTTPServer):\n\
         \x20   allow_reuse_address = True\n\n\
         Server.protocol_version = 'HTTP/1.1'\n\
         Answer.protocol_version = 'HTTP/1.1'\n\
         Server(('127.0.0.1', int(os.environ['PORT'])), Answer).serve_forever()\n"
    );
    let wheel = zip(&[
        ("greet/__init__.py", b"def greet(who):\n    return 'python ' + who\n"),
        ("greet-1.0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: greet\nVersion: 1.0\n"),
        (
            "greet-1.0.dist-info/WHEEL",
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        ),
        (
            "greet-1.0.dist-info/RECORD",
            b"greet/__init__.py,,\ngreet-1.0.dist-info/METADATA,,\ngreet-1.0.dist-info/WHEEL,,\ngreet-1.0.dist-info/RECORD,,\n",
        ),
    ]);
    tar_gz(&[
        ("app.py", 0o644, program.as_bytes()),
        ("requirements.txt", 0o644, b"greet==1.0\n"),
        ("wheels/greet-1.0-py3-none-any.whl", 0o644, &wheel),
    ])
}

fn zip(files: &[(&str, &[u8])]) -> Bytes {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        archive
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .expect("a file is begun");
        archive.write_all(content).expect("a file is packed");
    }
    archive.finish().expect("the archive").into_inner().into()
}
