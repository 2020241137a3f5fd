//! The tech stack `static-site`: files of a package, served by an nginx of the instance's own.
//!
//! The nginx belongs to the service instance: its configuration stands in the release, its state in the instance's data
//! directory, and it runs as the service's user; started as root, its workers are an ordinary user's where one may read the
//! files. A release does not stop it. The new configuration is written and tested while the old release serves; after the
//! switch of the link nginx reads it (`SIGHUP`): old workers answer what they have taken, new ones take new connections, and the
//! listening socket stays open. The health check waits for the *new* release.
//!
//! ```text
//! configure: .nginx/nginx.conf, nginx -t ─► activate: current → release ─► start (runs already) ─► reload ─► check
//! ```

use serde::Deserialize;
use serde_json::json;
use windlass_sdk::{
    Descriptor, PluginError, TechStack, Value,
    lifecycle::{HttpProbe, LifecyclePlan, LifecycleRequest, Phase, Probe, Step},
    parse_parameters,
    service::{Health, HealthKind, PORT, Program, Runtime, Service, checked, path_schema},
};

/// The plugin.
#[derive(Debug)]
pub struct StaticSite;

#[derive(Deserialize)]
struct Parameters {
    root: Option<String>,
    #[serde(default = "index")]
    index: String,
    not_found_page: Option<String>,
    #[serde(default)]
    single_page: bool,
    #[serde(default)]
    max_age_s: u32,
    #[serde(default)]
    access_log: bool,
    #[serde(default = "nginx")]
    nginx: String,
    runtime_version: Option<String>,
    runtime_package: Option<String>,
    #[serde(flatten)]
    service: Service,
}

fn index() -> String {
    "index.html".into()
}

fn nginx() -> String {
    "nginx".into()
}

/// Writes and tests the configuration. What stands in it was checked against the schema: no blanks, quotes or semicolons.
const CONFIGURE: &str = r#"state=$WINDLASS_DATA_DIR/nginx
root=$WINDLASS_RELEASE_DIR
if [ -n "$SITE_ROOT" ]; then root=$root/$SITE_ROOT; fi
[ -d "$root" ] || { echo "the package has no directory $SITE_ROOT: the parameter root names it" >&2; exit 1; }
case $PORT in '' | *[!0-9]*) echo "PORT is '$PORT', which is not a port" >&2; exit 1 ;; esac
case $WINDLASS_RELEASE_DIR$WINDLASS_DATA_DIR in *[!A-Za-z0-9_./+@-]*)
    echo "the agent's data directory has characters in its path that a configuration of nginx cannot hold" >&2; exit 1 ;;
esac
mkdir -p .nginx "$state"
printf '%s\n' "$WINDLASS_RELEASE" > .nginx/release
chmod 755 .nginx
chmod 644 .nginx/release
user=
# Started as root, nginx answers as an ordinary user, where one may read the files.
if [ "$(id -u)" = 0 ]; then
    user='user root root;'
    for name in www-data nobody; do
        if runuser -u "$name" -- test -r .nginx/release -a -r "$root" -a -x "$root" 2>/dev/null; then
            user="user $name $(id -gn "$name");"
            break
        fi
    done
    [ "$user" != 'user root root;' ] || echo "neither www-data nor nobody may read $root: root serves it. Set the parameter run_as" >&2
fi
access='access_log off;'
if [ "$SITE_ACCESS_LOG" = true ]; then access="access_log $state/access.log;"; fi
types='types { text/html html htm; text/css css; application/javascript js mjs; application/json json; image/svg+xml svg; image/png png; image/jpeg jpg jpeg; text/plain txt; application/wasm wasm; font/woff2 woff2; }'
if [ -r /etc/nginx/mime.types ]; then types='include /etc/nginx/mime.types;'; fi
fallback='=404'
if [ "$SITE_SINGLE_PAGE" = true ]; then fallback=/$SITE_INDEX; fi
not_found=
if [ -n "$SITE_NOT_FOUND" ]; then not_found="error_page 404 /$SITE_NOT_FOUND;"; fi
cat > .nginx/nginx.conf.new <<END
$user
worker_processes auto;
worker_shutdown_timeout 60s;
pid $state/nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
    $types
    default_type application/octet-stream;
    client_body_temp_path $state/client;
    proxy_temp_path $state/proxy;
    fastcgi_temp_path $state/fastcgi;
    uwsgi_temp_path $state/uwsgi;
    scgi_temp_path $state/scgi;
    $access
    sendfile on;
    tcp_nopush on;
    server_tokens off;
    gzip on;
    gzip_vary on;
    gzip_types text/css text/plain application/javascript application/json image/svg+xml;
    server {
        listen $PORT;
        # The port is not the one that clients know, where a load balancer stands in front.
        absolute_redirect off;
        root $root;
        index $SITE_INDEX;
        $not_found
        add_header Cache-Control "public, max-age=$SITE_MAX_AGE_S";
        location / { try_files \$uri \$uri/ $fallback; }
        location ~ /\.(?!well-known/) { return 404; }
        location = /.windlass/release {
            access_log off;
            allow 127.0.0.1;
            deny all;
            default_type text/plain;
            alias $WINDLASS_RELEASE_DIR/.nginx/release;
        }
    }
}
END
"$NGINX" -t -q -e stderr -p "$state" -c "$WINDLASS_RELEASE_DIR/.nginx/nginx.conf.new"
mv .nginx/nginx.conf.new .nginx/nginx.conf
"#;

/// The id file counts only where it names our own nginx: it may be older than the last start of the machine.
const RELOAD: &str = r#"conf=$WINDLASS_CURRENT_DIR/.nginx/nginx.conf
file=$WINDLASS_DATA_DIR/nginx/nginx.pid
tries=0
until pid=$(cat "$file" 2>/dev/null) && [ -n "$pid" ] && tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null | grep -qF -e "$conf"; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { echo "nginx does not run: see the application's output" >&2; exit 1; }
    sleep 0.1
done
kill -HUP "$pid"
"#;

impl TechStack for StaticSite {
    fn describe() -> Descriptor {
        Descriptor::new("static-site", "1.0.0")
            .title("Static files served by nginx")
            .summary(
                "Serves the files of a package with an nginx of its own. A release is switched to while nginx runs: it reads its \
                 new configuration, which was tested before, and keeps its socket.",
            )
            .provider("Windlass")
            .category("web")
            .operating_system("linux")
            .wish_user("www-data")
            .wish_user("app")
            .parameters(&schema())
            .preset(
                "single-page",
                "A single-page application",
                &json!({ "port": 8080, "root": "dist", "single_page": true }),
            )
    }

    fn lifecycle(request: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        let parameters: Parameters = parse_parameters(&request.parameters)?;
        let service = &parameters.service;
        if let Some(package) = &request.package
            && matches!(package.format.as_str(), "jar" | "plain")
        {
            return Err(PluginError::invalid_parameter(
                "",
                format!(
                    "the package {} is one file ({}): upload the site as a tar archive (plain, gz, xz, zst, bz2) or a zip archive",
                    package.file_name, package.format
                ),
            ));
        }
        let runtime = Runtime {
            command: &parameters.nginx,
            version_option: "-v",
            version_of: r"s#^nginx version: [^/]*/([0-9][0-9.]*).*#\1#p",
            minimum: Some(parameters.runtime_version.as_deref().unwrap_or("1.19.5")),
            package: parameters.runtime_package.as_deref(),
            suggestion: "nginx-light",
            run_as: service.run_as.as_deref(),
        };
        let program = Program::new([
            parameters.nginx.as_str(),
            "-p",
            "${WINDLASS_DATA_DIR}/nginx",
            "-e",
            "stderr",
            "-c",
            "${WINDLASS_CURRENT_DIR}/.nginx/nginx.conf",
            "-g",
            "daemon off;",
        ])
        .keeps_running();
        service.need_port(&program, &request)?;
        let mut plan = runtime.steps(LifecyclePlan::new(), &request);
        if request.wants(Phase::Configure) {
            plan = plan.step(configure(&parameters));
        }
        if request.wants(Phase::Start) {
            plan = plan.step(
                service
                    .script(Phase::Start, "reload", RELOAD)
                    .timeout_ms(30_000)
                    .repeatable(),
            );
        }
        if request.wants(Phase::Check) {
            let user = service.run_as.as_deref();
            plan = plan.step(serves_this_release(service).run_as(user));
        }
        let mut own = service.clone();
        // The stack's own check says more than that something listens.
        own.health = own.health.or(Some(Health::new(HealthKind::None)));
        own.steps(plan, &request, &program)
    }
}

fn configure(parameters: &Parameters) -> Step {
    let flag = |on: bool| Value::plain(if on { "true" } else { "false" });
    parameters
        .service
        .script(Phase::Configure, "write the configuration", CONFIGURE)
        .env("NGINX", Value::plain(parameters.nginx.clone()))
        .env(
            "SITE_ROOT",
            Value::plain(parameters.root.as_deref().unwrap_or_default()),
        )
        .env("SITE_INDEX", Value::plain(parameters.index.clone()))
        .env(
            "SITE_NOT_FOUND",
            Value::plain(parameters.not_found_page.as_deref().unwrap_or_default()),
        )
        .env("SITE_SINGLE_PAGE", flag(parameters.single_page))
        .env("SITE_ACCESS_LOG", flag(parameters.access_log))
        .env(
            "SITE_MAX_AGE_S",
            Value::plain(parameters.max_age_s.to_string()),
        )
        .repeatable()
}

/// Not healthy before new connections get the new release.
fn serves_this_release(service: &Service) -> Step {
    let probe = Probe::Http(HttpProbe {
        url: format!("http://127.0.0.1:${{{PORT}}}/.windlass/release"),
        statuses: vec![200],
        body_contains: Some("${WINDLASS_RELEASE}".into()),
    });
    let health = service
        .health
        .clone()
        .unwrap_or_else(|| Health::new(HealthKind::Http));
    checked(Phase::Check, "serves this release", probe, &health)
}

fn schema() -> serde_json::Value {
    let mut own = Runtime::properties();
    let properties = json!({
        "root": path_schema("The directory to serve, relative to the release directory. Default: the whole package, without files that begin with a dot."),
        "index": path_schema("What is served for a directory. Default: index.html."),
        "not_found_page": path_schema("A page of the site for what is not found."),
        "single_page": {
            "type": "boolean", "default": false,
            "description": "Answer the index page for whatever is not a file: for applications that have their routes in the browser."
        },
        "max_age_s": { "type": "integer", "minimum": 0, "maximum": 31536000, "default": 0, "description": "How long browsers may keep files, in seconds." },
        "access_log": { "type": "boolean", "default": false, "description": "Write nginx/access.log in the instance's data directory." },
        "nginx": {
            "type": "string", "pattern": "^[A-Za-z0-9_./+-]+$", "maxLength": 1000, "default": "nginx",
            "description": "The nginx to run: a name in PATH or an absolute path."
        }
    });
    if let (Some(own), Some(properties)) = (own.as_object_mut(), properties.as_object()) {
        own.extend(properties.clone());
    }
    let mut schema = Service::schema(&own);
    if let Some(properties) = schema["properties"].as_object_mut() {
        properties.remove("arguments");
    }
    schema
}

windlass_sdk::tech_stack!(StaticSite);

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_sdk::{PackageRef, ServerFacts, lifecycle::Action};

    fn request(parameters: &serde_json::Value, format: &str) -> LifecycleRequest {
        LifecycleRequest::new("site", parameters)
            .package(PackageRef::new("1", format, "site.tar.gz"))
            .server(ServerFacts::new("s1", "one"))
    }

    fn names(plan: &LifecyclePlan, phase: Phase) -> Vec<&str> {
        let of = plan.steps.iter().filter(|step| step.phase == phase.code());
        of.map(|step| step.name.as_str()).collect()
    }

    #[test]
    fn nginx_is_kept_and_told_of_the_release() {
        let plan = StaticSite::lifecycle(request(&json!({ "port": 8080 }), "tar_gz")).unwrap();
        assert_eq!(names(&plan, Phase::Start), ["start", "reload"]);
        assert_eq!(names(&plan, Phase::Check), ["serves this release"]);
        let start = plan
            .steps
            .iter()
            .find(|step| matches!(step.action, Action::Start(_)))
            .unwrap();
        assert_eq!(
            start.attributes,
            [("keep-running".to_owned(), "true".to_owned())]
        );
        // A stop is a stop all the same: to take the instance offline.
        assert_eq!(names(&plan, Phase::Stop), ["stop"]);
    }

    #[test]
    fn a_check_of_the_user_comes_after_the_stacks_own() {
        let parameters = json!({ "port": 1, "health": { "kind": "http", "path": "/index.html", "deadline_s": 7 } });
        let plan = StaticSite::lifecycle(request(&parameters, "zip")).unwrap();
        assert_eq!(
            names(&plan, Phase::Check),
            ["serves this release", "health check"]
        );
        let checks = plan.steps.iter().filter(|step| step.phase == "check");
        assert!(checks.into_iter().all(|step| step.timeout_ms == 7_000));
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let jar = StaticSite::lifecycle(request(&json!({ "port": 1 }), "jar")).unwrap_err();
        assert!(jar.message.contains(".tar.gz"), "{}", jar.message);
        let no_port = StaticSite::lifecycle(request(&json!({}), "zip")).unwrap_err();
        assert_eq!(no_port.field.as_deref(), Some("/port"));
    }
}
