//! Parameters from a schema: sets that fit it, and sets that break it in one place.
//!
//! The generator knows what plugins' schemas use: types, `const`, `enum`, properties and what is required of them, items,
//! bounds, lengths, patterns, local references, `anyOf`, `oneOf`, `allOf`. What it makes is a proposal: the validator has the
//! last word, and proposals that do not fit are thrown away. One seed gives the same sets on every machine.

use regex_syntax::hir::{Class, Hir, HirKind};
use serde_json::{Map, Number, Value, json};

/// Nesting that is followed; deeper values are the smallest ones.
const MAX_DEPTH: usize = 8;
/// Proposals for one wanted set.
const TRIES: usize = 20;
/// Longest text that is made where the schema sets no bound.
const TEXT: u64 = 24;

/// Pseudo-random numbers (SplitMix64): small, and the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Generator {
    state: u64,
}

/// How large a value is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// Only what is required, at the lower bounds.
    Smallest,
    /// Everything, at the upper bounds.
    Largest,
    /// Any.
    Any,
}

impl Generator {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, low: i64, high: i64) -> i64 {
        if high <= low {
            return low;
        }
        let width = high.abs_diff(low);
        let step = match width.checked_add(1) {
            Some(width) => self.next() % width,
            None => self.next(),
        };
        low.wrapping_add_unsigned(step)
    }

    fn chance(&mut self) -> bool {
        self.next() & 1 == 0
    }

    fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let last = i64::try_from(items.len()).ok()?.checked_sub(1)?;
        items.get(usize::try_from(self.between(0, last)).ok()?)
    }

    /// Up to `wanted` different sets of parameters that `fits` accepts: the smallest first, then the largest, then any.
    pub(crate) fn valid(
        &mut self,
        schema: &Value,
        wanted: usize,
        fits: impl Fn(&Value) -> bool,
    ) -> Vec<Value> {
        let mut found: Vec<Value> = Vec::new();
        for index in 0..wanted {
            let size = match index {
                0 => Size::Smallest,
                1 => Size::Largest,
                _ => Size::Any,
            };
            for _ in 0..TRIES {
                let proposal = self.value(schema, schema, size, 0);
                if !found.contains(&proposal) && fits(&proposal) {
                    found.push(proposal);
                    break;
                }
            }
        }
        found
    }

    fn value(&mut self, root: &Value, schema: &Value, size: Size, depth: usize) -> Value {
        let Some(schema) = resolve(root, schema) else {
            return json!({});
        };
        if let Some(only) = schema.get("const") {
            return only.clone();
        }
        if let Some(Value::Array(choices)) = schema.get("enum") {
            return self.choose(choices).cloned().unwrap_or(Value::Null);
        }
        for word in ["anyOf", "oneOf"] {
            if let Some(Value::Array(choices)) = schema.get(word)
                && let Some(choice) = self.choose(choices).cloned()
            {
                let mut merged = without(schema, word);
                merge(&mut merged, resolve(root, &choice).unwrap_or(&choice));
                return self.value(root, &merged, size, depth + 1);
            }
        }
        if let Some(Value::Array(parts)) = schema.get("allOf") {
            let mut merged = without(schema, "allOf");
            for part in parts {
                merge(&mut merged, resolve(root, part).unwrap_or(part));
            }
            return self.value(root, &merged, size, depth + 1);
        }
        // An author's own example is the best proposal, now and then.
        if size == Size::Any
            && let Some(Value::Array(examples)) = schema.get("examples")
            && self.chance()
            && let Some(example) = self.choose(examples)
        {
            return example.clone();
        }
        let named = match schema.get("type") {
            Some(Value::String(name)) => Some(name.clone()),
            Some(Value::Array(names)) => self
                .choose(names)
                .and_then(|name| name.as_str())
                .map(str::to_owned),
            _ => None,
        };
        let guessed = || {
            let has = |word| schema.get(word).is_some();
            if has("properties") || has("required") {
                "object"
            } else if has("items") || has("prefixItems") {
                "array"
            } else if has("minimum") || has("maximum") {
                "number"
            } else {
                "string"
            }
        };
        match named.as_deref().unwrap_or_else(guessed) {
            "object" => self.object(root, schema, size, depth),
            "array" => self.array(root, schema, size, depth),
            "integer" => self.integer(schema, size),
            "number" => self.number(schema, size),
            "boolean" => Value::Bool(self.chance()),
            "null" => Value::Null,
            _ => Value::String(self.text(schema, size)),
        }
    }

    fn object(&mut self, root: &Value, schema: &Value, size: Size, depth: usize) -> Value {
        let mut object = Map::new();
        let required: Vec<&str> = schema["required"]
            .as_array()
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let none = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&none);
        for (name, property) in properties {
            let wanted = required.contains(&name.as_str())
                || match size {
                    Size::Smallest => false,
                    Size::Largest => depth < MAX_DEPTH,
                    Size::Any => depth < MAX_DEPTH && self.chance(),
                };
            if wanted {
                object.insert(name.clone(), self.value(root, property, size, depth + 1));
            }
        }
        for name in required {
            if !object.contains_key(name) {
                object.insert(name.to_owned(), Value::String(self.text(&json!({}), size)));
            }
        }
        // Maps: names of the author's own.
        let (names, values) = match (
            &schema["patternProperties"],
            &schema["additionalProperties"],
        ) {
            (Value::Object(patterns), _) if !patterns.is_empty() => {
                let (pattern, values) = patterns
                    .iter()
                    .next()
                    .map_or(("", &Value::Null), |(p, v)| (p, v));
                (
                    json!({ "pattern": pattern, "minLength": 1 }),
                    values.clone(),
                )
            }
            (_, values @ Value::Object(_)) => {
                let names = schema
                    .get("propertyNames")
                    .cloned()
                    .unwrap_or_else(|| json!({ "pattern": "^[a-z]{1,8}$" }));
                (names, values.clone())
            }
            _ => return Value::Object(object),
        };
        let least = schema["minProperties"].as_u64().unwrap_or(0);
        let more = match size {
            Size::Smallest => least,
            Size::Largest | Size::Any if depth >= MAX_DEPTH => least,
            Size::Largest | Size::Any => least.max(2),
        };
        for _ in 0..more.min(20) {
            let name = self.text(&names, Size::Any);
            let value = self.value(root, &values, size, depth + 1);
            object.insert(name, value);
        }
        Value::Object(object)
    }

    fn array(&mut self, root: &Value, schema: &Value, size: Size, depth: usize) -> Value {
        let least = schema["minItems"].as_u64().unwrap_or(0);
        let most = schema["maxItems"]
            .as_u64()
            .unwrap_or(least + 3)
            .min(least.max(8));
        let length = match size {
            Size::Smallest => least,
            Size::Largest | Size::Any if depth >= MAX_DEPTH => least,
            Size::Largest => most,
            Size::Any => u64::try_from(self.between(signed(least), signed(most))).unwrap_or(least),
        };
        let mut items: Vec<Value> = Vec::new();
        let unique = schema["uniqueItems"] == json!(true);
        for index in 0..length {
            let item = schema["prefixItems"]
                .get(usize::try_from(index).unwrap_or(usize::MAX))
                .or_else(|| schema.get("items"))
                .cloned()
                .unwrap_or_else(|| json!({ "type": "string" }));
            let value = self.value(root, &item, size, depth + 1);
            if !(unique && items.contains(&value)) {
                items.push(value);
            }
        }
        Value::Array(items)
    }

    fn integer(&mut self, schema: &Value, size: Size) -> Value {
        let (low, high) = integer_bounds(schema);
        let step = schema["multipleOf"]
            .as_i64()
            .filter(|step| *step > 0)
            .unwrap_or(1);
        let figure = match size {
            Size::Smallest => low,
            Size::Largest => high,
            Size::Any => self.between(low, high),
        };
        let down = figure.div_euclid(step) * step;
        json!(if down < low {
            down.saturating_add(step)
        } else {
            down
        })
    }

    fn number(&mut self, schema: &Value, size: Size) -> Value {
        let bound = |word: &str, exclusive: &str, nudge: f64| {
            schema[word]
                .as_f64()
                .or_else(|| schema[exclusive].as_f64().map(|figure| figure + nudge))
        };
        let low = bound("minimum", "exclusiveMinimum", 0.5);
        let high = bound("maximum", "exclusiveMaximum", -0.5);
        let low_figure = low.unwrap_or_else(|| high.map_or(0.0, |high| high - 1000.0));
        let high_figure = high.unwrap_or(low_figure + 1000.0);
        let share = match size {
            Size::Smallest => 0.0,
            Size::Largest => 1.0,
            Size::Any => self.between(0, 16) as f64 / 16.0,
        };
        let figure = low_figure + (high_figure - low_figure) * share;
        Number::from_f64(figure).map_or(Value::Null, Value::Number)
    }

    fn text(&mut self, schema: &Value, size: Size) -> String {
        let least = schema["minLength"].as_u64().unwrap_or(0);
        let most = schema["maxLength"].as_u64().unwrap_or(least.max(TEXT));
        if let Some(pattern) = schema["pattern"].as_str()
            && let Ok(parsed) = regex_syntax::parse(pattern)
        {
            // A pattern that is not anchored allows more around it: what it matches itself is enough.
            let mut text = String::new();
            self.matching(&parsed, &mut text, 0);
            while (text.chars().count() as u64) < least {
                let before = text.len();
                self.matching(&parsed, &mut text, 0);
                if text.len() == before {
                    break;
                }
            }
            return text
                .chars()
                .take(usize::try_from(most).unwrap_or(usize::MAX))
                .collect();
        }
        let length = match size {
            Size::Smallest => least,
            Size::Largest => most.min(least.max(4096)),
            Size::Any => u64::try_from(self.between(signed(least), signed(most.min(least + TEXT))))
                .unwrap_or(least),
        };
        const LETTERS: [char; 16] = [
            'a', 'b', 'z', 'A', '0', '9', '-', '_', '.', '/', ' ', '"', '\'', '$', 'ä', '→',
        ];
        (0..length)
            .map(|_| self.choose(&LETTERS).copied().unwrap_or('a'))
            .collect()
    }

    /// Something that a pattern matches.
    fn matching(&mut self, hir: &Hir, text: &mut String, depth: usize) {
        if depth > 64 || text.len() > 8192 {
            return;
        }
        match hir.kind() {
            HirKind::Empty | HirKind::Look(_) => {}
            HirKind::Literal(literal) => text.push_str(&String::from_utf8_lossy(&literal.0)),
            HirKind::Class(Class::Unicode(class)) => {
                let range = self.choose(class.ranges()).copied();
                if let Some(range) = range {
                    let (low, high) = (
                        i64::from(u32::from(range.start())),
                        i64::from(u32::from(range.end())),
                    );
                    let high = high.min(low + 25);
                    let letter = u32::try_from(self.between(low, high))
                        .ok()
                        .and_then(char::from_u32);
                    text.push(letter.unwrap_or(range.start()));
                }
            }
            HirKind::Class(Class::Bytes(class)) => {
                let range = self.choose(class.ranges()).copied();
                if let Some(range) = range {
                    text.push(char::from(range.start()));
                }
            }
            HirKind::Repetition(repetition) => {
                let most = repetition
                    .max
                    .unwrap_or(repetition.min + 6)
                    .min(repetition.min + 12);
                let times = self.between(i64::from(repetition.min), i64::from(most));
                for _ in 0..times.clamp(0, 4096) {
                    self.matching(&repetition.sub, text, depth + 1);
                }
            }
            HirKind::Capture(capture) => self.matching(&capture.sub, text, depth + 1),
            HirKind::Concat(parts) => {
                for part in parts {
                    self.matching(part, text, depth + 1);
                }
            }
            HirKind::Alternation(choices) => {
                if let Some(choice) = self.choose(choices) {
                    self.matching(choice, text, depth + 1);
                }
            }
        }
    }
}

fn signed(figure: u64) -> i64 {
    i64::try_from(figure).unwrap_or(i64::MAX)
}

fn integer_bounds(schema: &Value) -> (i64, i64) {
    let low = schema["minimum"].as_i64().or_else(|| {
        schema["exclusiveMinimum"]
            .as_i64()
            .map(|figure| figure.saturating_add(1))
    });
    let high = schema["maximum"].as_i64().or_else(|| {
        schema["exclusiveMaximum"]
            .as_i64()
            .map(|figure| figure.saturating_sub(1))
    });
    match (low, high) {
        (Some(low), Some(high)) => (low, high),
        (Some(low), None) => (low, low.saturating_add(1000)),
        (None, Some(high)) => (high.saturating_sub(1000), high),
        (None, None) => (0, 1000),
    }
}

/// Follows local references.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> Option<&'a Value> {
    let mut schema = schema;
    for _ in 0..MAX_DEPTH {
        match schema.get("$ref").and_then(Value::as_str) {
            None => return Some(schema),
            Some("#") => schema = root,
            Some(reference) => schema = root.pointer(reference.strip_prefix('#')?)?,
        }
    }
    None
}

fn without(schema: &Value, word: &str) -> Value {
    let mut copy = schema.clone();
    if let Some(object) = copy.as_object_mut() {
        object.remove(word);
    }
    copy
}

/// Lays `more` over a schema: properties and required names are joined, other words are replaced.
fn merge(schema: &mut Value, more: &Value) {
    let (Some(schema), Some(more)) = (schema.as_object_mut(), more.as_object()) else {
        return;
    };
    for (word, value) in more {
        match (schema.get_mut(word), value) {
            (Some(Value::Object(have)), Value::Object(more)) if word == "properties" => {
                have.extend(more.clone());
            }
            (Some(Value::Array(have)), Value::Array(more)) if word == "required" => {
                have.extend(more.clone());
            }
            (Some(_) | None, _) => {
                schema.insert(word.clone(), value.clone());
            }
        }
    }
}

/// A set of parameters that breaks the schema in one place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Broken {
    /// What is wrong with it.
    pub(crate) how: String,
    /// The set.
    pub(crate) parameters: Value,
}

/// Breaks `good` in one place at a time, as the schema's own words allow.
pub(crate) fn broken(root: &Value, good: &Value) -> Vec<Broken> {
    let mut sets = Vec::new();
    let Some(schema) = resolve(root, root) else {
        return sets;
    };
    let Value::Object(good) = good else {
        return sets;
    };
    let mut push = |how: String, change: &dyn Fn(&mut Map<String, Value>)| {
        let mut parameters = good.clone();
        change(&mut parameters);
        sets.push(Broken {
            how,
            parameters: Value::Object(parameters),
        });
    };
    if schema["additionalProperties"] == json!(false) {
        push("an unknown parameter".into(), &|set| {
            set.insert("no-such-parameter".into(), json!(1));
        });
    }
    for name in schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        push(format!("`{name}` is missing"), &|set| {
            set.remove(name);
        });
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let Some(property) = resolve(root, property) else {
            continue;
        };
        let mut wrong: Vec<(&str, Value)> = vec![
            ("is a list of lists", json!([[[]]])),
            ("is null", Value::Null),
        ];
        let (low, high) = integer_bounds(property);
        let is_set = |words: [&str; 2]| words.iter().any(|word| property.get(word).is_some());
        if is_set(["minimum", "exclusiveMinimum"])
            && let Some(below) = low.checked_sub(1)
        {
            wrong.push(("is below its minimum", json!(below)));
        }
        if is_set(["maximum", "exclusiveMaximum"])
            && let Some(above) = high.checked_add(1)
        {
            wrong.push(("is above its maximum", json!(above)));
        }
        if let Some(most) = property["maxLength"]
            .as_u64()
            .filter(|most| *most <= 65_536)
        {
            let text = "x".repeat(usize::try_from(most).unwrap_or(0) + 1);
            wrong.push(("is too long", json!(text)));
        }
        if property.get("enum").is_some() || property.get("pattern").is_some() {
            wrong.push(("is no allowed text", json!("\u{1}no such choice\u{1}")));
        }
        for (how, value) in wrong {
            push(format!("`{name}` {how}"), &|set| {
                set.insert(name.clone(), value.clone());
            });
        }
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::Schema;

    fn fits(schema: &Value) -> impl Fn(&Value) -> bool {
        let schema = Schema::parse(&schema.to_string(), 64 * 1024).unwrap();
        move |value| schema.validate(value).is_ok()
    }

    #[test]
    fn sets_fit_every_word_that_is_known() {
        for schema in [
            json!({"type":"object","properties":{}}),
            json!({"type":"object","required":["port"],"properties":{"port":{"type":"integer","minimum":1,"maximum":65535}}}),
            json!({"type":"object","required":["a"],"properties":{"a":{"enum":["x","y"]},"b":{"const":3}}}),
            json!({"type":"object","required":["path"],"properties":{"path":{"type":"string","pattern":"^/[a-z]+(/[a-z0-9_-]{1,8})*$","maxLength":200}}}),
            json!({"type":"object","required":["names"],"properties":{"names":{"type":"array","minItems":2,"maxItems":4,"uniqueItems":true,
                "items":{"type":"string","pattern":"^[a-z]{3,9}$"}}}}),
            json!({"type":"object","additionalProperties":false,"required":["env"],"properties":{"env":{"type":"object",
                "propertyNames":{"pattern":"^[A-Za-z_][A-Za-z0-9_]*$"},"additionalProperties":{"anyOf":[{"type":"string"},
                {"type":"object","additionalProperties":false,"required":["secret_ref"],"properties":{"secret_ref":{"type":"string","minLength":1}}}]}}}}),
            json!({"type":"object","required":["p"],"properties":{"p":{"$ref":"#/$defs/p"}},"$defs":{"p":{"type":"number","exclusiveMinimum":0,"maximum":10}}}),
            json!({"type":"object","allOf":[{"required":["a"],"properties":{"a":{"type":"boolean"}}},{"required":["b"],"properties":{"b":{"type":["integer","null"],"multipleOf":5}}}]}),
        ] {
            let sets = Generator::new(1).valid(&schema, 16, fits(&schema));
            assert!(!sets.is_empty(), "{schema}");
            assert_eq!(
                sets,
                Generator::new(1).valid(&schema, 16, fits(&schema)),
                "one seed, the same sets"
            );
            // And each way of breaking them does break them.
            let fits = fits(&schema);
            let strict = schema.get("allOf").is_none();
            for broken in broken(&schema, &sets[0]) {
                let known = broken.how.contains("is null") && schema.to_string().contains("null");
                assert!(
                    !strict || known || !fits(&broken.parameters),
                    "{schema}: {broken:?}"
                );
            }
        }
    }

    #[test]
    fn the_bounds_are_among_them() {
        let schema = json!({"type":"object","required":["n"],"properties":{"n":{"type":"integer","minimum":3,"maximum":9}}});
        let sets = Generator::new(7).valid(&schema, 4, fits(&schema));
        assert!(
            sets.contains(&json!({"n":3})) && sets.contains(&json!({"n":9})),
            "{sets:?}"
        );
    }
}
