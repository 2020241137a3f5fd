//! The judgement: from what the load balancers counted to go on, hold, roll back, or extend.
//!
//! The first rule that fits:
//!
//! 1. A server of the application failed its release: bad.
//! 2. A server that runs the new version is not connected: hold. Its figures are not to be relied on, and what is wrong is
//!    not known to be the release.
//! 3. With at least `min_requests` on the new version: more errors than `max_error_percent`, or a higher mean latency than
//!    `max_latency_ms`: bad, whatever the old version does.
//! 4. Below 100 %, with at least `min_requests` on either side: more errors than the old version's by more than
//!    `max_error_increase_pp`, or a latency of more than `max_latency_ratio` times its: bad.
//! 5. Too few requests for that: extend, up to `max_windows` windows; then hold. Never go on.
//! 6. Go on.
//!
//! Bad is `roll back`, or `hold` where the parameters say so.

use windlass_sdk::{
    PluginError, parse_parameters,
    strategy::{JudgeRequest, Judgement, Verdict},
};

use crate::parameters::{OnBad, Parameters};

/// A latency above the old version's by less than this is noise.
const LATENCY_NOISE_MS: f64 = 5.0;

/// The name of a judgement. Names of applications hold no blanks.
pub(crate) fn stage(application: &str, percent: u32) -> String {
    format!("{application} {percent}")
}

/// What the servers of one version did together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Version {
    servers: u32,
    requests: f64,
    errors: f64,
    /// Sum over servers whose latency is known.
    latency_ms_times_requests: f64,
    timed_requests: f64,
}

impl Version {
    fn error_percent(&self) -> f64 {
        if self.requests > 0.0 {
            100.0 * self.errors / self.requests
        } else {
            0.0
        }
    }

    fn latency_ms(&self) -> Option<f64> {
        (self.timed_requests > 0.0).then(|| self.latency_ms_times_requests / self.timed_requests)
    }
}

/// What was observed of one server.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    released: bool,
    failed: bool,
    online: bool,
    requests: f64,
    errors: f64,
    latency_ms: Option<f64>,
}

pub(crate) fn judge(request: &JudgeRequest) -> Result<Judgement, PluginError> {
    let parameters: Parameters = parse_parameters(&request.parameters)?;
    let known = request
        .stage
        .split_once(' ')
        .and_then(|(application, percent)| Some((application, percent.parse::<u32>().ok()?)));
    let Some((application, percent)) = known else {
        return Err(PluginError::unsupported(format!(
            "the stage `{}` is not one of this strategy",
            request.stage
        )));
    };
    let mut servers: std::collections::BTreeMap<&str, Seen> = std::collections::BTreeMap::new();
    let mut windows = 1.0_f64;
    for seen in &request.observations {
        if seen.application.is_empty() && seen.metric == "judge.windows" {
            windows = seen.value;
        }
        if seen.application != application || seen.server.is_empty() {
            continue;
        }
        let server = servers.entry(&seen.server).or_default();
        match seen.metric.as_str() {
            "unit.released" => server.released = seen.value > 0.0,
            "unit.failed" => server.failed = seen.value > 0.0,
            "agent.online" => server.online = seen.value > 0.0,
            "pool.requests" => server.requests = seen.value,
            "pool.errors" => server.errors = seen.value,
            "pool.latency-ms" => server.latency_ms = Some(seen.value),
            // The contract: others may come.
            _ => {}
        }
    }
    Ok(decide(&parameters, percent, windows, servers.values()))
}

fn decide<'a>(
    parameters: &Parameters,
    percent: u32,
    windows: f64,
    servers: impl Iterator<Item = &'a Seen>,
) -> Judgement {
    let (mut new, mut old) = (Version::default(), Version::default());
    let (mut failed, mut away) = (0, 0);
    for seen in servers {
        failed += u32::from(seen.failed);
        away += u32::from(seen.released && !seen.online);
        let version = if seen.released { &mut new } else { &mut old };
        version.servers += 1;
        version.requests += seen.requests;
        version.errors += seen.errors;
        if let Some(latency) = seen.latency_ms {
            version.latency_ms_times_requests += latency * seen.requests;
            version.timed_requests += seen.requests;
        }
    }
    let bad = |reason: String| {
        let verdict = match parameters.on_bad {
            OnBad::RollBack => Verdict::RollBack,
            OnBad::Hold => Verdict::Hold,
        };
        Judgement::new(verdict, &reason)
    };
    if failed > 0 {
        return bad(format!("{failed} servers failed their release"));
    }
    if away > 0 {
        return Judgement::new(
            Verdict::Hold,
            &format!(
                "{away} servers of the new version are not connected: look at them, then confirm or roll back"
            ),
        );
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of requests are far below 2^52"
    )]
    let enough = parameters.min_requests as f64;
    if new.requests >= enough {
        let errors = new.error_percent();
        if errors > parameters.max_error_percent {
            return bad(format!(
                "{errors:.2} % of {} requests to the new version failed; at most {} % may",
                new.requests, parameters.max_error_percent
            ));
        }
        if let (Some(latency), Some(most)) = (new.latency_ms(), parameters.max_latency_ms)
            && latency > most
        {
            return bad(format!(
                "the new version answers in {latency:.1} ms on average; at most {most} ms are allowed"
            ));
        }
    }
    let compares = percent < 100 && old.servers > 0;
    if compares && new.requests >= enough && old.requests >= enough {
        let (errors, before) = (new.error_percent(), old.error_percent());
        if errors - before > parameters.max_error_increase_pp {
            return bad(format!(
                "{errors:.2} % of the requests to the new version failed, and {before:.2} % of those to the old one: at most \
                 {} points more are allowed",
                parameters.max_error_increase_pp
            ));
        }
        if let (Some(latency), Some(before)) = (new.latency_ms(), old.latency_ms())
            && latency > before * parameters.max_latency_ratio
            && latency - before > LATENCY_NOISE_MS
        {
            return bad(format!(
                "the new version answers in {latency:.1} ms on average, the old one in {before:.1} ms: at most {} times as \
                 long is allowed",
                parameters.max_latency_ratio
            ));
        }
    }
    if new.requests < enough || (compares && old.requests < enough) {
        let seen = format!(
            "{} requests to the new version and {} to the old one in {windows} windows; {} are needed of each that is judged",
            new.requests, old.requests, parameters.min_requests
        );
        return if windows < f64::from(parameters.max_windows) {
            Judgement::new(Verdict::Extend, &format!("{seen}: waiting for more"))
        } else {
            Judgement::new(Verdict::Hold, &format!("{seen}: a person decides"))
        };
    }
    Judgement::new(
        Verdict::GoOn,
        &format!(
            "{:.2} % of {} requests to the new version failed ({:.2} % of {} to the old one){}",
            new.error_percent(),
            new.requests,
            old.error_percent(),
            old.requests,
            new.latency_ms().map_or_else(String::new, |latency| format!(
                "; it answers in {latency:.1} ms on average"
            ))
        ),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use windlass_sdk::strategy::Observation;

    use super::*;

    /// Requests, errors and latency of the one server of a version.
    type Figures = (f64, f64, f64);

    fn seen(server: &str, metric: &str, value: f64) -> Observation {
        Observation {
            application: if server.is_empty() {
                String::new()
            } else {
                "shop".into()
            },
            server: server.into(),
            metric: metric.into(),
            value,
        }
    }

    fn request(parameters: &Value, percent: u32, new: Figures, old: Figures) -> JudgeRequest {
        let mut observations = vec![
            seen("", "judge.windows", 1.0),
            // Of another application: no concern of this one.
            Observation {
                application: "other".into(),
                ..seen("x", "unit.failed", 1.0)
            },
        ];
        for (server, released, (requests, errors, latency)) in
            [("new", 1.0, new), ("old", 0.0, old)]
        {
            observations.extend([
                seen(server, "unit.released", released),
                seen(server, "unit.failed", 0.0),
                seen(server, "agent.online", 1.0),
                seen(server, "weight", 100.0),
                seen(server, "pool.requests", requests),
                seen(server, "pool.errors", errors),
                seen(server, "pool.latency-ms", latency),
            ]);
        }
        JudgeRequest {
            stage: stage("shop", percent),
            parameters: parameters.to_string(),
            observations,
            attributes: Vec::new(),
        }
    }

    fn verdict(parameters: &Value, percent: u32, new: Figures, old: Figures) -> Verdict {
        judge(&request(parameters, percent, new, old))
            .unwrap()
            .verdict
    }

    const GOOD: Figures = (1000.0, 1.0, 20.0);

    #[test]
    fn figures_decide() {
        let none = json!({});
        for (what, new, old, expect) in [
            ("as good as the old one", GOOD, GOOD, Verdict::GoOn),
            (
                "errors above the limit",
                (1000.0, 51.0, 20.0),
                (1000.0, 51.0, 20.0),
                Verdict::RollBack,
            ),
            (
                "errors at the limit, as the old one has",
                (1000.0, 50.0, 20.0),
                (1000.0, 50.0, 20.0),
                Verdict::GoOn,
            ),
            (
                "two points more errors",
                (1000.0, 21.0, 20.0),
                GOOD,
                Verdict::RollBack,
            ),
            (
                "fewer errors than the old one",
                (1000.0, 0.0, 20.0),
                (1000.0, 40.0, 20.0),
                Verdict::GoOn,
            ),
            (
                "more than twice as slow",
                (1000.0, 1.0, 41.0),
                GOOD,
                Verdict::RollBack,
            ),
            (
                "slower within the noise",
                (1000.0, 1.0, 5.5),
                (1000.0, 1.0, 1.0),
                Verdict::GoOn,
            ),
            (
                "too few requests to it",
                (99.0, 0.0, 20.0),
                GOOD,
                Verdict::Extend,
            ),
            ("none to it", (0.0, 0.0, 0.0), GOOD, Verdict::Extend),
            (
                "too few to the old one",
                GOOD,
                (99.0, 0.0, 20.0),
                Verdict::Extend,
            ),
            (
                "too few to the old one, and many errors",
                (1000.0, 60.0, 20.0),
                (0.0, 0.0, 0.0),
                Verdict::RollBack,
            ),
        ] {
            assert_eq!(verdict(&none, 5, new, old), expect, "{what}");
        }
    }

    #[test]
    fn limits_can_be_set() {
        for (parameters, new, expect) in [
            (
                json!({ "max_error_percent": 0 }),
                (1000.0, 1.0, 20.0),
                Verdict::RollBack,
            ),
            (
                json!({ "max_error_increase_pp": 3 }),
                (1000.0, 21.0, 20.0),
                Verdict::GoOn,
            ),
            (json!({ "max_latency_ms": 19.5 }), GOOD, Verdict::RollBack),
            (
                json!({ "max_latency_ratio": 3 }),
                (1000.0, 1.0, 41.0),
                Verdict::GoOn,
            ),
            (json!({ "min_requests": 1001 }), GOOD, Verdict::Extend),
            (
                json!({ "on_bad": "hold" }),
                (1000.0, 500.0, 20.0),
                Verdict::Hold,
            ),
        ] {
            assert_eq!(verdict(&parameters, 5, new, GOOD), expect, "{parameters}");
        }
    }

    #[test]
    fn at_100_percent_there_is_nobody_to_compare_with() {
        let none = (0.0, 0.0, 0.0);
        assert_eq!(verdict(&json!({}), 100, GOOD, none), Verdict::GoOn);
        assert_eq!(
            verdict(&json!({}), 100, (1000.0, 51.0, 20.0), none),
            Verdict::RollBack
        );
        assert_eq!(verdict(&json!({}), 100, none, none), Verdict::Extend);
    }

    #[test]
    fn too_little_is_never_enough() {
        let few = (3.0, 0.0, 1.0);
        for (windows, expect) in [
            (1.0, Verdict::Extend),
            (4.0, Verdict::Extend),
            (5.0, Verdict::Hold),
            (9.0, Verdict::Hold),
        ] {
            let mut request = request(&json!({}), 25, few, GOOD);
            request.observations[0].value = windows;
            let judgement = judge(&request).unwrap();
            assert_eq!(judgement.verdict, expect, "{windows}: {}", judgement.reason);
        }
    }

    #[test]
    fn servers_count_before_figures() {
        for (server, metric, value, expect) in [
            ("old", "unit.failed", 1.0, Verdict::RollBack),
            ("new", "agent.online", 0.0, Verdict::Hold),
            // The old version's servers are not this release's concern.
            ("old", "agent.online", 0.0, Verdict::GoOn),
        ] {
            let mut request = request(&json!({}), 25, GOOD, GOOD);
            let found = request
                .observations
                .iter_mut()
                .find(|seen| seen.server == server && seen.metric == metric);
            found.unwrap().value = value;
            assert_eq!(
                judge(&request).unwrap().verdict,
                expect,
                "{server} {metric}"
            );
        }
    }

    #[test]
    fn a_stage_of_somebody_else_is_refused() {
        let mut request = request(&json!({}), 25, GOOD, GOOD);
        request.stage = "web-1".into();
        assert!(judge(&request).unwrap_err().message.contains("web-1"));
    }
}
