//! Diagnoses: a diagnostic plugin that looked at something, and what it found. Source: spec "Diagnostics (plugins)".
//!
//! ```text
//!  running ──► succeeded   the plugin answered a report, whatever it found
//!     └──────► failed      it did not: refused, trapped, over its time, cut off by a restart (`interrupted`)
//! ```
//! A terminal state is never left. Whether the *subject* is well is the verdict, not the state.

use serde::{Deserialize, Serialize};

use crate::{
    digest::Digest,
    id::DiagnosisId,
    manifest::PluginRef,
    name::WorkspaceName,
    plugin::{DiagnosticItem, Finding, FindingState, Report, Severity},
    time::Timestamp,
};

/// One run of a diagnostic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Diagnosis {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: DiagnosisId,
    /// The workspace it was made in: it sees nothing beyond.
    pub workspace: WorkspaceName,
    /// The plugin, with the bytes that ran.
    pub plugin: PluginRef,
    /// What was looked at.
    pub subject: Subject,
    /// Parameters of the plugin.
    pub parameters: serde_json::Value,
    /// Codes of the items that were asked for; empty: all.
    #[serde(default)]
    pub items: Vec<String>,
    /// Where it is.
    pub state: DiagnosisState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<DiagnosisFailure>,
    /// The verdict, once it succeeded: the plugin's own, or `ok`, `warning`, `failed`, `unknown` by [`verdict`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// One line.
    #[serde(default)]
    pub summary: String,
    /// How many items are in which state.
    #[serde(default)]
    pub counts: FindingCounts,
    /// The blob with the [`DiagnosisRecord`], once it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Digest>,
    /// Who asked.
    pub created_by: String,
    /// When it was asked for, which is when it started.
    pub created_at: Timestamp,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

impl Diagnosis {
    /// The schema version that this program writes.
    pub const SCHEMA: u32 = 1;
}

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// `server`, `service-instance`, `order`, `path` or `operation`.
    pub kind: String,
    /// Its id; for a path and an operation a name of the caller's choice.
    pub id: String,
    /// For a path: `source` (a server's id), `target`, `protocol`, `port`. For an operation: what failed, and how. For others
    /// the platform fills in what it knows.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub data: serde_json::Value,
}

/// Where a diagnosis is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiagnosisState {
    /// It looks.
    Running,
    /// There is a report.
    Succeeded,
    /// There is none.
    Failed,
}

impl DiagnosisState {
    /// Whether it ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Running => false,
            Self::Succeeded | Self::Failed => true,
        }
    }
}

/// Why there is no report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiagnosisFailure {
    /// `interrupted`, or the code of the plugin's failure.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What to do.
    pub mend: String,
}

/// How many items are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct FindingCounts {
    /// Good.
    pub ok: u32,
    /// Could become bad.
    pub warning: u32,
    /// Bad.
    pub failed: u32,
    /// Could not be looked at.
    pub skipped: u32,
}

/// What is kept of a diagnosis beside its row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiagnosisRecord {
    /// The items, in the order of the plugin's descriptor.
    pub items: Vec<ReportedItem>,
    /// Every look at the platform, in order.
    pub looks: Vec<Look>,
}

/// One item of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReportedItem {
    /// Code of the item.
    pub code: String,
    /// One line for people.
    pub title: String,
    /// Whether it decides the verdict.
    pub severity: Severity,
    /// Its state.
    pub state: FindingState,
    /// What was seen.
    pub seen: String,
    /// What to do.
    pub suggestion: String,
}

/// One look of a diagnostic, with what it was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Look {
    /// The host function, for example `probes.run`.
    pub function: String,
    /// Its arguments.
    pub arguments: serde_json::Value,
    /// `{"ok": …}` or `{"error": {"code", "message"}}`; `null` where it was left out because the record had grown too large.
    pub answer: serde_json::Value,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
}

/// The items of a report with what the descriptor says of them. Wanted items that the plugin left out are `skipped`; findings
/// that no descriptor knows stand at the end and decide nothing.
#[must_use]
pub fn reported(known: &[DiagnosticItem], wanted: &[String], report: Report) -> Vec<ReportedItem> {
    let mut findings = report.findings;
    let mut items = Vec::new();
    for item in known {
        let found: Vec<Finding> = findings
            .extract_if(.., |finding| finding.code == item.code)
            .collect();
        let is_wanted = wanted.is_empty() || wanted.contains(&item.code);
        if found.is_empty() && is_wanted {
            items.push(ReportedItem {
                code: item.code.clone(),
                title: item.title.clone(),
                severity: item.severity,
                state: FindingState::Skipped,
                seen: "the plugin said nothing of it".to_owned(),
                suggestion: String::new(),
            });
        }
        items.extend(found.into_iter().map(|finding| ReportedItem {
            title: item.title.clone(),
            severity: item.severity,
            code: finding.code,
            state: finding.state,
            seen: finding.seen,
            suggestion: finding.suggestion,
        }));
    }
    items.extend(findings.into_iter().map(|finding| ReportedItem {
        title: finding.code.clone(),
        severity: Severity::NonCritical,
        code: finding.code,
        state: finding.state,
        seen: finding.seen,
        suggestion: finding.suggestion,
    }));
    items
}

/// The verdict that follows from the critical items: `failed` when one is bad, else `unknown` when one could not be looked at,
/// else `warning` when one could become bad, else `ok`.
#[must_use]
pub fn verdict(items: &[ReportedItem]) -> &'static str {
    let any = |state: FindingState| {
        items
            .iter()
            .any(|item| item.severity == Severity::Critical && item.state == state)
    };
    if any(FindingState::Failed) {
        "failed"
    } else if any(FindingState::Skipped) {
        "unknown"
    } else if any(FindingState::Warning) {
        "warning"
    } else {
        "ok"
    }
}

/// Counts items by their state.
#[must_use]
pub fn counts(items: &[ReportedItem]) -> FindingCounts {
    let mut counts = FindingCounts::default();
    for item in items {
        match item.state {
            FindingState::Ok => counts.ok += 1,
            FindingState::Warning => counts.warning += 1,
            FindingState::Failed => counts.failed += 1,
            FindingState::Skipped => counts.skipped += 1,
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(code: &str, severity: Severity) -> DiagnosticItem {
        DiagnosticItem {
            code: code.to_owned(),
            title: format!("The {code}"),
            severity,
        }
    }

    fn finding(code: &str, state: FindingState) -> Finding {
        Finding {
            code: code.to_owned(),
            state,
            seen: String::new(),
            suggestion: String::new(),
        }
    }

    #[test]
    fn the_critical_items_decide() {
        use FindingState::{Failed, Ok, Skipped, Warning};
        for (critical, other, expect) in [
            (vec![Ok, Ok], vec![Failed], "ok"),
            (vec![Ok, Warning], vec![], "warning"),
            (vec![Warning, Skipped], vec![], "unknown"),
            (vec![Skipped, Failed], vec![Ok], "failed"),
            (vec![], vec![Failed], "ok"),
        ] {
            let of = |states: &[FindingState], severity| {
                states
                    .iter()
                    .map(|state| ReportedItem {
                        code: "x".into(),
                        title: "x".into(),
                        severity,
                        state: *state,
                        seen: String::new(),
                        suggestion: String::new(),
                    })
                    .collect::<Vec<_>>()
            };
            let mut items = of(&critical, Severity::Critical);
            items.extend(of(&other, Severity::NonCritical));
            assert_eq!(verdict(&items), expect, "{critical:?} {other:?}");
        }
    }

    #[test]
    fn what_was_left_out_is_skipped_and_what_nobody_knows_decides_nothing() {
        let known = [
            item("disk", Severity::Critical),
            item("dns", Severity::NonCritical),
            item("load", Severity::Critical),
        ];
        let report = || Report {
            summary: String::new(),
            findings: vec![
                finding("surprise", FindingState::Failed),
                finding("dns", FindingState::Warning),
                finding("disk", FindingState::Ok),
            ],
        };
        let seen = |items: &[ReportedItem]| {
            items
                .iter()
                .map(|item| (item.code.clone(), item.severity, item.state))
                .collect::<Vec<_>>()
        };
        let all = reported(&known, &[], report());
        assert_eq!(
            seen(&all),
            [
                ("disk".to_owned(), Severity::Critical, FindingState::Ok),
                (
                    "dns".to_owned(),
                    Severity::NonCritical,
                    FindingState::Warning
                ),
                ("load".to_owned(), Severity::Critical, FindingState::Skipped),
                (
                    "surprise".to_owned(),
                    Severity::NonCritical,
                    FindingState::Failed
                ),
            ]
        );
        assert_eq!(verdict(&all), "unknown");
        assert_eq!(counts(&all).failed, 1);
        let some = reported(&known, &["disk".to_owned(), "dns".to_owned()], report());
        assert_eq!(some.len(), 3, "load was not asked for");
    }
}
