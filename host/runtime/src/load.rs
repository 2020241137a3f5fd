//! From bytes to a plugin that can be called, or to the reason why not.
//!
//! Nothing of a component runs before its imports were compared with its world, and what runs first (`describe`) runs under
//! the limits of every call.

use std::{collections::BTreeSet, sync::Arc};

use wasmtime::{
    Engine,
    component::{Component, Linker},
};
use windlass_domain::{digest::Digest, manifest::PluginRef, plugin::PluginKind};

use crate::{
    bindings::{deployment_strategy, diagnostic, public_command, tech_stack},
    call::{CallSink, Usage},
    conformance,
    convert::descriptor::descriptor_from_guest,
    error::{CallFailure, Rejection, RejectionCode},
    plugin::{Caller, Guest, Loaded},
    sandbox::Sandbox,
    state::State,
    surroundings::Surroundings,
};

/// The package of the contract, and the version that this host has.
const PACKAGE: &str = "windlass:plugin/";
const CONTRACT: semver::Version = semver::Version::new(1, 0, 0);
/// The interface that every plugin exports.
const INFO: &str = "plugin-info";
/// The interface by which a kind is known.
const KINDS: [(&str, PluginKind); 4] = [
    ("lifecycle", PluginKind::TechStack),
    ("strategy", PluginKind::DeploymentStrategy),
    ("diagnosis", PluginKind::Diagnostic),
    ("command", PluginKind::PublicCommand),
];

/// Looks at bytes without compiling them: size was checked while they were read.
pub(crate) fn check_bytes(bytes: &[u8]) -> Result<(), Rejection> {
    if Engine::detect_precompiled(bytes).is_some() || bytes.starts_with(b"\x7fELF") {
        return Err(Rejection::new(
            RejectionCode::Precompiled,
            "the file is compiled ahead of time; such code cannot be checked and is never accepted: provide the WebAssembly component",
        ));
    }
    let Some(header) = bytes
        .first_chunk::<8>()
        .filter(|head| head.starts_with(b"\0asm"))
    else {
        return Err(Rejection::new(
            RejectionCode::NotWasm,
            "the file is not WebAssembly",
        ));
    };
    // Version and layer: 1, 0 is a core module; 13, 1 is a component.
    match header[4..] {
        [1, 0, 0, 0] => Err(Rejection::new(
            RejectionCode::CoreModule,
            "the file is a core module, not a component: link it with wasm-component-ld, or for the target wasm32-wasip2",
        )),
        [_, _, 1, 0] => Ok(()),
        [..] => Err(Rejection::new(
            RejectionCode::NotWasm,
            "the file is WebAssembly of a version that this host does not know",
        )),
    }
}

/// Loads a component whose compiled code is in the cache. The file name stands for the plugin until it has named itself.
pub(crate) async fn load(
    sandbox: &Arc<Sandbox>,
    digest: Digest,
    bytes: Arc<Vec<u8>>,
    file_name: &str,
    sink: Option<Arc<dyn CallSink>>,
) -> Result<Loaded, Rejection> {
    let component = component(sandbox, bytes).await?;
    let (loaded, _) = from_component(sandbox, digest, &component, file_name, sink).await?;
    Ok(loaded)
}

/// The component's code: from the cache, or compiled here.
pub(crate) async fn component(
    sandbox: &Arc<Sandbox>,
    bytes: Arc<Vec<u8>>,
) -> Result<Component, Rejection> {
    let engine = sandbox.clone();
    tokio::task::spawn_blocking(move || Component::from_binary(&engine.engine, &bytes))
        .await
        .map_err(|error| Rejection::new(RejectionCode::CompileFailed, error.to_string()))?
        .map_err(|error| not_loadable(&error))
}

/// Checks and links a component, and asks it what it is; with what that call used.
pub(crate) async fn from_component(
    sandbox: &Arc<Sandbox>,
    digest: Digest,
    component: &Component,
    file_name: &str,
    sink: Option<Arc<dyn CallSink>>,
) -> Result<(Loaded, Usage), Rejection> {
    let kind = kind_of(&sandbox.engine, component)?;
    check_imports(&sandbox.engine, component, kind)?;
    check_resources(sandbox, component)?;
    let guest = link(sandbox, component, kind)?;

    let mut caller = Caller {
        sandbox: Arc::clone(sandbox),
        reference: PluginRef {
            name: file_name.to_owned(),
            version: semver::Version::new(0, 0, 0),
            digest,
        },
        label: Arc::from(file_name),
        // Its own setting is known once it has named itself.
        memory_limit: sandbox
            .limits
            .memory_bytes
            .min(sandbox.limits.max_memory_bytes),
        guest_time: sandbox.limits.guest_time,
        sink: None,
        surroundings: Surroundings::Ordinary,
    };
    let (described, usage) = caller.describe(&guest).await;
    let described = described.map_err(|failure| {
        let code = match failure {
            CallFailure::GuestTime { .. } | CallFailure::CallTime { .. } => {
                RejectionCode::DescribeTimeout
            }
            CallFailure::Memory { .. } => RejectionCode::MemoryLimit,
            CallFailure::Mismatch { .. } => RejectionCode::MissingExport,
            CallFailure::Refused { .. }
            | CallFailure::HostCallTime { .. }
            | CallFailure::HostCalls { .. }
            | CallFailure::Output { .. }
            | CallFailure::Trap { .. }
            | CallFailure::InvalidAnswer { .. }
            | CallFailure::InvalidInput { .. }
            | CallFailure::WrongKind { .. }
            | CallFailure::NotStarted { .. } => RejectionCode::DescribeFailed,
        };
        Rejection::new(code, format!("`describe`: {failure}"))
    })?;
    let (descriptor, schema) = descriptor_from_guest(kind, described, sandbox.limits.schema_bytes)?;
    caller.reference.name.clone_from(&descriptor.name);
    caller.reference.version = descriptor.version.clone();
    caller.label = Arc::from(format!("{}@{}", descriptor.name, descriptor.version));
    caller.memory_limit = sandbox.limits.memory_of(&descriptor.name);
    caller.sink = sink;
    let loaded = Loaded {
        guest,
        caller,
        descriptor: Arc::new(descriptor),
        schema: Arc::new(schema),
    };
    conformance::accept(&loaded).await?;
    Ok((loaded, usage))
}

/// Bytes that compiled in the child and are not loaded: the pool is what the child does not have.
fn not_loadable(error: &wasmtime::Error) -> Rejection {
    let text = one_line(error);
    // wasmtime has no types for these; a test holds the texts in place.
    let (code, what) = match (
        text.contains("pooling allocator"),
        text.contains("minimum byte size"),
    ) {
        (true, true) => (
            RejectionCode::MemoryLimit,
            "needs more memory to start than any plugin can have",
        ),
        (true, false) => (RejectionCode::ResourceLimit, "needs more than a call has"),
        (false, _) => (RejectionCode::InvalidComponent, "not a valid component"),
    };
    Rejection::new(code, format!("{what}: {text}"))
}

fn one_line(error: &wasmtime::Error) -> String {
    format!("{error:#}")
        .replace('\n', " ")
        .chars()
        .take(500)
        .collect()
}

/// An interface of our package: its name and version. `None`: of another package.
fn ours(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix(PACKAGE)?;
    Some(rest.split_once('@').unwrap_or((rest, "")))
}

/// Names of imported and of exported interfaces, each sorted.
pub(crate) fn interfaces(engine: &Engine, component: &Component) -> (Vec<String>, Vec<String>) {
    let ty = component.component_type();
    let mut imports: Vec<String> = ty
        .imports(engine)
        .map(|(name, _)| name.to_owned())
        .collect();
    let mut exports: Vec<String> = ty
        .exports(engine)
        .map(|(name, _)| name.to_owned())
        .collect();
    imports.sort();
    exports.sort();
    (imports, exports)
}

/// The version of the contract that a plugin's own interfaces name.
pub(crate) fn contract_of(exports: &[String]) -> String {
    exports
        .iter()
        .filter_map(|name| ours(name))
        .map(|(_, version)| version.to_owned())
        .next()
        .unwrap_or_default()
}

fn check_contract(interface: &str, version: &str) -> Result<(), Rejection> {
    let good = version
        .parse::<semver::Version>()
        .is_ok_and(|version| version.major == CONTRACT.major && version.pre.is_empty());
    if good {
        return Ok(());
    }
    Err(Rejection::new(
        RejectionCode::ContractVersion,
        format!(
            "made for `windlass:plugin/{interface}` in version `{version}`; this host has {CONTRACT}: use a host or an SDK of the same major version"
        ),
    ))
}

fn kind_of(engine: &Engine, component: &Component) -> Result<PluginKind, Rejection> {
    let ty = component.component_type();
    let mut exported = BTreeSet::new();
    for (name, _) in ty.exports(engine) {
        if let Some((interface, version)) = ours(name) {
            check_contract(interface, version)?;
            exported.insert(interface.to_owned());
        }
    }
    let kinds: Vec<_> = KINDS
        .iter()
        .filter(|(interface, _)| exported.contains(*interface))
        .collect();
    match kinds.as_slice() {
        [(_, kind)] if exported.contains(INFO) => Ok(*kind),
        [(interface, _)] => Err(Rejection::new(
            RejectionCode::MissingExport,
            format!(
                "exports `{PACKAGE}{interface}` but not `{PACKAGE}{INFO}`, which every plugin has"
            ),
        )),
        [] => Err(Rejection::new(
            RejectionCode::NoWorld,
            "exports no interface of `windlass:plugin`: one of `lifecycle`, `strategy`, `diagnosis`, `command` is needed",
        )),
        several => Err(Rejection::new(
            RejectionCode::SeveralWorlds,
            format!(
                "exports interfaces of {} worlds ({}): one component implements one world",
                several.len(),
                several
                    .iter()
                    .map(|(interface, _)| *interface)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        )),
    }
}

/// Imports by name; their types are compared when linking.
fn check_imports(
    engine: &Engine,
    component: &Component,
    kind: PluginKind,
) -> Result<(), Rejection> {
    let allowed: &[&str] = match kind {
        PluginKind::Diagnostic => &["types", "logging", "probes", "resources"],
        PluginKind::TechStack | PluginKind::DeploymentStrategy | PluginKind::PublicCommand => {
            &["types", "logging"]
        }
    };
    let ty = component.component_type();
    for (name, _) in ty.imports(engine) {
        match ours(name) {
            Some((interface, version)) => {
                // Exported interfaces import the types of their own interfaces' siblings; functions come from these only.
                if !allowed.contains(&interface) {
                    return Err(unknown_import(name, kind));
                }
                check_contract(interface, version)?;
            }
            None if name.starts_with("wasi:") => {}
            None => return Err(unknown_import(name, kind)),
        }
    }
    Ok(())
}

fn unknown_import(name: &str, kind: PluginKind) -> Rejection {
    let name: String = name.chars().take(200).collect();
    Rejection::new(
        RejectionCode::UnknownImport,
        format!("imports `{name}`, which the world of a {kind:?} does not have"),
    )
}

fn check_resources(sandbox: &Sandbox, component: &Component) -> Result<(), Rejection> {
    const PAGE_BYTES: u64 = 65_536;
    let Some(needed) = component.resources_required() else {
        return Err(Rejection::new(
            RejectionCode::UnknownImport,
            "imports a core module or a component, which no world has",
        ));
    };
    let memory_bytes = needed
        .max_initial_memory_size
        .unwrap_or(0)
        .saturating_mul(PAGE_BYTES);
    let limit = sandbox.limits.max_memory_bytes;
    if memory_bytes > limit {
        return Err(Rejection::new(
            RejectionCode::MemoryLimit,
            format!(
                "needs {memory_bytes} bytes of memory to start, no plugin can have more than {limit}"
            ),
        ));
    }
    for (what, needs, limit) in [
        ("memories", needed.num_memories, 8),
        ("tables", needed.num_tables, 32),
    ] {
        if needs > limit {
            return Err(Rejection::new(
                RejectionCode::ResourceLimit,
                format!("needs {needs} {what}, a call has {limit}"),
            ));
        }
    }
    Ok(())
}

fn link(sandbox: &Sandbox, component: &Component, kind: PluginKind) -> Result<Guest, Rejection> {
    fn instantiate_pre(
        linker: &Linker<State>,
        component: &Component,
    ) -> Result<wasmtime::component::InstancePre<State>, Rejection> {
        linker.instantiate_pre(component).map_err(|error| {
            Rejection::new(
                RejectionCode::UnknownImport,
                format!(
                    "an import does not fit this host, which has version {CONTRACT} of the contract: {}",
                    one_line(&error)
                ),
            )
        })
    }
    let missing = |error: wasmtime::Error| {
        Rejection::new(
            RejectionCode::MissingExport,
            format!(
                "an export of its world is missing or has another type: {}",
                one_line(&error)
            ),
        )
    };
    let linkers = &sandbox.linkers;
    Ok(match kind {
        PluginKind::TechStack => Guest::TechStack(
            tech_stack::TechStackPre::new(instantiate_pre(&linkers.tech_stack, component)?)
                .map_err(missing)?,
        ),
        PluginKind::DeploymentStrategy => Guest::DeploymentStrategy(
            deployment_strategy::DeploymentStrategyPre::new(instantiate_pre(
                &linkers.deployment_strategy,
                component,
            )?)
            .map_err(missing)?,
        ),
        PluginKind::Diagnostic => Guest::Diagnostic(
            diagnostic::DiagnosticPre::new(instantiate_pre(&linkers.diagnostic, component)?)
                .map_err(missing)?,
        ),
        PluginKind::PublicCommand => Guest::PublicCommand(
            public_command::PublicCommandPre::new(instantiate_pre(
                &linkers.public_command,
                component,
            )?)
            .map_err(missing)?,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_apart_before_anything_is_compiled() {
        for (bytes, expect) in [
            (&b""[..], RejectionCode::NotWasm),
            (b"hello, I am text", RejectionCode::NotWasm),
            (b"\0asm", RejectionCode::NotWasm),
            (b"\0asm\x01\0\0\0", RejectionCode::CoreModule),
            (b"\0asm\x02\0\0\0", RejectionCode::NotWasm),
            (b"\x7fELF\x02\x01\x01\0\0\0\0\0", RejectionCode::Precompiled),
        ] {
            let got = check_bytes(bytes).map_err(|rejection| rejection.code);
            assert_eq!(got, Err(expect), "{bytes:?}");
        }
        assert_eq!(check_bytes(b"\0asm\x0d\0\x01\0"), Ok(()));
    }
}
