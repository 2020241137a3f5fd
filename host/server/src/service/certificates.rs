//! Certificates for load balancers: checked when they come, their keys sealed, their end watched. Source: spec "Load balancers".
//!
//! A certificate never changes; another one is another record, to which listeners are changed. Its private key stands in a row
//! of its own, sealed by the gateway's vault, and is opened only on its way to the agent of a load balancer that shows it.

mod check;

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use windlass_domain::{
    certificate::Certificate,
    id::CertificateId,
    load_balancer::{Listener, Protocol},
    name::CertificateName,
    workspace::Workspace,
};
use windlass_protocol::SecretText;
use windlass_store::{Revision, Store};

use super::{
    Caller, PageOf, PageRequest, ServiceError,
    records::{self, Committed, Sort},
};
use crate::{
    clock,
    gateway::{
        events::{self, EventKind, EventLevel, SystemEvent},
        secrets::{SecretError, SecretVault},
    },
    ids,
    keys::{self, Kind},
};

/// How often certificates are looked at for their end.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// A certificate to be kept. `Debug` shows nothing of the key.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateCertificate {
    /// Name: unique in the workspace.
    pub name: CertificateName,
    /// The chain as PEM: the server's certificate first, then intermediates, each the issuer of the one before, without blank
    /// lines; without the root. At most 16,384 bytes.
    pub chain: String,
    /// The private key as PEM, PKCS#1 or PKCS#8, not encrypted. Never shown.
    #[schema(value_type = String, write_only)]
    pub private_key: SecretText,
}

/// Certificates. Cheap to clone.
#[derive(Clone)]
pub struct Certificates {
    store: Arc<dyn Store>,
    secrets: SecretVault,
}

impl Certificates {
    /// Over a store and the vault.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, secrets: SecretVault) -> Self {
        Self { store, secrets }
    }

    /// One certificate of a workspace.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`], also when it is another workspace's.
    pub async fn get(
        &self,
        ws: &str,
        id: CertificateId,
    ) -> Result<(Certificate, Revision), ServiceError> {
        let (certificate, revision) =
            records::get::<Certificate>(&*self.store, &id.to_string()).await?;
        if certificate.workspace.as_str() == ws {
            Ok((certificate, revision))
        } else {
            Err(ServiceError::not_found("certificate", id))
        }
    }

    /// A page of a workspace's certificates, oldest first.
    ///
    /// # Errors
    /// A page size or cursor that is not accepted; [`ServiceError::NotFound`] of the workspace.
    pub async fn list(
        &self,
        ws: &str,
        page: PageRequest,
    ) -> Result<PageOf<(Certificate, Revision)>, ServiceError> {
        records::get::<Workspace>(&*self.store, ws).await?;
        let prefix = keys::all_of_workspace(Kind::Certificate, ws);
        records::list(
            &*self.store,
            &prefix,
            Sort::Rising,
            &page,
            |_: &Certificate| true,
        )
        .await
    }

    /// Checks a chain and its key, and keeps them.
    ///
    /// # Errors
    /// `certificate_invalid`, `certificate_key_invalid`, `certificate_key_mismatch`, `certificate_expired`, `name_taken`;
    /// [`ServiceError::NotFound`] of the workspace.
    pub async fn create(
        &self,
        caller: Caller,
        ws: &str,
        request: CreateCertificate,
    ) -> Result<(Certificate, Revision), ServiceError> {
        let store = &*self.store;
        let now = clock::now();
        let checked = check::check(&request.chain, &request.private_key, now)?;
        let id = CertificateId::from_uuid(ids::new_uuid());
        records::change(store, &caller, || async {
            let (workspace, _) = records::get::<Workspace>(store, ws).await?;
            let name_key = keys::name_in_workspace(Kind::Certificate, ws, request.name.as_str());
            if records::indexed(store, &name_key).await?.is_some() {
                let name = request.name.as_str();
                return Err(ServiceError::taken("certificate", "name", name));
            }
            let certificate = Certificate {
                schema: Certificate::SCHEMA,
                id,
                name: request.name.clone(),
                workspace: workspace.name,
                chain: request.chain.trim_end().to_owned() + "\n",
                subject: checked.subject.clone(),
                issuer: checked.issuer.clone(),
                names: checked.names.clone(),
                not_before: checked.not_before,
                not_after: checked.not_after,
                warned_days: None,
                created_at: now,
            };
            let text = id.to_string();
            let key = keys::certificate_key(id);
            let sealed = self.secrets.seal(&key, &request.private_key);
            let txn = records::create(&certificate)?
                .and(records::refer(Kind::Workspace, ws))
                .put(key, sealed)
                .absent(name_key.clone())
                .put(name_key, text.clone())
                .put(keys::of_workspace(Kind::Certificate, ws, &text), "");
            Ok((txn, certificate))
        })
        .await
    }

    /// Deletes a certificate that no listener shows, with its key; `confirm` is its name.
    ///
    /// # Errors
    /// `in_use`, with the listeners; `confirmation_missing`; [`ServiceError::NotFound`].
    pub async fn delete(
        &self,
        caller: Caller,
        ws: &str,
        id: CertificateId,
        confirm: &str,
    ) -> Result<(), ServiceError> {
        let store = &*self.store;
        let text = id.to_string();
        records::change(store, &caller, || async {
            let (certificate, revision) = self.get(ws, id).await?;
            let name = certificate.name.as_str();
            records::check_confirm("certificate", confirm, name)?;
            let unused = records::unused(store, Kind::Certificate, &text).await?;
            let mut by = Vec::new();
            for entry in records::all(store, &keys::records(Kind::Listener)).await? {
                let listener: Listener = records::decode(&entry)?;
                if listener.settings.protocol == (Protocol::Https { certificate: id }) {
                    by.push(format!("listener {} ({})", listener.name, listener.id));
                }
            }
            if !by.is_empty() {
                return Err(ServiceError::in_use("certificate", name, &by));
            }
            let txn = records::remove(&certificate, revision)
                .and(unused)
                .delete(keys::certificate_key(id))
                .delete(keys::name_in_workspace(Kind::Certificate, ws, name))
                .delete(keys::of_workspace(Kind::Certificate, ws, &text));
            Ok((txn, ()))
        })
        .await?;
        Ok(())
    }

    /// Raises the events about ends that come near, until `stop`.
    pub async fn watch_ends(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if let Err(error) = self.raise_events().await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the ends of certificates were not looked at; they will be in an hour"
                );
            }
        }
    }

    /// Raises the events that are due now, each once.
    async fn raise_events(&self) -> Result<(), ServiceError> {
        let store = &*self.store;
        let now = clock::now();
        for entry in records::all(store, &keys::records(Kind::Certificate)).await? {
            let mut certificate: Certificate = records::decode(&entry)?;
            let Some(days) = certificate.event_due(now) else {
                continue;
            };
            certificate.warned_days = Some(days);
            let over = certificate.not_after <= now;
            let what = if over { "has ended" } else { "ends" };
            let event = SystemEvent {
                schema: 1,
                at: now,
                kind: EventKind::CertificateEnds,
                level: if over || days <= 1 {
                    EventLevel::Critical
                } else {
                    EventLevel::Warning
                },
                server: None,
                message: format!(
                    "the certificate `{}` ({}) of the workspace `{}` {what} at {}: upload its successor, and change the \
                     listeners that show it",
                    certificate.name, certificate.id, certificate.workspace, certificate.not_after
                ),
            };
            // The mark and the event together: it is raised once.
            let txn = records::replace(&certificate, entry.revision)?.and(events::put(&event));
            match records::commit(store, txn).await? {
                Committed::Done(_) => {
                    tracing::warn!(certificate.id = %certificate.id, days, "{}", event.message)
                }
                // Changed or deleted just now: the next look sees.
                Committed::Conflict => {}
            }
        }
        Ok(())
    }
}

/// Chain and private key, PEM, as a load balancer reads them.
pub(super) async fn bundle(
    store: &dyn Store,
    secrets: &SecretVault,
    id: CertificateId,
) -> Result<SecretText, ServiceError> {
    let (certificate, _) = records::get::<Certificate>(store, &id.to_string()).await?;
    let key = secrets
        .open_sealed(&keys::certificate_key(id))
        .await
        .map_err(|error: SecretError| {
            ServiceError::internal("open the private key of a certificate", error)
        })?
        .ok_or_else(|| ServiceError::not_found("private key of the certificate", id))?;
    Ok(SecretText::new(certificate.chain + key.reveal()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::{
        records::tests::{caller, memory_store},
        workspaces::{Workspaces, tests::request},
    };

    #[tokio::test]
    async fn a_key_is_sealed_and_the_end_is_told_once() {
        let store = memory_store();
        let directory = tempfile::tempdir().unwrap();
        let vault = SecretVault::open(store.clone(), &directory.path().join("key")).unwrap();
        let certificates = Certificates::new(store.clone(), vault.clone());
        let workspaces = Workspaces::new(store.clone());
        workspaces.create(caller(), request("prod")).await.unwrap();
        let made = check::tests::issued(5);
        let create = CreateCertificate {
            name: "shop".parse().unwrap(),
            chain: made.chain.clone(),
            private_key: SecretText::new(made.key.clone()),
        };
        let (certificate, _) = certificates
            .create(caller(), "prod", create.clone())
            .await
            .unwrap();
        let again = certificates
            .create(caller(), "prod", create)
            .await
            .unwrap_err();
        assert_eq!(again.code(), "name_taken");
        let row = store
            .get(&keys::certificate_key(certificate.id))
            .await
            .unwrap()
            .unwrap();
        let row = String::from_utf8_lossy(&row.value).into_owned();
        assert!(!row.contains("PRIVATE KEY"), "{row}");
        let bundle = bundle(&*store, &vault, certificate.id).await.unwrap();
        assert_eq!(bundle.reveal(), format!("{}{}", made.chain, made.key));

        let events = || async {
            let prefix = windlass_store::Prefix::from_segments(["default", "event"]).unwrap();
            records::all(&*store, &prefix).await.unwrap().len()
        };
        certificates.raise_events().await.unwrap();
        assert_eq!(events().await, 1);
        certificates.raise_events().await.unwrap();
        assert_eq!(events().await, 1);
        let (certificate, _) = certificates.get("prod", certificate.id).await.unwrap();
        assert_eq!(certificate.warned_days, Some(7));
        certificates
            .delete(caller(), "prod", certificate.id, "shop")
            .await
            .unwrap();
        assert!(
            store
                .get(&keys::certificate_key(certificate.id))
                .await
                .unwrap()
                .is_none()
        );
    }
}
