//! What a plan reads, and how it is compared later.
//!
//! A read is kept as a digest of what counts in its subject, and a short text for people; see the table in the head of
//! `planning`. Decides nothing about a difference: that is drift, and the engine's and people's.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use windlass_domain::{
    Digest,
    id::{ServerId, TemplateId},
    instance::{Binding, ServiceInstance},
    manifest::{Manifest, PluginRef},
    package::Package,
    plan::{Plan, Read, Unit},
    plugin::PluginKind,
    pool::Pool,
    progress::Drift,
    server::{ReleaseState, Server},
    template::ProcessTemplate,
    workspace::Workspace,
};

use super::{Behind, Planner, ServiceError, cell_of, facts, load_balancers, specific};
use crate::engine;

impl Planner {
    /// What differs between what a plan read and what is now.
    ///
    /// # Errors
    /// [`ServiceError`] when something cannot be read.
    pub async fn drift(&self, plan: &Plan) -> Result<Vec<Drift>, ServiceError> {
        let subjects = plan.subjects();
        let now = self.current(plan, &subjects).await?;
        Ok(engine::differences(plan, &subjects, &now))
    }

    /// What the subjects are now.
    pub(super) async fn current(
        &self,
        plan: &Plan,
        subjects: &[String],
    ) -> Result<BTreeMap<String, Read>, ServiceError> {
        let wanted: HashSet<&str> = subjects.iter().map(String::as_str).collect();
        // Before each server's first step its own subjects are read anew: what is not asked for is not looked at.
        let asked_servers: HashSet<&str> = subjects
            .iter()
            .filter_map(|subject| {
                let installed = || subject.strip_prefix("installed ")?.split_once(" on ");
                let server = subject.strip_prefix("server ");
                server.or_else(|| Some(installed()?.1))
            })
            .collect();
        let mut asked_units: BTreeMap<u32, Vec<&Unit>> = BTreeMap::new();
        for unit in &plan.units {
            if let Some(part) = unit.part
                && asked_servers.contains(unit.server_name.as_str())
            {
                asked_units.entry(part).or_default().push(unit);
            }
        }
        let mut now = BTreeMap::new();
        for (index, part) in (0u32..).zip(&plan.parts) {
            let units = asked_units.remove(&index).unwrap_or_default();
            let concerns = |subject: &String| {
                *subject == instance_subject(&part.key)
                    || *subject == package_subject(&part.key)
                    || members_cells(&part.key, subject).is_some()
            };
            let stack = part.stack.as_ref();
            let stack = stack.map(|stack| plugin_subject(PluginKind::TechStack, &stack.name));
            let asks_stack = stack.is_some_and(|stack| wanted.contains(stack.as_str()));
            let asks_cells = wanted.contains("cells") && !now.contains_key("cells");
            if units.is_empty() && !asks_stack && !asks_cells && !subjects.iter().any(concerns) {
                continue;
            }
            // Rows come without waiting: a large plan must not keep a thread from everybody else.
            tokio::task::yield_now().await;
            let instance = self.parts.instances.find(part.instance).await?;
            let subject = instance_subject(&part.key);
            if let (true, Some(instance)) = (wanted.contains(subject.as_str()), &instance) {
                now.insert(subject, read_instance(instance));
            }
            let Some(instance) = instance else { continue };
            let subject = pools_subject(&part.key);
            if wanted.contains(subject.as_str()) {
                now.insert(subject, read_pools(&instance));
            }
            let subject = package_subject(&part.key);
            if wanted.contains(subject.as_str())
                && let Some(package) = &part.package
                && let Some(package) = self
                    .parts
                    .packages
                    .find_version(instance.workspace.as_str(), part.app, &package.version)
                    .await?
            {
                now.insert(subject, read_package(&package));
            }
            if let Some(stack) = &part.stack
                && let subject = plugin_subject(PluginKind::TechStack, &stack.name)
                && wanted.contains(subject.as_str())
            {
                let (app, _) = self.parts.apps.get(&part.app.to_string()).await?;
                let wanted = instance
                    .tech_stack_version
                    .as_ref()
                    .unwrap_or(&app.tech_stack.version);
                if let Ok(plugin) = self.parts.plugins.get(&stack.name, specific(wanted)) {
                    now.insert(subject, read_plugin(plugin.reference()));
                }
            }
            if asks_cells
                && let Ok((workspace, _)) =
                    self.parts.workspaces.get(instance.workspace.as_str()).await
            {
                now.insert("cells".to_owned(), read_cells(&workspace));
            }
            // The cells as they were chosen: a server in a cell that had none belongs to a release to all cells.
            for subject in subjects {
                if let Some(cells) = members_cells(&part.key, subject) {
                    let members = self.bound(&instance, &cells).await?;
                    now.insert(subject.clone(), read_members(&members));
                }
            }
            let mut states = None;
            for unit in units {
                let (server, installed, state) = (
                    server_subject(&unit.server_name),
                    installed_subject(&part.key, &unit.server_name),
                    state_subject(&part.key, &unit.server_name),
                );
                if wanted.contains(state.as_str()) {
                    if states.is_none() {
                        states = Some(self.states(part.instance).await?);
                    }
                    let installed = self.installed(part.instance, unit.server).await?;
                    if let Some(states) = &states {
                        let found = states.of(unit.server, installed.is_some());
                        now.insert(state, read_state(found));
                    }
                }
                if wanted.contains(server.as_str())
                    && let Some(binding) = self
                        .parts
                        .instances
                        .binding(instance.id, unit.server)
                        .await?
                    && let Ok((record, _)) = self
                        .parts
                        .servers
                        .get(instance.workspace.as_str(), unit.server)
                        .await
                {
                    now.insert(server, read_server(&record, &binding));
                }
                if wanted.contains(installed.as_str()) {
                    now.insert(
                        installed,
                        read_installed(self.installed(part.instance, unit.server).await?.as_ref()),
                    );
                }
            }
        }
        for subject in subjects {
            let Some(id) = template_of(subject) else {
                continue;
            };
            match self.parts.templates.find(id).await? {
                Some(template) => {
                    now.insert(subject.clone(), read_template(&template));
                }
                // The plan holds its steps: that nobody else can use it any more is no drift.
                None => now.extend(
                    plan.reads
                        .get(subject)
                        .map(|read| (subject.clone(), read.clone())),
                ),
            }
        }
        self.current_back_ends(plan, &wanted, &mut now).await?;
        if let Some(strategy) = &plan.strategy {
            let subject = plugin_subject(PluginKind::DeploymentStrategy, &strategy.name);
            if wanted.contains(subject.as_str())
                && let Ok(plugin) = self.parts.plugins.get(&strategy.name, None)
            {
                now.insert(subject, read_plugin(plugin.reference()));
            }
        }
        Ok(now)
    }

    async fn current_back_ends(
        &self,
        plan: &Plan,
        wanted: &HashSet<&str>,
        now: &mut BTreeMap<String, Read>,
    ) -> Result<(), ServiceError> {
        // Plans that were made before these were read, and servers' own checks, name none.
        if !wanted.iter().any(|subject| subject.starts_with(BACK_ENDS)) {
            return Ok(());
        }
        for part in &plan.parts {
            let Some(instance) = self.parts.instances.find(part.instance).await? else {
                continue;
            };
            let pools = part.pools.iter().copied().collect();
            let ws = instance.workspace.as_str();
            for (pool, members) in load_balancers::behind(&*self.parts.store, ws, pools).await? {
                let subject = back_ends_subject(&pool);
                if wanted.contains(subject.as_str()) {
                    now.insert(subject, read_back_ends(&members));
                }
            }
        }
        Ok(())
    }
}

/// How the subjects of pools begin.
const BACK_ENDS: &str = "back ends of ";

pub(super) fn back_ends_subject(pool: &Pool) -> String {
    format!("{BACK_ENDS}{}", pool.name)
}

/// Weights are left out: an order moves them itself.
pub(super) fn read_back_ends(members: &[Behind]) -> Read {
    let counted: Vec<_> = members
        .iter()
        .map(|member| (member.server, member.address, member.port))
        .collect();
    let names: Vec<String> = members
        .iter()
        .take(20)
        .map(|member| {
            let name = &member.name;
            match (member.address, member.port) {
                (None, None) => name.to_string(),
                (Some(address), None) => format!("{name} at {address}"),
                (None, Some(port)) => format!("{name} at port {port}"),
                (Some(address), Some(port)) => {
                    format!("{name} at {}", std::net::SocketAddr::new(address, port))
                }
            }
        })
        .collect();
    Read {
        digest: Digest::of_json(&counted),
        shown: format!("{} servers: {}", counted.len(), names.join(", ")),
    }
}

pub(super) fn instance_subject(app: &str) -> String {
    format!("instance of {app}")
}

pub(super) fn package_subject(app: &str) -> String {
    format!("package of {app}")
}

pub(super) fn members_subject(app: &str, cells: &[String]) -> String {
    if cells.is_empty() {
        return format!("servers of {app}");
    }
    let cells: BTreeSet<&str> = cells.iter().map(String::as_str).collect();
    let cells: Vec<&str> = cells.into_iter().collect();
    format!("servers of {app} in {}", cells.join(", "))
}

/// The cells of such a subject of this application. Names of applications and cells hold no blanks.
pub(super) fn members_cells(app: &str, subject: &str) -> Option<Vec<String>> {
    let rest = subject.strip_prefix("servers of ")?.strip_prefix(app)?;
    if rest.is_empty() {
        return Some(Vec::new());
    }
    let cells = rest.strip_prefix(" in ")?.split(", ");
    Some(cells.map(str::to_owned).collect())
}

pub(super) fn server_subject(server: &str) -> String {
    format!("server {server}")
}

pub(super) fn installed_subject(app: &str, server: &str) -> String {
    format!("installed {app} on {server}")
}

pub(super) fn state_subject(app: &str, server: &str) -> String {
    format!("state of {app} on {server}")
}

pub(super) fn pools_subject(app: &str) -> String {
    format!("pools of {app}")
}

pub(super) fn template_subject(id: TemplateId) -> String {
    format!("process template {id}")
}

fn template_of(subject: &str) -> Option<TemplateId> {
    subject.strip_prefix("process template ")?.parse().ok()
}

pub(super) fn plugin_subject(kind: PluginKind, name: &str) -> String {
    let kind = match kind {
        PluginKind::TechStack => "tech stack",
        PluginKind::DeploymentStrategy => "strategy",
        PluginKind::Diagnostic => "diagnostic",
        PluginKind::PublicCommand => "public command",
    };
    format!("{kind} {name}")
}

pub(super) fn read_instance(instance: &ServiceInstance) -> Read {
    let digest = Digest::of_json(&(
        &instance.parameters,
        &instance.env,
        &instance.tech_stack_version,
        &instance.cells,
        &instance.pools,
    ));
    Read {
        digest,
        shown: format!(
            "parameters, environment, cells and pools {}",
            digest.short()
        ),
    }
}

pub(super) fn read_package(package: &Package) -> Read {
    Read {
        digest: package.digest,
        shown: format!("{} with digest {}", package.version, package.digest.short()),
    }
}

pub(super) fn read_plugin(plugin: &PluginRef) -> Read {
    Read {
        digest: plugin.digest,
        shown: format!(
            "{}@{} with digest {}",
            plugin.name,
            plugin.version,
            plugin.digest.short()
        ),
    }
}

pub(super) fn read_cells(workspace: &Workspace) -> Read {
    let names: Vec<&str> = workspace
        .cells
        .iter()
        .map(|cell| cell.name.as_str())
        .collect();
    Read {
        digest: Digest::of_json(&workspace.cells),
        shown: names.join(", "),
    }
}

pub(super) fn read_members(servers: &[(Server, Binding)]) -> Read {
    let ids: BTreeSet<ServerId> = servers.iter().map(|(server, _)| server.id).collect();
    let names: Vec<&str> = servers
        .iter()
        .take(20)
        .map(|(server, _)| server.name.as_str())
        .collect();
    Read {
        digest: Digest::of_json(&ids),
        shown: format!("{} servers: {}", ids.len(), names.join(", ")),
    }
}

pub(super) fn read_server(server: &Server, binding: &Binding) -> Read {
    let digest = Digest::of_json(&(facts(server, binding), &server.name));
    Read {
        digest,
        shown: format!(
            "cell {}, variables and system {}",
            cell_of(server),
            digest.short()
        ),
    }
}

/// Where a server is in the life of its application.
pub(super) fn read_state(state: ReleaseState) -> Read {
    let shown = match state {
        ReleaseState::AwaitingRelease => "awaiting its first release",
        ReleaseState::Releasing => "worked on by an order",
        ReleaseState::Released => "released",
        ReleaseState::ReleaseFailed => "failed",
        ReleaseState::Offline => "offline",
    };
    Read {
        digest: Digest::of_json(&state),
        shown: shown.to_owned(),
    }
}

pub(super) fn read_pools(instance: &ServiceInstance) -> Read {
    Read {
        digest: Digest::of_json(&instance.pools),
        shown: format!("{} pools", instance.pools.len()),
    }
}

pub(super) fn read_template(template: &ProcessTemplate) -> Read {
    let digest = Digest::of_json(&template.steps);
    Read {
        digest,
        shown: format!(
            "`{}` with {} steps and digest {}",
            template.name,
            template.steps.len(),
            digest.short()
        ),
    }
}

pub(super) fn read_installed(installed: Option<&Manifest>) -> Read {
    let shown = installed.map_or_else(|| "nothing".to_owned(), |manifest| manifest.release.clone());
    Read {
        digest: Digest::of_json(&installed.map(|manifest| (&manifest.release, &manifest.plan))),
        shown,
    }
}
