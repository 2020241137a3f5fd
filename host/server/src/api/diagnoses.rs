//! `/v1/workspaces/{ws}/diagnoses`: have a diagnostic look, read what it found and what it looked at.

use std::time::Duration;

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
};
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    diagnosis::{Diagnosis, DiagnosisState, Look, ReportedItem},
    id::DiagnosisId,
};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of},
    problem::Problem,
    reply::{self, Page, Reply},
};
use crate::service::{
    Caller,
    diagnoses::{CreateDiagnosis, DiagnosisFilter},
};

const PAGES: PageLimits = PageLimits {
    default: 20,
    max: 100,
};
/// The longest that a request waits for an end, in seconds.
pub(super) const MAX_WAIT_S: u64 = 60;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_diagnosis, list_diagnoses))
        .routes(routes!(get_diagnosis))
        .routes(routes!(list_diagnosis_looks))
}

/// How long to wait for the end.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitQuery {
    /// Answer when it has ended, or after so many seconds: 0 to 60, 0 unless given.
    #[serde(default)]
    wait_s: u64,
}

impl WaitQuery {
    /// The wait, within its bounds.
    pub(super) fn wait(&self) -> Result<Duration, Problem> {
        if self.wait_s > MAX_WAIT_S {
            return Err(Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "out_of_limit",
                format!(
                    "a request waits for at most {MAX_WAIT_S} seconds, {} were asked for",
                    self.wait_s
                ),
            )
            .field("wait_s")
            .limit(MAX_WAIT_S, self.wait_s)
            .mend("wait for less, and ask again"));
        }
        Ok(Duration::from_secs(self.wait_s))
    }
}

/// Which diagnoses.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListDiagnoses {
    /// Only in this state.
    state: Option<DiagnosisState>,
    /// Only of the subject with this id.
    subject: Option<String>,
    /// Entries of the page: 1 to 100, 20 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

/// A diagnosis with its report.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct DiagnosisDetails {
    /// As in the list.
    #[serde(flatten)]
    diagnosis: Diagnosis,
    /// The items of the report; empty while there is none.
    findings: Vec<ReportedItem>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/diagnoses", operation_id = "create_diagnosis", tag = "diagnoses",
    params(("ws" = String, Path, description = "The workspace's identifier."), WaitQuery),
    request_body = CreateDiagnosis, responses((status = 201, description = "Made; it runs in the background. With `wait_s` the answer comes when it has ended.", body = Diagnosis)))]
async fn create_diagnosis(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(query): Query<WaitQuery>,
    Json(body): Json<CreateDiagnosis>,
) -> Reply {
    let wait = query.wait()?;
    let mut made = api.diagnoses.create(caller, &ws, body).await?;
    if !wait.is_zero() {
        made = api.diagnoses.wait(&ws, made.0.id, wait).await?;
    }
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/diagnoses/{}", made.0.id),
        made,
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/diagnoses", operation_id = "list_diagnoses", tag = "diagnoses",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListDiagnoses),
    responses((status = 200, description = "Newest first. Kept for 30 days.", body = Page<Diagnosis>)))]
async fn list_diagnoses(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListDiagnoses>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let filter = DiagnosisFilter {
        state: query.state,
        subject: query.subject,
    };
    Ok(reply::page(api.diagnoses.list(&ws, &filter, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/diagnoses/{id}", operation_id = "get_diagnosis", tag = "diagnoses",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = DiagnosisId, Path, description = "The diagnosis's id."), WaitQuery),
    responses((status = 200, description = "The diagnosis with the items of its report.", body = DiagnosisDetails)))]
async fn get_diagnosis(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, DiagnosisId)>,
    Query(query): Query<WaitQuery>,
    headers: HeaderMap,
) -> Reply {
    let (diagnosis, revision) = api.diagnoses.wait(&ws, id, query.wait()?).await?;
    let findings = api.diagnoses.record(&ws, id).await?.items;
    let details = DiagnosisDetails {
        diagnosis,
        findings,
    };
    Ok(reply::found_unless(&headers, (details, revision)))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/diagnoses/{id}/looks", operation_id = "list_diagnosis_looks", tag = "diagnoses",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = DiagnosisId, Path, description = "The diagnosis's id.")),
    responses((status = 200, description = "Every look of the plugin at the platform, with its answer, on one page, in order.", body = Page<Look>)))]
async fn list_diagnosis_looks(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, DiagnosisId)>,
) -> Reply {
    let items = api.diagnoses.record(&ws, id).await?.looks;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items,
            next_cursor: None,
        },
    ))
}
