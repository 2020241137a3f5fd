//! What a diagnostic is asked and answers, and the host that it looks through.

use crate::PluginError;
pub use crate::bindings::diagnostic::{
    exports::windlass::plugin::diagnosis::{
        DiagnosisRequest, Finding, FindingState, Report, Subject,
    },
    windlass::plugin::{
        probes::{Connection, Endpoint, ProbeAnswer},
        resources::{MetricRange, Sample},
    },
};

/// What a diagnostic sees the world through: read-only. In a plugin the platform stands behind it; tests bring their own.
///
/// ```
/// use windlass_sdk::{PluginError, diagnosis::{Connection, Endpoint, Host, MetricRange, ProbeAnswer, Sample}};
///
/// /// For tests: its disks are full, and it knows nothing else.
/// struct Full;
///
/// fn unknown<T>() -> Result<T, PluginError> {
///     Err(PluginError::unsupported("not in this test"))
/// }
///
/// impl Host for Full {
///     fn available(&self, _: &str) -> Result<Vec<String>, PluginError> {
///         Ok(vec!["disk".into()])
///     }
///     fn run(&self, _: &str, _: &str, _: &[(String, String)], _: u64) -> Result<ProbeAnswer, PluginError> {
///         Ok(ProbeAnswer { data: r#"{"path":"/","used_percent":99}"#.into(), text: String::new(), attributes: Vec::new() })
///     }
///     fn connect(&self, _: &str, _: &Endpoint, _: u64) -> Result<Connection, PluginError> { unknown() }
///     fn read(&self, _: &str, _: &str) -> Result<String, PluginError> { unknown() }
///     fn find(&self, _: &str, _: &[(String, String)], _: u32) -> Result<Vec<String>, PluginError> { unknown() }
///     fn metrics(&self, _: &str, _: &str, _: &str, _: MetricRange) -> Result<Vec<Sample>, PluginError> { unknown() }
///     fn order_log(&self, _: &str, _: Option<u32>, _: u32) -> Result<String, PluginError> { unknown() }
/// }
///
/// assert!(Full.run("s1", "disk", &[], 1_000).unwrap().data.contains("99"));
/// ```
pub trait Host {
    /// Codes of the probes that exist for a server.
    ///
    /// # Errors
    /// `not-found`, `denied`.
    fn available(&self, server: &str) -> Result<Vec<String>, PluginError>;

    /// Runs a named read-only probe on a server.
    ///
    /// # Errors
    /// `unsupported`, `not-found`, `denied`, `timeout`, `limit-exceeded`.
    fn run(
        &self,
        server: &str,
        probe: &str,
        arguments: &[(String, String)],
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, PluginError>;

    /// Connects from a server to an address. An attempt that fails is an answer.
    ///
    /// # Errors
    /// As for `run`.
    fn connect(
        &self,
        from_server: &str,
        to: &Endpoint,
        timeout_ms: u64,
    ) -> Result<Connection, PluginError>;

    /// Reads a resource as the API shows it.
    ///
    /// # Errors
    /// `not-found`, `denied`.
    fn read(&self, kind: &str, id: &str) -> Result<String, PluginError>;

    /// Ids of resources that match.
    ///
    /// # Errors
    /// `unsupported`, `denied`.
    fn find(
        &self,
        kind: &str,
        filters: &[(String, String)],
        limit: u32,
    ) -> Result<Vec<String>, PluginError>;

    /// Points of a metric.
    ///
    /// # Errors
    /// `not-found`, `unsupported`, `denied`.
    fn metrics(
        &self,
        kind: &str,
        id: &str,
        metric: &str,
        range: MetricRange,
    ) -> Result<Vec<Sample>, PluginError>;

    /// The end of an order's log.
    ///
    /// # Errors
    /// `not-found`, `denied`.
    fn order_log(
        &self,
        order: &str,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Result<String, PluginError>;
}

/// The platform.
#[doc(hidden)]
#[derive(Debug)]
pub struct Platform;

impl Host for Platform {
    fn available(&self, server: &str) -> Result<Vec<String>, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::probes::available(server)
    }

    fn run(
        &self,
        server: &str,
        probe: &str,
        arguments: &[(String, String)],
        timeout_ms: u64,
    ) -> Result<ProbeAnswer, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::probes::run(
            server, probe, arguments, timeout_ms,
        )
    }

    fn connect(
        &self,
        from_server: &str,
        to: &Endpoint,
        timeout_ms: u64,
    ) -> Result<Connection, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::probes::connect(from_server, to, timeout_ms)
    }

    fn read(&self, kind: &str, id: &str) -> Result<String, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::resources::read(kind, id)
    }

    fn find(
        &self,
        kind: &str,
        filters: &[(String, String)],
        limit: u32,
    ) -> Result<Vec<String>, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::resources::find(kind, filters, limit)
    }

    fn metrics(
        &self,
        kind: &str,
        id: &str,
        metric: &str,
        range: MetricRange,
    ) -> Result<Vec<Sample>, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::resources::metrics(kind, id, metric, range)
    }

    fn order_log(
        &self,
        order: &str,
        node: Option<u32>,
        max_bytes: u32,
    ) -> Result<String, PluginError> {
        crate::bindings::diagnostic::windlass::plugin::resources::order_log(order, node, max_bytes)
    }
}

impl DiagnosisRequest {
    /// All items of one subject; for tests.
    ///
    /// ```
    /// # use windlass_sdk::diagnosis::DiagnosisRequest;
    /// let request = DiagnosisRequest::new("server", "s1", &serde_json::json!({}));
    /// assert!(request.wants("disk"), "all items, unless some are named");
    /// ```
    #[must_use]
    pub fn new(kind: &str, id: &str, parameters: &serde_json::Value) -> Self {
        Self {
            subject: Subject {
                kind: kind.into(),
                id: id.into(),
                data: "{}".into(),
            },
            parameters: parameters.to_string(),
            items: Vec::new(),
            attributes: Vec::new(),
        }
    }

    /// Whether an item is asked for.
    #[must_use]
    pub fn wants(&self, item: &str) -> bool {
        self.items.is_empty() || self.items.iter().any(|wanted| wanted == item)
    }
}

impl Finding {
    /// What was seen of an item.
    ///
    /// ```
    /// # use windlass_sdk::diagnosis::{Finding, FindingState};
    /// let finding = Finding::new("disk", FindingState::Failed, "/ is 99% full").suggest("Remove what is not needed.");
    /// assert_eq!(finding.state, FindingState::Failed);
    /// ```
    #[must_use]
    pub fn new(code: &str, state: FindingState, seen: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            state,
            seen: seen.into(),
            suggestion: String::new(),
            attributes: Vec::new(),
        }
    }

    /// With what to do.
    #[must_use]
    pub fn suggest(mut self, suggestion: &str) -> Self {
        self.suggestion = suggestion.into();
        self
    }
}

impl Report {
    /// A report of findings.
    ///
    /// ```
    /// # use windlass_sdk::diagnosis::{Finding, FindingState, Report};
    /// let report = Report::new("all is well", vec![Finding::new("disk", FindingState::Ok, "/ is 40% full")]);
    /// assert_eq!(report.verdict, None, "the host derives it from the critical items");
    /// ```
    #[must_use]
    pub fn new(summary: impl Into<String>, findings: Vec<Finding>) -> Self {
        Self {
            summary: summary.into(),
            verdict: None,
            findings,
            attributes: Vec::new(),
        }
    }
}
