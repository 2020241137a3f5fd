//! Diagnostics.

use windlass_domain::plugin::{DiagnosisRequest, Finding, FindingState, Report};

use crate::bindings::diagnostic::exports::windlass::plugin::diagnosis as wit;

pub(crate) fn request_to_guest(request: &DiagnosisRequest) -> wit::DiagnosisRequest {
    wit::DiagnosisRequest {
        subject: wit::Subject {
            kind: request.subject.kind.clone(),
            id: request.subject.id.clone(),
            data: request.subject.data.to_string(),
        },
        parameters: request.parameters.to_string(),
        items: request.items.clone(),
        attributes: Vec::new(),
    }
}

/// The report, and the verdict where the plugin gave one.
pub(crate) fn report_from_guest(report: wit::Report) -> (Report, Option<String>) {
    let findings = report
        .findings
        .into_iter()
        .map(|finding| Finding {
            code: finding.code,
            state: match finding.state {
                wit::FindingState::Ok => FindingState::Ok,
                wit::FindingState::Warning => FindingState::Warning,
                wit::FindingState::Failed => FindingState::Failed,
                wit::FindingState::Skipped => FindingState::Skipped,
            },
            seen: finding.seen,
            suggestion: finding.suggestion,
        })
        .collect();
    let summary = report.summary;
    (Report { summary, findings }, report.verdict)
}
