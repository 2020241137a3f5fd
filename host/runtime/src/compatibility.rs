//! Whether plugins that were built for one version of a WIT package still run on a host that has another.
//!
//! What old guests survive was tried with real linkers: functions added to interfaces that worlds *import*, and new
//! interfaces, types and worlds. Everything else breaks them: a function added to an interface that worlds *export* (the host
//! looks each of them up in old guests), a field, a case, another type, another order, anything removed.
//!
//! Source: design, "Evolution".

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
};

use serde::Serialize;
use wit_parser::{
    Function, Interface, InterfaceId, Package, PackageId, Resolve, Type, TypeDef, TypeDefKind,
    TypeId, TypeOwner, World, WorldItem, WorldKey,
};

/// A WIT package that was read.
#[derive(Debug)]
pub struct WitPackage {
    resolve: Resolve,
    package: PackageId,
}

/// Why two packages cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WitError {
    /// It is not WIT, or could not be read.
    #[error("{name} is not a WIT package: {reason}")]
    Unreadable {
        /// Which.
        name: String,
        /// Why, with the place in the text.
        reason: String,
    },
    /// They are different packages, or different major versions: no plugin is promised to survive that.
    #[error(
        "`{old}` and `{new}` are not versions of one package with the same major version: there is nothing to compare"
    )]
    OtherPackage {
        /// The old one's name and version.
        old: String,
        /// The new one's.
        new: String,
    },
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct WitChange {
    /// Whether old guests survive it.
    pub effect: Effect,
    /// What changed: `interface.function`, `interface.type`, `world name`.
    pub item: String,
    /// How, and why it matters.
    pub what: String,
}

/// What a change means for plugins that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// They do not load any more, or are not understood.
    Breaks,
    /// They run on as they are.
    Survives,
}

impl fmt::Display for WitChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let effect = match self.effect {
            Effect::Breaks => "breaks  ",
            Effect::Survives => "survives",
        };
        write!(f, "{effect}  {}: {}", self.item, self.what)
    }
}

impl WitPackage {
    /// Reads a directory of `.wit` files, or one file.
    ///
    /// # Errors
    /// [`WitError::Unreadable`].
    pub fn read(path: &Path) -> Result<Self, WitError> {
        let mut resolve = Resolve::default();
        let (package, _) = resolve
            .push_path(path)
            .map_err(|error| WitError::Unreadable {
                name: path.display().to_string(),
                reason: format!("{error:#}"),
            })?;
        Ok(Self { resolve, package })
    }

    /// Reads a package from one text.
    ///
    /// # Errors
    /// [`WitError::Unreadable`].
    pub fn parse(name: &str, text: &str) -> Result<Self, WitError> {
        let mut resolve = Resolve::default();
        let package = resolve
            .push_source(name, text)
            .map_err(|error| WitError::Unreadable {
                name: name.to_owned(),
                reason: format!("{error:#}"),
            })?;
        Ok(Self { resolve, package })
    }

    fn package(&self) -> &Package {
        &self.resolve.packages[self.package]
    }

    fn interfaces(&self) -> impl Iterator<Item = (&str, &Interface)> {
        self.package()
            .interfaces
            .iter()
            .map(|(name, id)| (name.as_str(), &self.resolve.interfaces[*id]))
    }

    fn interface(&self, name: &str) -> Option<&Interface> {
        let id = self.package().interfaces.get(name)?;
        Some(&self.resolve.interfaces[*id])
    }

    fn worlds(&self) -> impl Iterator<Item = (&str, &World)> {
        self.package()
            .worlds
            .iter()
            .map(|(name, id)| (name.as_str(), &self.resolve.worlds[*id]))
    }

    fn world(&self, name: &str) -> Option<&World> {
        let id = self.package().worlds.get(name)?;
        Some(&self.resolve.worlds[*id])
    }

    /// Names of interfaces that some world exports.
    fn exported(&self) -> BTreeSet<String> {
        self.worlds()
            .flat_map(|(_, world)| world.exports.iter())
            .map(|(key, item)| self.item_name(key, item))
            .collect()
    }

    fn item_name(&self, key: &WorldKey, item: &WorldItem) -> String {
        match (key, item) {
            (_, WorldItem::Interface { id, .. }) => self.interface_name(*id),
            (WorldKey::Name(name), WorldItem::Function(_) | WorldItem::Type { .. }) => name.clone(),
            (WorldKey::Interface(id), WorldItem::Function(_) | WorldItem::Type { .. }) => {
                self.interface_name(*id)
            }
        }
    }

    fn interface_name(&self, id: InterfaceId) -> String {
        let interface = &self.resolve.interfaces[id];
        let name = interface.name.as_deref().unwrap_or("(inline)");
        match interface.package {
            Some(package) if package != self.package => {
                format!("{}/{name}", self.resolve.packages[package].name)
            }
            Some(_) | None => name.to_owned(),
        }
    }

    /// A type where it is used: named types by the name of their home.
    fn used(&self, ty: &Type) -> String {
        match ty {
            Type::Id(id) => self.used_id(*id),
            Type::Bool => "bool".into(),
            Type::U8 => "u8".into(),
            Type::U16 => "u16".into(),
            Type::U32 => "u32".into(),
            Type::U64 => "u64".into(),
            Type::S8 => "s8".into(),
            Type::S16 => "s16".into(),
            Type::S32 => "s32".into(),
            Type::S64 => "s64".into(),
            Type::F32 => "f32".into(),
            Type::F64 => "f64".into(),
            Type::Char => "char".into(),
            Type::String => "string".into(),
            Type::ErrorContext => "error-context".into(),
        }
    }

    fn used_id(&self, id: TypeId) -> String {
        let def = &self.resolve.types[id];
        let Some(name) = &def.name else {
            return self.shape(def);
        };
        // `use` makes an alias in the interface that uses it: the home is at the end of the chain of equal names.
        if let TypeDefKind::Type(Type::Id(target)) = &def.kind
            && self.resolve.types[*target].name.as_ref() == Some(name)
            && self.resolve.types[*target].owner != def.owner
        {
            return self.used_id(*target);
        }
        match def.owner {
            TypeOwner::Interface(interface) => format!("{}.{name}", self.interface_name(interface)),
            TypeOwner::World(_) | TypeOwner::None => name.clone(),
        }
    }

    /// What a type is, one level deep.
    fn shape(&self, def: &TypeDef) -> String {
        let optional =
            |ty: &Option<Type>| ty.as_ref().map_or_else(|| "_".into(), |ty| self.used(ty));
        match &def.kind {
            TypeDefKind::Record(record) => {
                let fields = record
                    .fields
                    .iter()
                    .map(|field| format!("{}: {}", field.name, self.used(&field.ty)));
                format!("record {{ {} }}", join(fields))
            }
            TypeDefKind::Variant(variant) => {
                let cases = variant.cases.iter().map(|case| match &case.ty {
                    Some(ty) => format!("{}({})", case.name, self.used(ty)),
                    None => case.name.clone(),
                });
                format!("variant {{ {} }}", join(cases))
            }
            TypeDefKind::Enum(cases) => {
                format!(
                    "enum {{ {} }}",
                    join(cases.cases.iter().map(|case| case.name.clone()))
                )
            }
            TypeDefKind::Flags(flags) => {
                format!(
                    "flags {{ {} }}",
                    join(flags.flags.iter().map(|flag| flag.name.clone()))
                )
            }
            TypeDefKind::Tuple(tuple) => {
                format!(
                    "tuple<{}>",
                    join(tuple.types.iter().map(|ty| self.used(ty)))
                )
            }
            TypeDefKind::Option(ty) => format!("option<{}>", self.used(ty)),
            TypeDefKind::Result(result) => {
                format!(
                    "result<{}, {}>",
                    optional(&result.ok),
                    optional(&result.err)
                )
            }
            TypeDefKind::List(ty) => format!("list<{}>", self.used(ty)),
            TypeDefKind::Map(key, value) => {
                format!("map<{}, {}>", self.used(key), self.used(value))
            }
            TypeDefKind::FixedLengthList(ty, length) => {
                format!("list<{}, {length}>", self.used(ty))
            }
            TypeDefKind::Future(ty) => format!("future<{}>", optional(ty)),
            TypeDefKind::Stream(ty) => format!("stream<{}>", optional(ty)),
            TypeDefKind::Handle(wit_parser::Handle::Own(id)) => {
                format!("own<{}>", self.used_id(*id))
            }
            TypeDefKind::Handle(wit_parser::Handle::Borrow(id)) => {
                format!("borrow<{}>", self.used_id(*id))
            }
            TypeDefKind::Type(ty) => self.used(ty),
            TypeDefKind::Resource => "resource".into(),
            TypeDefKind::Unknown => "unknown".into(),
        }
    }

    /// Parts of a type that are compared one by one, so that a message names the one that changed: fields and cases.
    fn parts(&self, def: &TypeDef) -> Option<(&'static str, Vec<(String, String)>)> {
        match &def.kind {
            TypeDefKind::Record(record) => Some((
                "field",
                record
                    .fields
                    .iter()
                    .map(|field| (field.name.clone(), self.used(&field.ty)))
                    .collect(),
            )),
            TypeDefKind::Variant(variant) => Some((
                "case",
                variant
                    .cases
                    .iter()
                    .map(|case| {
                        let payload = case
                            .ty
                            .as_ref()
                            .map_or_else(|| "nothing".into(), |ty| self.used(ty));
                        (case.name.clone(), payload)
                    })
                    .collect(),
            )),
            TypeDefKind::Enum(cases) => Some((
                "case",
                cases
                    .cases
                    .iter()
                    .map(|case| (case.name.clone(), String::new()))
                    .collect(),
            )),
            TypeDefKind::Flags(flags) => Some((
                "flag",
                flags
                    .flags
                    .iter()
                    .map(|flag| (flag.name.clone(), String::new()))
                    .collect(),
            )),
            TypeDefKind::Resource
            | TypeDefKind::Handle(_)
            | TypeDefKind::Tuple(_)
            | TypeDefKind::Option(_)
            | TypeDefKind::Result(_)
            | TypeDefKind::List(_)
            | TypeDefKind::Map(..)
            | TypeDefKind::FixedLengthList(..)
            | TypeDefKind::Future(_)
            | TypeDefKind::Stream(_)
            | TypeDefKind::Type(_)
            | TypeDefKind::Unknown => None,
        }
    }

    fn signature(&self, function: &Function) -> String {
        let parameters = function
            .params
            .iter()
            .map(|parameter| format!("{}: {}", parameter.name, self.used(&parameter.ty)));
        let result = function
            .result
            .as_ref()
            .map_or_else(String::new, |ty| format!(" -> {}", self.used(ty)));
        let asynchronous = if function.kind.is_async() {
            "async "
        } else {
            ""
        };
        format!("{asynchronous}func({}){result}", join(parameters))
    }
}

fn join(texts: impl Iterator<Item = String>) -> String {
    texts.collect::<Vec<_>>().join(", ")
}

/// Compares two versions of a package; an empty list: nothing that a guest could see changed.
///
/// # Errors
/// [`WitError::OtherPackage`].
pub fn compare(old: &WitPackage, new: &WitPackage) -> Result<Vec<WitChange>, WitError> {
    let (old_name, new_name) = (&old.package().name, &new.package().name);
    let major = |name: &wit_parser::PackageName| name.version.as_ref().map(|version| version.major);
    if old_name.namespace != new_name.namespace
        || old_name.name != new_name.name
        || major(old_name) != major(new_name)
    {
        return Err(WitError::OtherPackage {
            old: old_name.to_string(),
            new: new_name.to_string(),
        });
    }
    let mut changes = Changes(Vec::new());
    // What was exported decides: guests of the old version export it.
    let exported = old.exported();
    for (name, before) in old.interfaces() {
        match new.interface(name) {
            Some(after) => {
                compare_functions(
                    &mut changes,
                    name,
                    (old, before),
                    (new, after),
                    exported.contains(name),
                );
                compare_types(&mut changes, name, (old, before), (new, after));
            }
            None => changes.breaks(
                format!("interface {name}"),
                "was removed, and old guests name it",
            ),
        }
    }
    for (name, _) in new.interfaces() {
        if old.interface(name).is_none() {
            changes.survives(format!("interface {name}"), "is new");
        }
    }
    for (name, before) in old.worlds() {
        match new.world(name) {
            Some(after) => compare_worlds(&mut changes, name, (old, before), (new, after)),
            None => changes.breaks(
                format!("world {name}"),
                "was removed: its plugins are of no kind any more",
            ),
        }
    }
    for (name, _) in new.worlds() {
        if old.world(name).is_none() {
            changes.survives(format!("world {name}"), "is new");
        }
    }
    changes.0.sort();
    Ok(changes.0)
}

struct Changes(Vec<WitChange>);

impl Changes {
    fn breaks(&mut self, item: String, what: impl Into<String>) {
        self.0.push(WitChange {
            effect: Effect::Breaks,
            item,
            what: what.into(),
        });
    }

    fn survives(&mut self, item: String, what: impl Into<String>) {
        self.0.push(WitChange {
            effect: Effect::Survives,
            item,
            what: what.into(),
        });
    }
}

fn compare_functions(
    changes: &mut Changes,
    interface: &str,
    (old, before): (&WitPackage, &Interface),
    (new, after): (&WitPackage, &Interface),
    is_exported: bool,
) {
    for (name, function) in &before.functions {
        let item = format!("{interface}.{name}");
        match after.functions.get(name) {
            None if is_exported => {
                changes.breaks(
                    item,
                    "the function was removed: hosts do not call it in old guests any more",
                );
            }
            None => changes.breaks(
                item,
                "the function was removed: old guests that import it do not link",
            ),
            Some(other) => {
                let (old, new) = (old.signature(function), new.signature(other));
                if old != new {
                    changes.breaks(item, format!("the function was `{old}` and is `{new}`"));
                }
            }
        }
    }
    for name in after
        .functions
        .keys()
        .filter(|name| !before.functions.contains_key(*name))
    {
        let item = format!("{interface}.{name}");
        if is_exported {
            changes.breaks(
                item,
                "the function is new in an interface that plugins export: old guests do not have it. Put it into an interface of its own",
            );
        } else {
            changes.survives(
                item,
                "the function is new in an interface that plugins import",
            );
        }
    }
}

fn compare_types(
    changes: &mut Changes,
    interface: &str,
    (old, before): (&WitPackage, &Interface),
    (new, after): (&WitPackage, &Interface),
) {
    for (name, id) in &before.types {
        let item = format!("{interface}.{name}");
        let def = &old.resolve.types[*id];
        let Some(other) = after.types.get(name).map(|id| &new.resolve.types[*id]) else {
            changes.breaks(item, format!("the {} was removed", def.kind.as_str()));
            continue;
        };
        match (old.parts(def), new.parts(other)) {
            (Some((word, before)), Some((other_word, after))) if word == other_word => {
                compare_parts(changes, &item, def.kind.as_str(), word, &before, &after);
                if def.kind.as_str() != other.kind.as_str() {
                    changes.breaks(
                        item,
                        format!(
                            "was a {} and is a {}",
                            def.kind.as_str(),
                            other.kind.as_str()
                        ),
                    );
                }
            }
            (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) | (None, None) => {
                let (old, new) = (old.shape(def), new.shape(other));
                if old != new {
                    changes.breaks(item, format!("the type was `{old}` and is `{new}`"));
                }
            }
        }
    }
    for name in after
        .types
        .keys()
        .filter(|name| !before.types.contains_key(*name))
    {
        changes.survives(format!("{interface}.{name}"), "the type is new");
    }
}

fn compare_parts(
    changes: &mut Changes,
    item: &str,
    kind: &str,
    word: &str,
    before: &[(String, String)],
    after: &[(String, String)],
) {
    let old: BTreeMap<_, _> = before.iter().map(|(name, ty)| (name, ty)).collect();
    let new: BTreeMap<_, _> = after.iter().map(|(name, ty)| (name, ty)).collect();
    let mut found = false;
    for (name, ty) in before {
        match new.get(name) {
            None => {
                found = true;
                changes.breaks(
                    item.to_owned(),
                    format!("the {word} `{name}` was removed from the {kind}"),
                );
            }
            Some(other) if *other != ty => {
                found = true;
                changes.breaks(
                    item.to_owned(),
                    format!("the {word} `{name}` was `{ty}` and is `{other}`"),
                );
            }
            Some(_) => {}
        }
    }
    for (name, _) in after.iter().filter(|(name, _)| !old.contains_key(name)) {
        found = true;
        changes.breaks(
            item.to_owned(),
            format!("the {word} `{name}` is new in the {kind}: records, enums and variants are frozen. Use an attribute or a code"),
        );
    }
    if !found && before != after {
        changes.breaks(
            item.to_owned(),
            format!("the {word}s stand in another order, and order is part of the type"),
        );
    }
}

fn compare_worlds(
    changes: &mut Changes,
    world: &str,
    (old, before): (&WitPackage, &World),
    (new, after): (&WitPackage, &World),
) {
    let names = |package: &WitPackage, items: &World, side: Side| -> BTreeSet<String> {
        let items = match side {
            Side::Imports => &items.imports,
            Side::Exports => &items.exports,
        };
        items
            .iter()
            .map(|(key, item)| package.item_name(key, item))
            .collect()
    };
    let (was, is) = (
        names(old, before, Side::Imports),
        names(new, after, Side::Imports),
    );
    for name in was.difference(&is) {
        changes.breaks(
            format!("world {world}"),
            format!("does not import `{name}` any more: old guests do not link"),
        );
    }
    for name in is.difference(&was) {
        changes.survives(format!("world {world}"), format!("imports `{name}` too"));
    }
    let (was, is) = (
        names(old, before, Side::Exports),
        names(new, after, Side::Exports),
    );
    for name in was.difference(&is) {
        changes.breaks(
            format!("world {world}"),
            format!("does not export `{name}` any more: hosts do not call it in old guests"),
        );
    }
    for name in is.difference(&was) {
        changes.breaks(
            format!("world {world}"),
            format!("exports `{name}` too, which old guests do not have. Probe for it instead: leave it out of the world"),
        );
    }
}

#[derive(Clone, Copy)]
enum Side {
    Imports,
    Exports,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contract as one text, with the package's head.
    fn contract() -> String {
        [
            include_str!("../../../wit/types.wit"),
            include_str!("../../../wit/host.wit"),
            include_str!("../../../wit/tech-stack.wit"),
            include_str!("../../../wit/deployment-strategy.wit"),
            include_str!("../../../wit/diagnostic.wit"),
            include_str!("../../../wit/public-command.wit"),
        ]
        .join("\n")
    }

    /// The contract after one made-up change.
    fn evolved(from: &str, to: &str) -> Vec<(Effect, String)> {
        let text = contract();
        assert_eq!(
            text.matches(from).count(),
            1,
            "`{from}` must stand in the contract once"
        );
        let old = WitPackage::parse("old.wit", &text).unwrap();
        let new = WitPackage::parse("new.wit", &text.replace(from, to)).unwrap();
        compare(&old, &new)
            .unwrap()
            .into_iter()
            .map(|change| (change.effect, format!("{}: {}", change.item, change.what)))
            .collect()
    }

    const LOG: &str = "log: func(level: level, message: string, fields: attributes);";
    const RENDER: &str =
        "render: func(request: render-request) -> result<rendered-command, plugin-error>;";

    #[test]
    fn nothing_changed_and_comments_are_nothing() {
        let text = contract();
        let old = WitPackage::parse("old.wit", &text).unwrap();
        let new = WitPackage::parse(
            "new.wit",
            &text.replace("/// A script.", "/// Some script."),
        )
        .unwrap();
        assert_eq!(compare(&old, &new).unwrap(), []);
    }

    #[test]
    fn what_old_guests_survive_passes() {
        for (from, to, says) in [
            (LOG, format!("{LOG}\nflush: func();"), "logging.flush: the function is new in an interface that plugins import"),
            (LOG, format!("{LOG}\nrecord more {{ text: string }}"), "logging.more: the type is new"),
            ("/// A public command.\nworld", "interface hook { run: func(); }\nworld".to_owned(), "interface hook: is new"),
            (
                "/// A public command.\nworld",
                "world night-watch { export plugin-info; }\nworld".to_owned(),
                "world night-watch: is new",
            ),
            (
                "    import logging;\n    export plugin-info;\n    export command;",
                "    import logging;\n    import resources;\n    export plugin-info;\n    export command;".to_owned(),
                "world public-command: imports `resources` too",
            ),
        ] {
            let changes = evolved(from, &to);
            assert_eq!(changes.len(), 1, "{changes:?}");
            assert_eq!(changes[0].0, Effect::Survives, "{changes:?}");
            assert_eq!(changes[0].1, says);
        }
    }

    #[test]
    fn what_breaks_old_guests_is_caught_and_named() {
        for (from, to, says) in [
            (
                RENDER,
                format!("{RENDER}\npreview: func(request: render-request) -> string;"),
                "command.preview: the function is new in an interface that plugins export",
            ),
            (LOG, String::new(), "logging.log: the function was removed: old guests that import it do not link"),
            (RENDER, String::new(), "command.render: the function was removed: hosts do not call it"),
            (
                LOG,
                LOG.replace("message: string", "message: list<u8>"),
                "logging.log: the function was `func(level: logging.level, message: string, fields: types.attributes)` and is",
            ),
            (
                "        run-as: option<string>,\n        /// Environment: where parameters go.",
                "        run-as: option<string>,\n        nice: option<u8>,\n".to_owned(),
                "command.rendered-command: the field `nice` is new in the record",
            ),
            (
                "        /// Bytes that were dropped from the middle of `output`.\n        dropped-bytes: u64,",
                String::new(),
                "command.interpret-request: the field `dropped-bytes` was removed",
            ),
            (
                "        dropped-bytes: u64,",
                "        dropped-bytes: u32,".to_owned(),
                "command.interpret-request: the field `dropped-bytes` was `u64` and is `u32`",
            ),
            (
                "        /// Every detail.\n        trace,",
                "        verbose,\n        trace,".to_owned(),
                "logging.level: the case `verbose` is new in the enum",
            ),
            (
                "        /// Go on.\n        go-on,\n        /// Wait for a person.\n        hold,",
                "        hold,\n        go-on,".to_owned(),
                "strategy.verdict: the cases stand in another order",
            ),
            (
                "        /// 0, until a person sets it.\n        keep-zero,",
                "        keep-zero,\n        half,".to_owned(),
                "strategy.weight: the case `half` is new in the variant",
            ),
            (
                "        exactly(u32),",
                "        exactly(u8),".to_owned(),
                "strategy.weight: the case `exactly` was `u32` and is `u8`",
            ),
            (
                "type json = string;",
                "type json = list<u8>;".to_owned(),
                "types.json: the type was `string` and is `list<u8>`",
            ),
            (
                "    import logging;\n    export plugin-info;\n    export command;",
                "    import logging;\n    export plugin-info;\n    export command;\n    export strategy;".to_owned(),
                "world public-command: exports `strategy` too, which old guests do not have",
            ),
            (
                "    import logging;\n    import probes;",
                "    import logging;".to_owned(),
                "world diagnostic: does not import `probes` any more",
            ),
        ] {
            let changes = evolved(from, &to);
            assert!(
                changes.iter().any(|(effect, text)| *effect == Effect::Breaks && text.starts_with(says)),
                "{says}: {changes:#?}"
            );
            assert!(changes.iter().all(|(effect, _)| *effect == Effect::Breaks), "{changes:#?}");
        }
    }

    #[test]
    fn another_package_or_major_version_is_no_evolution() {
        let text = contract();
        let old = WitPackage::parse("old.wit", &text).unwrap();
        for other in [
            "package windlass:plugin@2.0.0;",
            "package vendor:plugin@1.0.0;",
        ] {
            let new = WitPackage::parse(
                "new.wit",
                &text.replace("package windlass:plugin@1.0.0;", other),
            )
            .unwrap();
            assert!(matches!(
                compare(&old, &new),
                Err(WitError::OtherPackage { .. })
            ));
        }
        let minor = text.replace(
            "package windlass:plugin@1.0.0;",
            "package windlass:plugin@1.1.0;",
        );
        let new = WitPackage::parse("new.wit", &minor).unwrap();
        assert_eq!(compare(&old, &new).unwrap(), []);
        assert!(matches!(
            WitPackage::parse("x.wit", "interface {"),
            Err(WitError::Unreadable { .. })
        ));
    }
}
