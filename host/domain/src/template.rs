//! Process templates: lists of steps that replace the fixed flow of a release or operation.
//!
//! Owns which flows make sense. A template leaves out standard steps that are not needed and puts scripts and waits for
//! confirmation between them; it never changes what a standard step is, nor the order in which they stand, for each of them
//! relies on those before it. Source: spec "Process templates".

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{
    expand::{MAX_STEP_BYTES, MAX_TIMEOUT_MS},
    flow::{self, FlowStep},
    id::TemplateId,
    name::{TemplateName, WorkspaceName, check_os_user, check_variable},
    operation::Operation,
    plan::ScriptStep,
    plugin::Phase,
    time::Timestamp,
    value::Value,
};

/// A template has at most so many steps.
pub const MAX_STEPS: usize = 50;
/// The longest message of a wait for confirmation, in characters.
pub const MAX_MESSAGE_CHARS: usize = 500;
/// Grants of a template at most.
pub const MAX_GRANTS: usize = 100;

/// What a template is for.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum TemplateKind {
    /// Releases.
    Release,
    /// Restarts.
    Restart,
    /// Bringing online.
    Online,
    /// Taking offline.
    Offline,
    /// Placing static files.
    StaticFiles,
    /// Initialisations of servers.
    Initialise,
}

/// Where a template can be used.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// In the workspace that it was made in.
    #[default]
    Workspace,
    /// In every workspace. Only the one that it was made in can change it.
    Tenant,
}

/// Who may use a template in a workspace. Kept for when there are roles: until then every token may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The workspace's identifier.
    pub workspace: WorkspaceName,
    /// Names of users.
    #[serde(default)]
    pub users: Vec<String>,
    /// Names of roles.
    #[serde(default)]
    pub roles: Vec<String>,
}

/// A process template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProcessTemplate {
    /// Schema version of this record.
    pub schema: u32,
    /// Its id.
    pub id: TemplateId,
    /// Name: unique in its workspace.
    pub name: TemplateName,
    /// The workspace that it was made in.
    pub workspace: WorkspaceName,
    /// What it is for. Never changes.
    pub kind: TemplateKind,
    /// Where it can be used.
    pub visibility: Visibility,
    /// Description, at most 500 characters.
    #[serde(default)]
    pub description: String,
    /// The steps of each server's turn, in their order.
    pub steps: Vec<FlowStep>,
    /// Who may use it.
    #[serde(default)]
    pub grants: Vec<Grant>,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
}

impl ProcessTemplate {
    /// The current [`ProcessTemplate::schema`].
    pub const SCHEMA: u32 = 1;

    /// Whether it can be used in a workspace.
    #[must_use]
    pub fn is_visible_in(&self, workspace: &str) -> bool {
        match self.visibility {
            Visibility::Tenant => true,
            Visibility::Workspace => self.workspace.as_str() == workspace,
        }
    }
}

/// Why a list of steps is no flow. Steps are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum BadFlow {
    #[error("a template has 1 to {MAX_STEPS} steps, and this one has {steps}")]
    Length { steps: usize },
    #[error(
        "`{name}` (step {step}) is no step of {kind}: it has {allowed}, beside scripts and confirmations"
    )]
    NotOfKind {
        step: usize,
        name: String,
        kind: &'static str,
        allowed: String,
    },
    #[error("`{name}` stands twice, as steps {first} and {second}: a standard step runs once")]
    Twice {
        name: String,
        first: usize,
        second: usize,
    },
    #[error(
        "`{later}` (step {at}) stands before `{earlier}` (step {before}), and relies on it: put it behind"
    )]
    Order {
        later: String,
        at: usize,
        earlier: String,
        before: usize,
    },
    #[error("{kind} has no step `{name}`, and cannot do without: {why}")]
    Missing {
        name: String,
        kind: &'static str,
        why: &'static str,
    },
    #[error(
        "`restore` (step {step}) gives weights back that nothing has taken: put `drain` before it, or leave it out"
    )]
    RestoreWithoutDrain { step: usize },
    #[error(
        "`drain` (step {step}) takes the weight, and nothing gives it back: put `restore` behind it, or leave it out"
    )]
    DrainWithoutRestore { step: usize },
    #[error("step {step}: {rule}")]
    Step { step: usize, rule: String },
}

impl BadFlow {
    /// The position of the step that is wrong, from 0, where it is one's fault.
    #[must_use]
    pub const fn position(&self) -> Option<usize> {
        match self {
            Self::Length { .. } | Self::Missing { .. } => None,
            Self::NotOfKind { step, .. }
            | Self::RestoreWithoutDrain { step }
            | Self::DrainWithoutRestore { step }
            | Self::Step { step, .. } => Some(*step - 1),
            Self::Twice { second, .. } => Some(*second - 1),
            Self::Order { at, .. } => Some(*at - 1),
        }
    }
}

impl TemplateKind {
    /// The kind of template that an operation can take.
    #[must_use]
    pub const fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Restart => Self::Restart,
            Operation::Online { .. } => Self::Online,
            Operation::Offline => Self::Offline,
            Operation::StaticFiles(_) => Self::StaticFiles,
            Operation::Initialise => Self::Initialise,
        }
    }

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Release => "a release",
            Self::Restart => "a restart",
            Self::Online => "an online operation",
            Self::Offline => "an offline operation",
            Self::StaticFiles => "a placing of static files",
            Self::Initialise => "an initialisation",
        }
    }

    /// The standard steps that a flow of this kind can have, in the order in which they stand.
    #[must_use]
    pub fn standard(self) -> Vec<FlowStep> {
        let phase = |phase| FlowStep::Phase { phase };
        match self {
            Self::Release => flow::release(),
            Self::Restart => flow::operation(&Operation::Restart),
            Self::Online => flow::operation(&Operation::Online { initial_weight: 0 }),
            Self::Offline => flow::operation(&Operation::Offline),
            Self::StaticFiles => vec![FlowStep::Drain, FlowStep::PlaceFiles, FlowStep::Restore],
            Self::Initialise => vec![
                FlowStep::Drain,
                phase(Phase::Prepare),
                phase(Phase::Install),
                FlowStep::Restore,
            ],
        }
    }

    /// The standard steps that a flow of this kind cannot do without, each with the reason.
    fn needed(self) -> Vec<(FlowStep, &'static str)> {
        let phase = |phase| FlowStep::Phase { phase };
        match self {
            Self::Release => vec![
                (FlowStep::Fetch, "nothing would be there to unpack"),
                (FlowStep::Unpack, "nothing would be there to activate"),
                (FlowStep::StopInstalled, "what runs would never be stopped"),
                (FlowStep::Activate, "nothing would be installed"),
                (phase(Phase::Start), "nothing would run afterwards"),
            ],
            Self::Restart => vec![
                (FlowStep::StopInstalled, "what runs would never be stopped"),
                (FlowStep::StartInstalled, "nothing would run afterwards"),
            ],
            Self::Online => vec![
                (FlowStep::StartInstalled, "nothing would run"),
                (FlowStep::Restore, "its initial weight would never be set"),
            ],
            Self::Offline => vec![
                (FlowStep::Drain, "requests would be sent to what is stopped"),
                (FlowStep::StopInstalled, "what runs would never be stopped"),
            ],
            Self::StaticFiles => vec![(FlowStep::PlaceFiles, "no file would be placed")],
            Self::Initialise => vec![(phase(Phase::Prepare), "nothing would be prepared")],
        }
    }

    /// Whether a drain and a restore only make sense together.
    const fn pairs_traffic(self) -> bool {
        match self {
            Self::Release | Self::Restart | Self::StaticFiles | Self::Initialise => true,
            // One takes traffic away for good, the other gives it anew.
            Self::Online | Self::Offline => false,
        }
    }
}

/// What people call a step.
#[must_use]
pub fn step_name(step: &FlowStep) -> String {
    match step {
        FlowStep::Drain => "drain".to_owned(),
        FlowStep::Fetch => "fetch".to_owned(),
        FlowStep::Unpack => "unpack".to_owned(),
        FlowStep::Phase { phase } => {
            let phase = serde_json::to_value(phase).unwrap_or_default();
            format!("phase {}", phase.as_str().unwrap_or_default())
        }
        FlowStep::StopInstalled => "stop_installed".to_owned(),
        FlowStep::Activate => "activate".to_owned(),
        FlowStep::StartInstalled => "start_installed".to_owned(),
        FlowStep::CheckInstalled => "check_installed".to_owned(),
        FlowStep::Restore => "restore".to_owned(),
        FlowStep::PlaceFiles => "place_files".to_owned(),
        FlowStep::Script(script) => format!("script {}", script.name),
        FlowStep::Confirm { .. } => "confirm".to_owned(),
    }
}

/// Checks the steps of a template.
///
/// # Errors
/// [`BadFlow`] names the step and the rule.
pub fn check(kind: TemplateKind, steps: &[FlowStep]) -> Result<(), BadFlow> {
    if steps.is_empty() || steps.len() > MAX_STEPS {
        return Err(BadFlow::Length { steps: steps.len() });
    }
    let standard = kind.standard();
    // Where each standard step stands in the template, by its place among the standard ones.
    let mut places: BTreeMap<usize, usize> = BTreeMap::new();
    let mut scripts = BTreeSet::new();
    for (at, step) in (1..).zip(steps) {
        match step {
            FlowStep::Script(script) => {
                check_script(script).map_err(|rule| BadFlow::Step { step: at, rule })?;
                if !scripts.insert(script.name.as_str()) {
                    return Err(BadFlow::Step {
                        step: at,
                        rule: format!("another script is named `{}`, too", script.name),
                    });
                }
            }
            FlowStep::Confirm { message } => {
                let length = message.chars().count();
                if length == 0 || length > MAX_MESSAGE_CHARS {
                    return Err(BadFlow::Step {
                        step: at,
                        rule: format!(
                            "a confirmation has a message of 1 to {MAX_MESSAGE_CHARS} characters, and this one {length}"
                        ),
                    });
                }
            }
            FlowStep::Drain
            | FlowStep::Fetch
            | FlowStep::Unpack
            | FlowStep::Phase { .. }
            | FlowStep::StopInstalled
            | FlowStep::Activate
            | FlowStep::StartInstalled
            | FlowStep::CheckInstalled
            | FlowStep::PlaceFiles
            | FlowStep::Restore => {
                let Some(place) = standard.iter().position(|known| known == step) else {
                    let allowed: Vec<String> = standard.iter().map(step_name).collect();
                    return Err(BadFlow::NotOfKind {
                        step: at,
                        name: step_name(step),
                        kind: kind.name(),
                        allowed: allowed.join(", "),
                    });
                };
                if let Some(first) = places.insert(place, at) {
                    return Err(BadFlow::Twice {
                        name: step_name(step),
                        first,
                        second: at,
                    });
                }
            }
        }
    }
    for ((one, at), (two, behind)) in places.iter().zip(places.iter().skip(1)) {
        if at > behind {
            return Err(BadFlow::Order {
                later: step_name(&standard[*two]),
                at: *behind,
                earlier: step_name(&standard[*one]),
                before: *at,
            });
        }
    }
    for (step, why) in kind.needed() {
        if !steps.contains(&step) {
            return Err(BadFlow::Missing {
                name: step_name(&step),
                kind: kind.name(),
                why,
            });
        }
    }
    if kind.pairs_traffic() {
        let at = |wanted: &FlowStep| steps.iter().position(|step| step == wanted);
        match (at(&FlowStep::Drain), at(&FlowStep::Restore)) {
            (None, Some(step)) => return Err(BadFlow::RestoreWithoutDrain { step: step + 1 }),
            (Some(step), None) => return Err(BadFlow::DrainWithoutRestore { step: step + 1 }),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
    Ok(())
}

fn check_script(script: &ScriptStep) -> Result<(), String> {
    let length = script.name.chars().count();
    if length == 0 || length > 60 || script.name.chars().any(char::is_control) {
        return Err(format!(
            "a script has a name of 1 to 60 characters, none of them a control character, and this one {length}"
        ));
    }
    let of = |rule: &str| Err(format!("the script `{}`: {rule}", script.name));
    if script.script.text.trim().is_empty() {
        return of("it has no text");
    }
    let interpreter = &script.script.interpreter;
    if !interpreter
        .first()
        .is_some_and(|program| program.starts_with('/'))
    {
        return of(
            "it has no interpreter: give the path of one, `[\"/bin/sh\", \"-eu\"]` for example",
        );
    }
    if interpreter.iter().any(|word| word.contains('\0')) {
        return of("its interpreter holds a NUL character");
    }
    if script.script.text.contains('\0') {
        return of("its text holds a NUL character");
    }
    if let Some(user) = &script.run_as
        && let Err(error) = check_os_user(user)
    {
        return of(&error.message);
    }
    if let Some(directory) = &script.script.working_dir
        && (directory.is_empty()
            || directory.chars().any(char::is_control)
            || directory.split('/').any(|name| name == ".."))
    {
        return of(&format!(
            "its working directory {directory:?} is none: give a path without `..` and control characters, or leave it out"
        ));
    }
    let bytes = serde_json::to_vec(script).map_or(usize::MAX, |bytes| bytes.len());
    if bytes > MAX_STEP_BYTES {
        return of(&format!(
            "it has {bytes} bytes as JSON; the limit is {MAX_STEP_BYTES}"
        ));
    }
    if !(1..=MAX_TIMEOUT_MS).contains(&script.timeout_ms) {
        return of(&format!(
            "`timeout_ms` is {}: 1 to {MAX_TIMEOUT_MS} are allowed",
            script.timeout_ms
        ));
    }
    for (key, value) in &script.env {
        let text = match value {
            Value::Plain(text) => Some(text.as_str()),
            Value::SecretRef(_) => None,
        };
        if let Err(error) = check_variable(key, text) {
            return of(&error.message);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Script;

    fn script(name: &str) -> FlowStep {
        FlowStep::Script(ScriptStep {
            name: name.to_owned(),
            script: Script {
                interpreter: vec!["/bin/sh".to_owned()],
                text: "true".to_owned(),
                working_dir: None,
            },
            run_as: None,
            env: BTreeMap::new(),
            timeout_ms: 1000,
        })
    }

    fn confirm(message: &str) -> FlowStep {
        FlowStep::Confirm {
            message: message.to_owned(),
        }
    }

    #[test]
    fn the_fixed_flows_are_templates() {
        for kind in [
            TemplateKind::Release,
            TemplateKind::Restart,
            TemplateKind::Online,
            TemplateKind::Offline,
            TemplateKind::StaticFiles,
            TemplateKind::Initialise,
        ] {
            assert_eq!(check(kind, &kind.standard()), Ok(()), "{kind:?}");
            // Scripts and confirmations go anywhere.
            let mut steps = vec![confirm("ready?")];
            for (number, step) in kind.standard().into_iter().enumerate() {
                steps.push(step);
                steps.push(script(&format!("script {number}")));
            }
            assert_eq!(check(kind, &steps), Ok(()), "{kind:?}");
        }
    }

    fn refused(kind: TemplateKind, steps: &[FlowStep], position: Option<usize>, says: &str) {
        let bad = check(kind, steps).unwrap_err();
        assert_eq!(bad.position(), position, "{bad}");
        assert!(bad.to_string().contains(says), "{bad}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_step() {
        use FlowStep as S;
        let release = TemplateKind::Release;
        let without = |left_out: &[FlowStep]| -> Vec<FlowStep> {
            let steps = release.standard().into_iter();
            steps.filter(|step| !left_out.contains(step)).collect()
        };
        refused(release, &[], None, "1 to 50 steps");
        let many: Vec<FlowStep> = (0..51).map(|n| script(&n.to_string())).collect();
        refused(release, &many, None, "has 51");
        let mut steps = release.standard();
        steps.push(S::StartInstalled);
        refused(
            release,
            &steps,
            Some(12),
            "`start_installed` (step 13) is no step of a release",
        );
        refused(
            TemplateKind::Restart,
            &[S::Fetch],
            Some(0),
            "`fetch` (step 1) is no step of a restart",
        );
        let mut steps = release.standard();
        steps.insert(3, S::Fetch);
        refused(
            release,
            &steps,
            Some(3),
            "`fetch` stands twice, as steps 2 and 4",
        );
        let mut steps = release.standard();
        steps.swap(1, 7);
        refused(
            release,
            &steps,
            Some(2),
            "`unpack` (step 3) stands before `fetch` (step 8)",
        );
        let mut steps = without(&[S::Activate]);
        steps.insert(2, S::Activate);
        refused(
            release,
            &steps,
            Some(2),
            "`activate` (step 3) stands before",
        );
        refused(
            release,
            &without(&[S::Activate]),
            None,
            "no step `activate`",
        );
        let start = S::Phase {
            phase: Phase::Start,
        };
        refused(release, &without(&[start]), None, "no step `phase start`");
        refused(
            release,
            &without(&[S::Drain]),
            Some(10),
            "`restore` (step 11)",
        );
        refused(
            release,
            &without(&[S::Restore]),
            Some(0),
            "`drain` (step 1)",
        );
        assert_eq!(check(release, &without(&[S::Drain, S::Restore])), Ok(()));
        refused(
            TemplateKind::Offline,
            &[S::StopInstalled],
            None,
            "no step `drain`",
        );
        refused(
            TemplateKind::Online,
            &[S::StartInstalled],
            None,
            "no step `restore`",
        );
        let place = |step| [S::PlaceFiles, step];
        let files = TemplateKind::StaticFiles;
        refused(
            files,
            &place(confirm("")),
            Some(1),
            "step 2: a confirmation",
        );
        refused(
            files,
            &place(script("")),
            Some(1),
            "step 2: a script has a name",
        );
        let odd = |change: fn(&mut ScriptStep)| {
            let S::Script(mut step) = script("odd") else {
                unreachable!("it is a script");
            };
            change(&mut step);
            place(S::Script(step))
        };
        for (steps, says) in [
            (odd(|step| step.script.text.clear()), "no text"),
            (
                odd(|step| step.script.interpreter.clear()),
                "no interpreter",
            ),
            (odd(|step| step.timeout_ms = 0), "`timeout_ms` is 0"),
            (
                odd(|step| step.script.text = "x".repeat(30_000)),
                "the limit is 20480",
            ),
            (
                odd(|step| {
                    let value = crate::value::Value::Plain(String::new());
                    step.env.insert("WINDLASS_X".to_owned(), value);
                }),
                "the platform's own",
            ),
        ] {
            refused(files, &steps, Some(1), says);
        }
        let twice = [S::PlaceFiles, script("a"), script("a")];
        refused(files, &twice, Some(2), "another script is named `a`");
    }
}
