//! The HTTP surface: the only place that knows HTTP.
//!
//! ```text
//! listener ─► gate (id, token, idempotency) ─► handler ─► service      problem ◄─ ServiceError
//! ```
//! A handler takes parsed values (`extract`), calls one service, and answers with `reply` or a `problem`. It is named
//! `<verb>_<resource>`, which is its OpenAPI operation id. To add one: write it in the file of its resource with
//! `#[utoipa::path]`, put it into that file's `router()`. Parameters and answers that all operations share (problems, tokens,
//! `Idempotency-Key`, `If-Match`) are added to the document by [`openapi`].
//!
//! Handlers never touch the store. The listener for agents is [`agents`]; it shares nothing with the rest.

mod activation_codes;
pub mod agents;
mod apps;
mod back_ends;
mod certificates;
pub mod client;
mod dashboard;
mod diagnoses;
mod events;
mod extract;
mod gate;
mod instances;
mod invocations;
pub(crate) mod listener;
mod load_balancers;
mod meta;
mod metrics;
mod notifications;
mod operations;
mod order_logs;
mod order_revisions;
mod order_traffic;
mod orders;
mod packages;
mod plugin_calls;
mod plugin_files;
mod plugins;
mod pools;
mod problem;
mod process_templates;
mod reply;
mod secrets;
mod servers;
mod shadows;
mod stream;
mod tokens;
mod workspaces;

use std::{ops::Deref, sync::Arc};

use axum::{
    Router,
    http::{Method, StatusCode},
    middleware,
};
use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use utoipa::openapi::{
    Components, ContentBuilder, Info, OpenApi, OpenApiBuilder, Ref, RefOr, Required,
    ResponseBuilder,
    path::{Operation, ParameterBuilder, ParameterIn},
    schema::{ObjectBuilder, Type},
    security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};
use utoipa_axum::router::OpenApiRouter;

use crate::{
    engine::traffic::SimulatedPools,
    gateway::{Gateway, secrets::SecretVault},
    service::{
        activation_codes::ActivationCodes, apps::Apps, certificates::Certificates,
        diagnoses::Diagnoses, events::SystemEvents, idempotency::Idempotency, instances::Instances,
        invocations::Invocations, load_balancers::LoadBalancers, notifications::Notifications,
        orders::Orders, packages::Packages, plugin_calls::PluginCalls, plugin_events::PluginEvents,
        plugins::PluginService, pools::Pools, servers::Servers, shadows::Shadows,
        templates::Templates, tokens::Tokens, workspaces::Workspaces,
    },
};
use metrics::Metrics;
pub use metrics::{Gauge, Gauges};
pub use problem::Problem;

/// What the API stands on.
pub struct ApiParts {
    /// Workspaces.
    pub workspaces: Workspaces,
    /// Applications.
    pub apps: Apps,
    /// Packages.
    pub packages: Packages,
    /// Service instances.
    pub instances: Instances,
    /// Servers.
    pub servers: Servers,
    /// Activation codes.
    pub activation_codes: ActivationCodes,
    /// Tokens.
    pub tokens: Tokens,
    /// Notification channels and deliveries.
    pub notifications: Notifications,
    /// Pools.
    pub pools: Pools,
    /// Plugins.
    pub plugins: PluginService,
    /// Recorded calls of plugins.
    pub plugin_calls: PluginCalls,
    /// What happened to plugins.
    pub plugin_events: PluginEvents,
    /// What happened to servers and certificates.
    pub events: SystemEvents,
    /// Versions of plugins that are compared with the default.
    pub shadows: Shadows,
    /// Orders.
    pub orders: Orders,
    /// Process templates.
    pub templates: Templates,
    /// Diagnoses.
    pub diagnoses: Diagnoses,
    /// Invocations.
    pub invocations: Invocations,
    /// Agents' sessions.
    pub gateway: Gateway,
    /// Secrets.
    pub secrets: SecretVault,
    /// Load balancers.
    pub load_balancers: LoadBalancers,
    /// Certificates.
    pub certificates: Certificates,
    /// Weights and faults of simulated pools.
    pub traffic: Arc<SimulatedPools>,
    /// Idempotency records.
    pub idempotency: Idempotency,
    /// Figures of others for `/metrics`.
    pub gauges: Arc<dyn Gauges>,
    /// Whether the server is ready.
    pub ready: watch::Receiver<bool>,
    /// Where agents reach the platform: `host:port`.
    pub agent_address: String,
    /// Ends streams, and readiness.
    pub stop: CancellationToken,
}

/// The API's state. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Api(Arc<Shared>);

pub(crate) struct Shared {
    parts: ApiParts,
    metrics: Metrics,
    /// Streams of events: each ends with its listener, its token, its order or the server.
    streams: TaskTracker,
    /// Places for plugin files that are held in memory.
    plugin_bodies: Semaphore,
    document: Bytes,
}

impl Deref for Api {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Deref for Shared {
    type Target = ApiParts;

    fn deref(&self) -> &ApiParts {
        &self.parts
    }
}

/// The API, ready to be served. `streams` tracks what outlives its request.
pub(crate) fn build(parts: ApiParts, streams: TaskTracker) -> Router {
    let (router, document) = routes().split_for_parts();
    let document = serde_json::to_vec(&complete(document)).expect("the document has string keys");
    let api = Api(Arc::new(Shared {
        parts,
        metrics: Metrics::new(),
        streams,
        plugin_bodies: Semaphore::new(plugin_files::AT_ONCE),
        document: document.into(),
    }));
    router
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(route_not_found)
        .layer(middleware::from_fn_with_state(api.clone(), gate::gate))
        .with_state(api)
}

/// The OpenAPI 3.1 document of the whole API.
#[must_use]
pub fn openapi() -> OpenApi {
    complete(routes().split_for_parts().1)
}

fn routes() -> OpenApiRouter<Api> {
    let info = Info::new("Windlass", env!("CARGO_PKG_VERSION"));
    let problem = <Problem as utoipa::PartialSchema>::schema();
    let mut components = Components::new();
    components.schemas.insert("Problem".to_owned(), problem);
    // Named by a parameter of a query alone, which brings no schema along.
    let purpose = <crate::service::orders::PurposeKind as utoipa::PartialSchema>::schema();
    components.schemas.insert("PurposeKind".to_owned(), purpose);
    let kind = <packages::PackageKind as utoipa::PartialSchema>::schema();
    components.schemas.insert("PackageKind".to_owned(), kind);
    let document = OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .build();
    OpenApiRouter::with_openapi(document)
        .merge(meta::router())
        .merge(workspaces::router())
        .merge(apps::router())
        .merge(packages::router())
        .merge(instances::router())
        .merge(servers::router())
        .merge(activation_codes::router())
        .merge(pools::router())
        .merge(notifications::router())
        .merge(load_balancers::router())
        .merge(back_ends::router())
        .merge(certificates::router())
        .merge(secrets::router())
        .merge(orders::router())
        .merge(order_traffic::router())
        .merge(order_logs::router())
        .merge(order_revisions::router())
        .merge(dashboard::router())
        .merge(operations::router())
        .merge(process_templates::router())
        .merge(diagnoses::router())
        .merge(events::router())
        .merge(invocations::router())
        .merge(plugins::router())
        .merge(plugin_files::router())
        .merge(plugin_calls::router())
        .merge(shadows::router())
        .merge(tokens::router())
}

/// Adds what all operations share.
fn complete(mut document: OpenApi) -> OpenApi {
    document.info.description = Some(
        "Errors are `application/problem+json` with a stable `code`. Lists have `page_size` and `cursor`. \
         `Idempotency-Key` makes a write happen once within 24 hours; `If-Match` makes an update fail when the resource has \
         changed; both are optional."
            .to_owned(),
    );
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    let components = document.components.get_or_insert_with(Components::new);
    components
        .security_schemes
        .insert("token".to_owned(), RefOr::T(SecurityScheme::Http(bearer)));
    for (path, item) in &mut document.paths.paths {
        let guarded = path.starts_with("/v1/");
        for (method, operation) in [
            (Method::GET, &mut item.get),
            (Method::POST, &mut item.post),
            (Method::PUT, &mut item.put),
            (Method::DELETE, &mut item.delete),
        ] {
            if let Some(operation) = operation {
                share(operation, &method, guarded);
            }
        }
    }
    document
}

fn share(operation: &mut Operation, method: &Method, guarded: bool) {
    let content = ContentBuilder::new()
        .schema(Some(RefOr::Ref(Ref::from_schema_name("Problem"))))
        .build();
    let problem = ResponseBuilder::new()
        .description("What is wrong.")
        .content("application/problem+json", content)
        .build();
    operation
        .responses
        .responses
        .insert("default".to_owned(), RefOr::T(problem));
    if !guarded {
        return;
    }
    let none: [&str; 0] = [];
    operation.security = Some(vec![SecurityRequirement::new("token", none)]);
    let mut headers = Vec::new();
    if *method != Method::GET {
        headers.push((
            "Idempotency-Key",
            "Up to 200 characters: the same request under the same key is carried out once.",
        ));
    }
    if *method == Method::PUT {
        headers.push((
            "If-Match",
            "The ETag that was read: refused with 412 when the resource has changed since.",
        ));
    }
    for (name, description) in headers {
        let parameter = ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(description))
            .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
            .build();
        operation
            .parameters
            .get_or_insert_with(Vec::new)
            .push(RefOr::T(parameter));
    }
}

async fn route_not_found() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "route_not_found",
        "there is nothing at this path",
    )
    .mend("look the paths up at /docs")
}

async fn method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this path does not take this method",
    )
    .mend("the header `Allow` names those that it takes")
}
