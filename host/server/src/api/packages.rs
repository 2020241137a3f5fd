//! `/v1/workspaces/{ws}/packages` and the records of their uploads.
//!
//! An upload is the raw file as body, streamed through: the limit is the workspace's. A client that sends nothing for
//! [`CHUNK_TIMEOUT`] is given up. Whatever goes wrong, nothing of the file is left; the upload's record says why.

use std::time::Duration;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use utoipa_axum::{router::OpenApiRouter, routes};
use windlass_domain::{
    Digest,
    id::{PackageId, UploadId},
    name::{FileName, PackageVersion},
    order::Order,
    package::{Package, UploadRecord},
};

use super::{
    Api,
    extract::{Json, PageLimits, Path, Query, page_of, read_rest},
    problem::Problem,
    reply::{self, Page, Reply},
    workspaces::Confirm,
};
use crate::service::{
    Caller,
    orders::ReleasePackage,
    packages::{
        BeginUpload, DeletedPackage, DeletedUploads, OverviewFilter, PackageFilter,
        PackageOverview, Upload,
    },
};

const PAGES: PageLimits = PageLimits {
    default: 10,
    max: 50,
};
/// How long a client may send nothing.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(60);
/// The header that promises the file's digest.
const SHA256: &str = "x-content-sha256";

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(upload_package, list_packages, delete_packages))
        .routes(routes!(get_package, delete_package))
        .routes(routes!(release_package))
        .routes(routes!(list_uploads, delete_uploads))
        .routes(routes!(delete_upload))
        .routes(routes!(get_package_overview))
}

/// What is uploaded.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct UploadPackage {
    /// The application's id or name.
    app: String,
    /// Version: unique for the application in the workspace. Without one, the version is made from date and time in UTC, such
    /// as `20261201-143005`, with a suffix where that is taken.
    version: Option<PackageVersion>,
    /// The file's name. Content and name together decide what the file is.
    file_name: FileName,
    /// What the file is, where content and name should not decide.
    kind: Option<PackageKind>,
    /// Remark, at most 500 characters.
    #[serde(default)]
    remark: String,
}

/// What an uploaded file is.
#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum PackageKind {
    /// An archive that servers unpack: tar (plain, gz, xz, zst, bz2) or zip.
    Archive,
    /// A jar, war or ear. It stays one file.
    Jar,
    /// Any file. It stays as it is and is executable.
    File,
}

impl From<PackageKind> for windlass_archive::Kind {
    fn from(kind: PackageKind) -> Self {
        match kind {
            PackageKind::Archive => Self::Archive,
            PackageKind::Jar => Self::Jar,
            PackageKind::File => Self::File,
        }
    }
}

/// Which packages or uploads.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListPackages {
    /// Of this application, by id or name.
    app: Option<String>,
    /// Version contains this, in any case.
    version: Option<String>,
    /// Entries of the page: 1 to 50, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/packages", operation_id = "upload_package", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), UploadPackage,
        ("X-Content-Sha256" = Option<Digest>, Header, description = "The file's SHA-256: an upload that differs is refused.")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The file."),
    responses((status = 201, description = "Uploaded and checked. With an idempotency key, the query, the promised digest and the length stand for the file.", body = Package),
        (status = 413, description = "The file exceeds the workspace's `package_limit_bytes`, or the workspace its `upload_quota_bytes`.", body = Problem),
        (status = 415, description = "The body is a form (`multipart/*` or `application/x-www-form-urlencoded`), not the file itself.", body = Problem),
        (status = 422, description = "Servers could not unpack the file (`package_refused`, with the entry or byte and the reason), or its content does not fit its name (`package_format`). Nothing of it is stored.", body = Problem),
        (status = 507, description = "The upload would leave too little free space on the platform's disk.", body = Problem)))]
async fn upload_package(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Query(query): Query<UploadPackage>,
    request: Request,
) -> Reply {
    let headers = request.headers();
    let text = |name: &str| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap_or_default())
    };
    let expected_digest = text(SHA256).map(|value| {
        value
            .to_ascii_lowercase()
            .parse::<Digest>()
            .map_err(|error| {
                Problem::bad_request("digest_invalid", error.to_string())
                    .field("X-Content-Sha256")
                    .mend("send the file's SHA-256 as 64 hexadecimal digits")
            })
    });
    let content_length = text(header::CONTENT_LENGTH.as_str()).and_then(|value| value.parse().ok());
    let (app, _) = api.apps.get(&query.app).await?;
    let begin = BeginUpload {
        version: query.version,
        file_name: query.file_name,
        kind: query.kind.map(Into::into),
        remark: query.remark,
        expected_digest: expected_digest.transpose()?,
        content_length,
    };
    let asks_first = headers.contains_key(header::EXPECT);
    let form = text(header::CONTENT_TYPE.as_str()).and_then(form_type);
    let mut body = request.into_body();
    if let Some(form) = form {
        let refused = form_refused(&form, &ws, &query.app, &begin);
        let recorded = api.packages.record_refused(
            caller,
            &ws,
            app.id,
            begin,
            &refused.code,
            refused.detail.clone(),
        );
        recorded.await?;
        if !asks_first {
            read_rest(&mut body).await;
        }
        return Err(refused);
    }
    let upload = match api.packages.begin(caller, &ws, app.id, begin).await {
        Ok(upload) => upload,
        Err(refused) => {
            if !asks_first {
                read_rest(&mut body).await;
            }
            return Err(refused.into());
        }
    };
    let made = receive(upload, body).await?;
    Ok(reply::created(
        &format!("/v1/workspaces/{ws}/packages/{}", made.0.id),
        made,
    ))
}

/// The media type of a body, where it is that of a form: then the body is not the file itself.
fn form_type(value: &str) -> Option<String> {
    let media = value.split(';').next().unwrap_or_default();
    let media = media.trim().to_ascii_lowercase();
    (media.starts_with("multipart/") || media == "application/x-www-form-urlencoded")
        .then(|| media.chars().take(60).collect())
}

fn form_refused(media: &str, ws: &str, app: &str, upload: &BeginUpload) -> Problem {
    let version = upload
        .version
        .as_ref()
        .map_or(String::new(), |version| format!("&version={version}"));
    let name = upload.file_name.as_str();
    Problem::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "package_media_type",
        format!("the body has the type `{media}`, which is that of a form; the file itself must be the body"),
    )
    .field("Content-Type")
    .mend(format!(
        "Send the file as it is: curl -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/octet-stream' \
         --data-binary @{name} \"$URL/v1/workspaces/{ws}/packages?app={app}{version}&file_name={name}\" \
         (`-F` and `-d` send forms, and `-d` removes line ends from the file)"
    ))
}

async fn receive(
    mut upload: Upload,
    mut body: Body,
) -> Result<(Package, windlass_store::Revision), Problem> {
    loop {
        match tokio::time::timeout(CHUNK_TIMEOUT, body.frame()).await {
            Ok(None) => return Ok(upload.finish().await?),
            Ok(Some(Ok(frame))) => {
                if let Ok(bytes) = frame.into_data()
                    && let Err(refused) = upload.write(bytes).await
                {
                    read_rest(&mut body).await;
                    return Err(refused.into());
                }
            }
            Ok(Some(Err(error))) => {
                upload
                    .abort(&format!("the connection broke: {error}"))
                    .await;
                return Err(
                    Problem::bad_request("package_truncated", "the upload broke off")
                        .field("body")
                        .mend("upload the file again"),
                );
            }
            Err(_) => {
                let reason = format!("nothing came for {} s", CHUNK_TIMEOUT.as_secs());
                upload.abort(&reason).await;
                return Err(
                    Problem::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", reason)
                        .field("body")
                        .mend("upload the file again"),
                );
            }
        }
    }
}

async fn filter(api: &Api, query: &ListPackages) -> Result<PackageFilter, Problem> {
    let app = match &query.app {
        Some(app) => Some(api.apps.get(app).await?.0.id),
        None => None,
    };
    Ok(PackageFilter {
        app,
        version: query.version.clone(),
    })
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/packages", operation_id = "list_packages", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListPackages),
    responses((status = 200, description = "Newest first.", body = Page<Package>)))]
async fn list_packages(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListPackages>,
) -> Reply {
    let filter = filter(&api, &query).await?;
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    Ok(reply::page(api.packages.list(&ws, &filter, page).await?))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/packages/{id}", operation_id = "get_package", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PackageId, Path, description = "The package's id.")),
    responses((status = 200, description = "The package.", body = Package)))]
async fn get_package(
    State(api): State<Api>,
    Path((ws, id)): Path<(String, PackageId)>,
    headers: HeaderMap,
) -> Reply {
    Ok(reply::found_unless(
        &headers,
        api.packages.get(&ws, id).await?,
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/packages/{id}", operation_id = "delete_package", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PackageId, Path, description = "The package's id."), Confirm),
    responses((status = 200, description = "Deleted; `confirm` is its version. The answer states by when the space on the disk is free. Refused while a service instance uses it, also by a release that is installed or kept for a rollback, or an order that has not ended.", body = DeletedPackage)))]
async fn delete_package(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PackageId)>,
    Query(query): Query<Confirm>,
) -> Reply {
    let deleted = api.packages.delete(caller, &ws, id, &query.confirm).await?;
    Ok(reply::json(StatusCode::OK, &deleted))
}

/// Packages to be deleted.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct DeletePackages {
    /// 1 to 100.
    packages: Vec<DeletePackage>,
}

/// One of them.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct DeletePackage {
    /// Which.
    id: PackageId,
    /// Its version.
    confirm: String,
}

/// What became of each.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct DeletedPackages {
    /// Deleted packages.
    deleted: Vec<PackageId>,
    /// The same packages, with the time by which their space is free.
    freed: Vec<DeletedPackage>,
    /// Not deleted.
    refused: Vec<RefusedPackage>,
}

/// A package that stays, and why.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct RefusedPackage {
    /// Which.
    id: PackageId,
    /// Stable code, as the deletion of one package has it: `in_use`, for example.
    code: String,
    /// Why, for people.
    detail: String,
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/packages", operation_id = "delete_packages", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = DeletePackages,
    responses((status = 200, description = "What became of each: one that is refused keeps no other from being deleted. See the deletion of one package.", body = DeletedPackages)))]
async fn delete_packages(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Json(body): Json<DeletePackages>,
) -> Reply {
    let asked: Vec<(PackageId, String)> = body
        .packages
        .into_iter()
        .map(|one| (one.id, one.confirm))
        .collect();
    let mut answer = DeletedPackages {
        deleted: Vec::new(),
        freed: Vec::new(),
        refused: Vec::new(),
    };
    for (id, outcome) in api.packages.delete_many(&ws, &asked).await? {
        match outcome {
            Ok(freed) => {
                answer.deleted.push(id);
                answer.freed.push(freed);
            }
            Err(error) => answer.refused.push(RefusedPackage {
                id,
                code: error.code().to_owned(),
                detail: error.to_string(),
            }),
        }
    }
    Ok(reply::json(StatusCode::OK, &answer))
}

#[utoipa::path(post, path = "/v1/workspaces/{ws}/packages/{id}/release", operation_id = "release_package", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = PackageId, Path, description = "The package's id.")),
    request_body = ReleasePackage,
    responses((status = 201, description = "A release order with all settings as they are by default; it runs.", body = Order)))]
async fn release_package(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, PackageId)>,
    Json(body): Json<ReleasePackage>,
) -> Reply {
    let order = api.orders.release_package(caller, &ws, id, body).await?;
    let location = format!("/v1/workspaces/{ws}/orders/{}", order.id);
    Ok(reply::made(&location, &order))
}

/// Which applications.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct ListOverview {
    /// Name or alias contains this, in any case.
    search: Option<String>,
    /// `true`: those that have packages here; `false`: those that have none.
    has_packages: Option<bool>,
    /// Entries of the page: 1 to 50, 10 unless given.
    page_size: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/package-overview", operation_id = "get_package_overview", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListOverview),
    responses((status = 200, description = "All applications with what they have of packages in the workspace, in the order in which they were made.", body = Page<PackageOverview>)))]
async fn get_package_overview(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListOverview>,
) -> Reply {
    let filter = OverviewFilter {
        search: query.search,
        has_packages: query.has_packages,
    };
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let found = api.packages.overview(&ws, &filter, page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: found.items,
            next_cursor: found.next,
        },
    ))
}

#[utoipa::path(get, path = "/v1/workspaces/{ws}/packages/uploads", operation_id = "list_uploads", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ListPackages),
    responses((status = 200, description = "Uploads with their outcome, newest first.", body = Page<UploadRecord>)))]
async fn list_uploads(
    State(api): State<Api>,
    Path(ws): Path<String>,
    Query(query): Query<ListPackages>,
) -> Reply {
    let filter = filter(&api, &query).await?;
    let page = page_of(query.page_size, query.cursor, PAGES)?;
    let found = api.packages.list_uploads(&ws, &filter, page).await?;
    Ok(reply::json(
        StatusCode::OK,
        &Page {
            items: found.items,
            next_cursor: found.next,
        },
    ))
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/packages/uploads/{id}", operation_id = "delete_upload", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier."), ("id" = UploadId, Path, description = "The upload's id.")),
    responses((status = 204, description = "The upload record was deleted. A package that the upload made stays.")))]
async fn delete_upload(
    State(api): State<Api>,
    caller: Caller,
    Path((ws, id)): Path<(String, UploadId)>,
) -> Reply {
    api.packages.delete_upload(caller, &ws, id).await?;
    Ok(reply::nothing())
}

/// Upload records to be deleted.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct DeleteUploads {
    /// Ids of upload records, 1 to 100.
    uploads: Vec<UploadId>,
}

#[utoipa::path(delete, path = "/v1/workspaces/{ws}/packages/uploads", operation_id = "delete_uploads", tag = "packages",
    params(("ws" = String, Path, description = "The workspace's identifier.")), request_body = DeleteUploads,
    responses((status = 200, description = "The upload records were deleted. Packages that uploads made stay.", body = DeletedUploads)))]
async fn delete_uploads(
    State(api): State<Api>,
    caller: Caller,
    Path(ws): Path<String>,
    Json(body): Json<DeleteUploads>,
) -> Reply {
    let deleted = api
        .packages
        .delete_uploads(caller, &ws, &body.uploads)
        .await?;
    Ok(reply::json(StatusCode::OK, &deleted))
}
