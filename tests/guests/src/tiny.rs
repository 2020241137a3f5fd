//! A tech stack that does nothing, as small as a plugin gets: for figures per plugin.

use windlass_sdk::{
    Descriptor, PluginError, TechStack,
    lifecycle::{LifecyclePlan, LifecycleRequest},
};

/// The guest.
#[derive(Debug)]
pub struct Tiny;

impl TechStack for Tiny {
    fn describe() -> Descriptor {
        let [name, version, _] = crate::descriptor::fields();
        Descriptor::new(&name, &version)
    }

    fn lifecycle(_: LifecycleRequest) -> Result<LifecyclePlan, PluginError> {
        Ok(LifecyclePlan::new())
    }
}

windlass_sdk::tech_stack!(Tiny);
