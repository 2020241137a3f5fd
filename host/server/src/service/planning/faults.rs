//! What a request is refused for before anything is planned, and how plugins' failures are told.

use windlass_domain::{
    expand::MAX_ENV_BYTES,
    limits::Limits,
    name::{RESERVED_ENV_PREFIX, check_env_key, check_variable},
    value::{Environment, Value},
};
use windlass_runtime::CallFailure;

use crate::service::ServiceError;

/// Longest wait for connections to end, in milliseconds: a day.
const MAX_DRAIN_DEADLINE_MS: u64 = 24 * 3600 * 1000;
/// Longest wait of a task for its server, in milliseconds: a week.
const MAX_DELIVERY_DEADLINE_MS: u64 = 7 * 24 * 3600 * 1000;
/// Most servers at once: as many as an order can have.
const MAX_IN_FLIGHT: u64 = 10_000;

pub(super) fn check_environment(field: &str, env: &Environment) -> Result<(), ServiceError> {
    for (key, value) in env {
        check_env_key(key).map_err(|error| {
            invalid(
                "parameter_key_invalid",
                format!("{field}/{key}"),
                error.message,
                "rename the parameter",
            )
        })?;
        if key.starts_with(RESERVED_ENV_PREFIX) {
            return Err(invalid(
                "parameter_key_reserved",
                format!("{field}/{key}"),
                format!("names that start with {RESERVED_ENV_PREFIX} are the platform's own"),
                "rename the parameter",
            ));
        }
        let text = match value {
            Value::Plain(text) => Some(text.as_str()),
            Value::SecretRef(_) => None,
        };
        check_variable(key, text).map_err(|error| {
            invalid(
                "parameter_value_invalid",
                format!("{field}/{key}"),
                error.message,
                "change the value",
            )
        })?;
    }
    Ok(())
}

/// The layers of an application's environment that people give, each with the field of the order that leads to it.
pub(super) struct Layers<'a> {
    /// Index of the application's target.
    pub(super) target: usize,
    /// Of the order, for all its applications.
    pub(super) order: &'a Environment,
    /// Of the order, for this application.
    pub(super) parameters: &'a Environment,
    /// Of the service instance.
    pub(super) instance: &'a Environment,
}

/// Refuses an environment that no plan may have before a plugin is asked: it is people's, not the plugin's. `base` is what all
/// servers get, `servers` are their names and own variables.
pub(super) fn check_environment_size<'a>(
    app: &str,
    base: &Environment,
    layers: &Layers<'_>,
    servers: impl Iterator<Item = (&'a str, Environment)>,
) -> Result<(), ServiceError> {
    for (server, own) in servers {
        let variables = json_bytes(&own);
        let mut env = base.clone();
        env.extend(own);
        let bytes = json_bytes(&env);
        if bytes <= MAX_ENV_BYTES {
            continue;
        }
        let Layers {
            target,
            order,
            parameters,
            instance,
        } = layers;
        let [order, parameters, instance] =
            [order, parameters, instance].map(|one| json_bytes(one));
        // The largest is what is most worth changing.
        let largest = order.max(parameters).max(instance).max(variables);
        let field = if largest == order {
            "/environment".to_owned()
        } else if largest == parameters {
            format!("/targets/{target}/parameters")
        } else {
            format!("/targets/{target}/instance")
        };
        return Err(ServiceError::Limit {
            code: "environment_too_large",
            field,
            message: format!(
                "the environment of `{app}` on `{server}` has {bytes} bytes as JSON, at most {MAX_ENV_BYTES} are allowed: \
                 {order} of the order's environment, {parameters} of the application's parameters in the order, {instance} of \
                 the service instance's environment, {variables} of the server"
            ),
            limit: MAX_ENV_BYTES as u64,
            current: bytes as u64,
            mend: "give less, or put large values into files of the package".to_owned(),
        });
    }
    Ok(())
}

fn json_bytes(env: &Environment) -> usize {
    serde_json::to_vec(env).map_or(usize::MAX, |json| json.len())
}

pub(super) fn invalid(
    code: &'static str,
    field: String,
    message: String,
    mend: &str,
) -> ServiceError {
    ServiceError::Invalid {
        code,
        field,
        message,
        mend: mend.to_owned(),
    }
}

/// A plugin's call that gave nothing. What it refused, it refused because of what it was asked: that is the order's fault, not
/// the plugin's. `field` is where its parameters come from.
pub(in crate::service) fn plugin_failed(
    field: &str,
    error: &windlass_runtime::CallError,
) -> ServiceError {
    let cause =
        std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
    let message = format!("{error}{cause}");
    match &error.failure {
        CallFailure::Refused { field: within, .. } => invalid(
            "plugin_refused",
            format!("{field}{}", within.as_deref().unwrap_or_default()),
            message,
            "change what the plugin names",
        ),
        CallFailure::GuestTime { .. }
        | CallFailure::CallTime { .. }
        | CallFailure::HostCallTime { .. }
        | CallFailure::HostCalls { .. }
        | CallFailure::Memory { .. }
        | CallFailure::Output { .. }
        | CallFailure::Trap { .. }
        | CallFailure::Mismatch { .. }
        | CallFailure::InvalidAnswer { .. }
        | CallFailure::InvalidInput { .. }
        | CallFailure::WrongKind { .. }
        | CallFailure::NotStarted { .. } => ServiceError::Plugin {
            code: "plugin_call_failed",
            message,
            mend: "mend the plugin, or choose another version of it; its calls are recorded"
                .to_owned(),
        },
    }
}

/// The order named, or its application has, a plugin that cannot be used now.
pub(super) fn lookup_failed(field: String, error: &windlass_runtime::LookupError) -> ServiceError {
    invalid(
        "plugin_not_available",
        field,
        error.to_string(),
        "see /v1/plugins for what is loaded and why something is not",
    )
}

/// The figures of an order that have bounds.
pub(super) fn check_limits(
    limits: &Limits,
    drain_deadline_ms: u64,
    delivery_deadline_ms: u64,
) -> Result<(), ServiceError> {
    for (field, found, min, max) in [
        (
            "/limits/max_in_flight",
            u64::from(limits.max_in_flight),
            1,
            MAX_IN_FLIGHT,
        ),
        (
            "/drain_deadline_ms",
            drain_deadline_ms,
            0,
            MAX_DRAIN_DEADLINE_MS,
        ),
        (
            "/delivery_deadline_ms",
            delivery_deadline_ms,
            1,
            MAX_DELIVERY_DEADLINE_MS,
        ),
    ] {
        if !(min..=max).contains(&found) {
            return Err(ServiceError::Limit {
                code: "out_of_limit",
                field: field.to_owned(),
                message: format!("`{field}` is {found}: {min} to {max} are allowed"),
                limit: if found < min { min } else { max },
                current: found,
                mend: format!("give a value of `{field}` within the limit"),
            });
        }
    }
    Ok(())
}

pub(super) fn internal(
    doing: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> ServiceError {
    ServiceError::Internal {
        doing,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str, bytes: usize) -> Environment {
        [(name.to_owned(), Value::Plain("x".repeat(bytes)))].into()
    }

    #[test]
    fn the_largest_layer_of_an_environment_that_is_too_large_is_named() {
        let check = |order: usize, parameters: usize, instance: usize, variables: usize| {
            let (order, parameters) = (env("A", order), env("B", parameters));
            let instance = env("C", instance);
            let mut base = instance.clone();
            base.extend(order.clone());
            base.extend(parameters.clone());
            let layers = Layers {
                target: 2,
                order: &order,
                parameters: &parameters,
                instance: &instance,
            };
            let servers = [("web-1", env("D", 1)), ("web-2", env("D", variables))];
            match check_environment_size("shop", &base, &layers, servers.into_iter()) {
                Ok(()) => "fits".to_owned(),
                Err(ServiceError::Limit {
                    field,
                    message,
                    limit,
                    current,
                    ..
                }) => {
                    assert_eq!(limit, 8192);
                    assert!(current > 8192, "{current}");
                    let server = if message.contains("on `web-2`") { 2 } else { 1 };
                    format!("{field} {server}")
                }
                Err(other) => panic!("{other}"),
            }
        };
        for (given, expect) in [
            ((8192, 1, 1, 1), "/environment 1"),
            ((1, 8192, 1, 1), "/targets/2/parameters 1"),
            ((1, 1, 8192, 1), "/targets/2/instance 1"),
            ((1, 1, 1, 8192), "/targets/2/instance 2"),
            ((3000, 3001, 3000, 1), "/targets/2/parameters 1"),
            // Each of the four takes `"A":{"plain":""}` and its value: with commas and braces 69 bytes beside the values.
            ((8192 - 69 - 3, 1, 1, 1), "fits"),
            ((8192 - 69 - 2, 1, 1, 1), "/environment 1"),
        ] {
            let (order, parameters, instance, variables) = given;
            assert_eq!(
                check(order, parameters, instance, variables),
                expect,
                "{given:?}"
            );
        }
    }
}
