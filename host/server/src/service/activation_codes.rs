//! Activation codes: how servers arrive. Source: spec "Managed servers".
//!
//! A code is shown once, when it is made; the store holds the hash of its secret. Redeeming is [`super::servers`]'.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    activation::{ActivationCode, MAX_VALIDITY_H},
    id::ActivationCodeId,
    name::{CellName, NamePrefix, WorkspaceName},
    workspace::Workspace,
};
use windlass_protocol::Fingerprint;
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Sort},
};
use crate::{
    clock, ids,
    keys::{self, Kind},
};

/// Servers of a code unless said otherwise. Source: spec "Managed servers".
const DEFAULT_QUOTA: u32 = 10;
/// Validity of a code unless said otherwise, in hours.
const DEFAULT_VALIDITY_H: u32 = 4;

/// An activation code to be made.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateActivationCode {
    /// Start of the names of servers: `web-` gives `web-1`, `web-2`…; `server-` unless given.
    #[serde(default = "default_prefix")]
    pub name_prefix: NamePrefix,
    /// Cell that servers are put into; where the workspace has only one, that one.
    #[serde(default)]
    pub cell: Option<CellName>,
    /// Addresses or IPv4 networks that it may be used from; none: any.
    #[serde(default)]
    pub allowed_sources: Vec<String>,
    /// Servers that may register: 1 to 1000.
    #[serde(default = "default_quota")]
    pub quota: u32,
    /// Hours that it can be used: 1 to 24.
    #[serde(default = "default_validity_h")]
    pub validity_h: u32,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
}

fn default_prefix() -> NamePrefix {
    "server-".parse().expect("a valid prefix")
}

const fn default_quota() -> u32 {
    DEFAULT_QUOTA
}

const fn default_validity_h() -> u32 {
    DEFAULT_VALIDITY_H
}

/// An activation code as it may be seen: without the hash of its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActivationCodeView {
    /// Its id.
    pub id: ActivationCodeId,
    /// Workspace that servers register into.
    pub workspace: WorkspaceName,
    /// Start of the names of servers.
    pub name_prefix: NamePrefix,
    /// Cell that servers are put into.
    pub cell: Option<CellName>,
    /// Where it may be used from; empty: anywhere.
    pub allowed_sources: Vec<String>,
    /// How many servers may register.
    pub quota: u32,
    /// How many have.
    pub used: u32,
    /// Until when it can be used.
    pub expires_at: Timestamp,
    /// Description.
    pub description: String,
    /// No longer usable, by hand.
    pub disabled: bool,
    /// When it was made.
    pub created_at: Timestamp,
}

impl From<&ActivationCode> for ActivationCodeView {
    fn from(code: &ActivationCode) -> Self {
        Self {
            id: code.id,
            workspace: code.workspace.clone(),
            name_prefix: code.name_prefix.clone(),
            cell: code.cell.clone(),
            allowed_sources: code.allowed_sources.clone(),
            quota: code.quota,
            used: code.used,
            expires_at: code.expires_at,
            description: code.description.clone(),
            disabled: code.disabled,
            created_at: code.created_at,
        }
    }
}

/// A code that was just made.
#[derive(Debug, Clone)]
pub struct NewActivationCode {
    /// The record.
    pub record: ActivationCode,
    /// The code: shown now and never again. `Debug` hides its secret.
    pub code: windlass_protocol::ActivationCode,
}

/// Activation codes. Cheap to clone.
#[derive(Clone)]
pub struct ActivationCodes {
    store: Arc<dyn Store>,
    fingerprint: Fingerprint,
}

impl ActivationCodes {
    /// Over a store; codes carry the platform's fingerprint.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, fingerprint: Fingerprint) -> Self {
        Self { store, fingerprint }
    }

    /// One code of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(
        &self,
        ws: &str,
        id: ActivationCodeId,
    ) -> Result<(ActivationCode, Revision), ServiceError> {
        let (code, revision) =
            records::get::<ActivationCode>(&*self.store, &id.to_string()).await?;
        if code.workspace.as_str() == ws {
            Ok((code, revision))
        } else {
            Err(ServiceError::not_found("activation code", id))
        }
    }

    /// A page of a workspace's codes, newest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        page: PageRequest,
    ) -> Result<PageOf<(ActivationCode, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Activation, ws);
        records::list(
            &*self.store,
            &prefix,
            Sort::Falling,
            &page,
            |_: &ActivationCode| true,
        )
        .await
    }

    /// Makes a code. The idempotency record does not hold it: it is shown once.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] of the workspace; fields that break a rule.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateActivationCode,
    ) -> Result<(NewActivationCode, Revision), ServiceError> {
        if !(1..=MAX_VALIDITY_H).contains(&request.validity_h) {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: "validity_h".to_owned(),
                message: format!(
                    "an activation code is valid for 1 to {MAX_VALIDITY_H} hours, {} are asked for",
                    request.validity_h
                ),
                limit: u64::from(MAX_VALIDITY_H),
                current: u64::from(request.validity_h),
                mend: "ask for fewer hours, and make another code later".to_owned(),
            });
        }
        let store = &*self.store;
        let id = ActivationCodeId::from_uuid(ids::new_uuid());
        let code = windlass_protocol::ActivationCode::new(ids::random_bytes(), self.fingerprint);
        let show = |new: &NewActivationCode| {
            serde_json::to_value(ActivationCodeView::from(&new.record))
                .expect("records have string keys")
        };
        records::change_showing(store, &caller, show, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            if let Some(cell) = &request.cell
                && workspace.cell(cell).is_none()
            {
                return Err(ServiceError::invalid(
                    "cell_unknown",
                    "cell",
                    format!("the workspace `{ws}` has no cell `{cell}`"),
                    "name one of its cells, or add the cell first",
                ));
            }
            let now = clock::now();
            let record = ActivationCode {
                schema: ActivationCode::SCHEMA,
                id,
                workspace: workspace.name,
                secret_hash: code.secret_hash(),
                name_prefix: request.name_prefix.clone(),
                cell: request.cell.clone(),
                allowed_sources: request.allowed_sources.clone(),
                quota: request.quota,
                used: 0,
                expires_at: now.plus_ms(u64::from(request.validity_h) * 3_600_000),
                description: request.description.clone(),
                disabled: false,
                created_at: now,
            };
            record.validate().map_err(ServiceError::of_value)?;
            let hash_key = keys::by_hash(Kind::Activation, record.secret_hash);
            let text = id.to_string();
            let txn = records::create(&record)?
                .and(records::refer(Kind::Workspace, ws))
                .absent(hash_key.clone())
                .put(hash_key, text.clone())
                .put(keys::of_workspace(Kind::Activation, ws, &text), "");
            let code = code.clone();
            Ok((txn, NewActivationCode { record, code }))
        })
        .await
    }

    /// Makes a code unusable for good.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], [`ServiceError::Changed`].
    pub async fn disable(
        &self,
        caller: Caller,
        ws: &str,
        id: ActivationCodeId,
        if_match: Option<Revision>,
    ) -> Result<(ActivationCode, Revision), ServiceError> {
        let show = |code: &ActivationCode| {
            serde_json::to_value(ActivationCodeView::from(code)).expect("records have string keys")
        };
        records::change_showing(&*self.store, &caller, show, || async {
            let (mut code, revision) = self.get(ws, id).await?;
            records::check_revision::<ActivationCode>(if_match, revision)?;
            code.disabled = true;
            Ok((records::replace(&code, revision)?, code))
        })
        .await
    }

    /// Deletes a code. Servers that came with it stay. No confirmation: it matters to nobody once it is gone.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: ActivationCodeId,
    ) -> Result<(), ServiceError> {
        let text = id.to_string();
        records::change(&*self.store, &caller, || async {
            let (code, revision) = self.get(ws, id).await?;
            let txn = records::remove(&code, revision)
                .delete(keys::by_hash(Kind::Activation, code.secret_hash))
                .delete(keys::of_workspace(Kind::Activation, ws, &text));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::service::{
        records::tests::{caller, memory_store},
        workspaces::{Workspaces, tests::request as workspace},
    };

    pub(crate) fn request(json: serde_json::Value) -> CreateActivationCode {
        serde_json::from_value(json).unwrap()
    }

    #[tokio::test]
    async fn limits_and_defaults() {
        let store = memory_store();
        Workspaces::new(store.clone())
            .create(caller(), workspace("prod"))
            .await
            .unwrap();
        let codes = ActivationCodes::new(store, Fingerprint::of_key(b"key"));
        let create = |json| codes.create(caller(), "prod", request(json));
        let (new, _) = create(serde_json::json!({"name_prefix": "web-"}))
            .await
            .unwrap();
        assert_eq!(new.record.quota, 10);
        let validity_ms = new.record.expires_at.since_ms(new.record.created_at);
        assert_eq!(validity_ms, 4 * 3_600_000);
        for (field, value, good) in [
            ("quota", 0.into(), false),
            ("quota", 1000.into(), true),
            ("quota", 1001.into(), false),
            ("validity_h", 0.into(), false),
            ("validity_h", 24.into(), true),
            ("validity_h", 25.into(), false),
            ("cell", serde_json::json!("cell-b"), true),
            ("cell", serde_json::json!("cell-c"), false),
            (
                "allowed_sources",
                serde_json::json!(["10.2.0.0/16", "::1"]),
                true,
            ),
            ("allowed_sources", serde_json::json!(["10.2.0.0/33"]), false),
        ] {
            let mut json = serde_json::json!({"name_prefix": "web-"});
            json[field] = value;
            let text = json.to_string();
            assert_eq!(create(json).await.is_ok(), good, "{text}");
        }
    }

    #[tokio::test]
    async fn nothing_that_is_kept_shows_the_code() {
        let store = memory_store();
        let workspaces = Workspaces::new(store.clone());
        workspaces
            .create(caller(), workspace("prod"))
            .await
            .unwrap();
        let codes = ActivationCodes::new(store.clone(), Fingerprint::of_key(b"key"));
        let idempotency = crate::service::idempotency::Idempotency::new(store.clone());
        let token = windlass_domain::id::TokenId::from_uuid(uuid::Uuid::nil());
        let begun = idempotency
            .begin(token, "k", windlass_domain::Digest::of(b""))
            .await
            .unwrap();
        let crate::service::idempotency::Begun::New(with) = begun else {
            panic!("{begun:?}");
        };
        let who = Caller { with, ..caller() };
        let json = serde_json::json!({"name_prefix": "web-"});
        let (new, _) = codes.create(who, "prod", request(json)).await.unwrap();
        let printed = new.code.print();
        let secret = &printed[4..36];
        let rows = store
            .scan(&windlass_store::Prefix::everything(), None, 1000)
            .await
            .unwrap();
        assert!(rows.entries.iter().all(|entry| {
            let text = String::from_utf8_lossy(&entry.value);
            !text.contains(secret)
        }));
        let id = new.record.id;
        assert!(
            codes
                .disable(caller(), "prod", id, None)
                .await
                .unwrap()
                .0
                .disabled
        );
        assert!(codes.get("other", id).await.is_err());
        codes.delete(caller(), "prod", id).await.unwrap();
        workspaces.delete(caller(), "prod", "prod").await.unwrap();
    }
}
