//! Between the words of the contract and the words of the host. One file per world.
//!
//! To the guest nothing can fail. From the guest, a code that this host does not know, or JSON that is none, is an
//! [`CallFailure::InvalidAnswer`] that names the field; what the values *mean* is checked by the core (see `domain`).

pub(crate) mod command;
pub(crate) mod descriptor;
pub(crate) mod diagnosis;
pub(crate) mod lifecycle;
pub(crate) mod strategy;

use std::collections::BTreeMap;

use windlass_domain::{
    plugin::ServerFacts,
    task::Script,
    value::{Environment, Value},
};

use crate::{bindings::types, error::CallFailure};

pub(crate) fn environment_to_guest(env: &Environment) -> types::Environment {
    env.iter()
        .map(|(name, value)| {
            let value = match value {
                Value::Plain(text) => types::Value::Plain(text.clone()),
                Value::SecretRef(name) => types::Value::SecretRef(name.clone()),
            };
            (name.clone(), value)
        })
        .collect()
}

pub(crate) fn environment_from_guest(
    field: &str,
    env: types::Environment,
) -> Result<Environment, CallFailure> {
    let mut result = Environment::new();
    for (name, value) in env {
        let value = match value {
            types::Value::Plain(text) => Value::Plain(text),
            types::Value::SecretRef(name) => Value::SecretRef(name),
        };
        if result.insert(name.clone(), value).is_some() {
            return Err(CallFailure::invalid(
                field,
                format!("holds the variable `{name}` twice"),
            ));
        }
    }
    Ok(result)
}

pub(crate) fn attributes_from_guest(
    field: &str,
    attributes: types::Attributes,
) -> Result<BTreeMap<String, String>, CallFailure> {
    let mut result = BTreeMap::new();
    for (key, value) in attributes {
        if result.insert(key.clone(), value).is_some() {
            return Err(CallFailure::invalid(
                field,
                format!("holds the key `{key}` twice"),
            ));
        }
    }
    Ok(result)
}

pub(crate) fn json_from_guest(field: &str, text: &str) -> Result<serde_json::Value, CallFailure> {
    serde_json::from_str(text)
        .map_err(|error| CallFailure::invalid(field, format!("is not JSON: {error}")))
}

pub(crate) fn script_from_guest(script: types::Script) -> Script {
    Script {
        interpreter: script.interpreter,
        text: script.text,
        working_dir: script.working_dir,
    }
}

pub(crate) fn server_to_guest(server: &ServerFacts) -> types::ServerFacts {
    types::ServerFacts {
        id: server.id.clone(),
        name: server.name.clone(),
        os: server.os.clone(),
        os_version: server.os_version.clone(),
        arch: server.arch.clone(),
        address: server.address.clone(),
        cell: server.cell.clone(),
        // The host's facts hold no zone yet: a stack never needed one.
        zone: String::new(),
        variables: server
            .variables
            .iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        attributes: Vec::new(),
    }
}

pub(crate) fn refused(error: types::PluginError) -> CallFailure {
    CallFailure::Refused {
        code: error.code,
        message: error.message,
        field: error.field,
    }
}
