//! `/v1/workspaces/{ws}/certificates`: chains for HTTPS listeners. Their keys go in and never come out.

use axum::{extract::State, http::HeaderMap};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{certificate::Certificate, id::CertificateId};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of},
    reply::{self, Page, Reply},
    tokens::ListQuery,
    workspaces::Confirm,
};
use crate::service::{Caller, certificates::CreateCertificate};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 50,
};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(create_certificate, list_certificates))
        .routes(routes!(get_certificate, delete_certificate))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/certificates", operation_id = "create_certificate", tag = "certificates",
    params(("ws" = String, Path, description = "The workspace's identifier.")),
    request_body = CreateCertificate, responses((status = 201, description = "Checked and kept; the key is sealed and never shown.", body = Certificate)))]
async fn create_certificate(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<CreateCertificate>,
) -> Reply {
    let made = api.certificates.create(caller, &ws, body).await?;
    let location = format!("/v1/workspaces/{ws}/certificates/{}", made.0.id);
    Ok(reply::created(&location, made))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/certificates", operation_id = "list_certificates", tag = "certificates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListQuery),
    responses((status = 200, description = "Oldest first.", body = Page<Certificate>)))]
async fn list_certificates(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListQuery>,
) -> Reply {
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(api.certificates.list(&ws, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/certificates/{id}", operation_id = "get_certificate", tag = "certificates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = CertificateId, Path, description = "The certificate's id.")),
    responses((status = 200, description = "The certificate.", body = Certificate)))]
async fn get_certificate(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, CertificateId)>,
    headers: HeaderMap,
) -> Reply {
    let found = api.certificates.get(&ws, id).await?;
    Ok(reply::found_unless(&headers, found))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/certificates/{id}", operation_id = "delete_certificate", tag = "certificates",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = CertificateId, Path, description = "The certificate's id."), Confirm),
    responses((status = 204, description = "Deleted, with its key.")))]
async fn delete_certificate(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, CertificateId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    api.certificates
        .delete(caller, &ws, id, &query.confirm)
        .await?;
    Ok(reply::nothing())
}
