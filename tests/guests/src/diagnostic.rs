//! A diagnostic: by default one probe; parameters choose what goes wrong.

use windlass_sdk::{
    Descriptor, Diagnostic, PluginError,
    diagnosis::{DiagnosisRequest, Finding, FindingState, Host, Report},
};

use crate::{
    behave::{behave, how},
    descriptor::{IsDiagnostic, describe},
};

/// The guest.
#[derive(Debug)]
pub struct Looker;

impl Diagnostic for Looker {
    fn describe() -> Descriptor {
        describe("test-diagnostic", IsDiagnostic::Yes)
    }

    fn diagnose(request: DiagnosisRequest, host: &dyn Host) -> Result<Report, PluginError> {
        let how = how(&request.parameters);
        behave(&how);
        let looks = if how == "probe-for-ever" {
            1_000_000
        } else {
            1
        };
        let mut seen = String::new();
        for _ in 0..looks {
            seen = match host.run(&request.subject.id, "disk", &[], 1000) {
                Ok(answer) => answer.data,
                Err(error) => error.code,
            };
        }
        Ok(Report::new(
            "looked",
            vec![Finding::new("probe", FindingState::Ok, seen)],
        ))
    }
}

windlass_sdk::diagnostic!(Looker);
