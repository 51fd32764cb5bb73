//! ECI parameters: flat names such as `Container.1.EnvironmentVar.2.Key` become a tree. Pure.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::group::{
    quantity::{self, QuantityError},
    violation::{ViolationKind, Violations},
};

/// Most name parts of a parameter.
const MAX_DEPTH: usize = 16;
/// Most parameters of a request.
const MAX_PARAMETERS: usize = 20_000;

/// One level of the tree: a value, or named things below it.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Params {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    below: BTreeMap<String, Params>,
}

impl fmt::Debug for Params {
    /// Without values: there are secrets among them.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.below.keys()).finish()
    }
}

/// Why parameters can't be read at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// Too deep.
    #[error("Parameter {name:?} has more than {MAX_DEPTH} parts")]
    Depth {
        /// Its name.
        name: String,
    },
    /// Too many.
    #[error("The request has more than {MAX_PARAMETERS} parameters")]
    Count,
    /// The same name twice.
    #[error("Parameter {name:?} is given twice with different values")]
    Twice {
        /// Its name.
        name: String,
    },
}

impl Params {
    /// Makes the tree of flat parameters.
    ///
    /// # Errors
    /// Names too deep, or given twice with different values.
    pub fn parse<N, V>(pairs: impl IntoIterator<Item = (N, V)>) -> Result<Self, ParamsError>
    where
        N: AsRef<str>,
        V: Into<String>,
    {
        let mut root = Self::default();
        for (count, (name, value)) in pairs.into_iter().enumerate() {
            if count >= MAX_PARAMETERS {
                return Err(ParamsError::Count);
            }
            let name = name.as_ref();
            let value = value.into();
            let mut node = &mut root;
            for (depth, part) in name.split('.').enumerate() {
                if depth >= MAX_DEPTH {
                    return Err(ParamsError::Depth {
                        name: name.to_owned(),
                    });
                }
                node = node.below.entry(part.to_owned()).or_default();
            }
            if node.value.as_ref().is_some_and(|before| *before != value) {
                return Err(ParamsError::Twice {
                    name: name.to_owned(),
                });
            }
            node.value = Some(value);
        }
        Ok(root)
    }

    /// Makes the tree of a JSON object in which lists are arrays; for the local door.
    ///
    /// # Errors
    /// Nested too deep.
    pub fn from_json(value: &serde_json::Value) -> Result<Self, ParamsError> {
        fn convert(value: &serde_json::Value, depth: usize) -> Result<Params, ParamsError> {
            use serde_json::Value;
            if depth > MAX_DEPTH {
                return Err(ParamsError::Depth { name: String::new() });
            }
            let text = |text: String| Params {
                value: Some(text),
                below: BTreeMap::new(),
            };
            let below = match value {
                Value::Null => return Ok(Params::default()),
                Value::Bool(value) => return Ok(text(value.to_string())),
                Value::Number(value) => return Ok(text(value.to_string())),
                Value::String(value) => return Ok(text(value.clone())),
                Value::Array(items) => items
                    .iter()
                    .enumerate()
                    .map(|(index, item)| Ok(((index + 1).to_string(), convert(item, depth + 1)?)))
                    .collect::<Result<_, _>>()?,
                Value::Object(fields) => fields
                    .iter()
                    .map(|(name, field)| Ok((name.clone(), convert(field, depth + 1)?)))
                    .collect::<Result<_, _>>()?,
            };
            Ok(Params { value: None, below })
        }
        convert(value, 0)
    }

    /// The value of a top-level parameter; empty text is none.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.below
            .get(name)?
            .value
            .as_deref()
            .filter(|value| !value.is_empty())
    }

    /// Sets a top-level parameter, whatever it was.
    pub fn set(&mut self, name: &str, value: &str) {
        let node = Self {
            value: Some(value.to_owned()),
            below: BTreeMap::new(),
        };
        self.below.insert(name.to_owned(), node);
    }

    /// Adds a top-level parameter unless it is there.
    pub fn set_default(&mut self, name: &str, value: &str) {
        let node = self.below.entry(name.to_owned()).or_default();
        if node.value.is_none() {
            node.value = Some(value.to_owned());
        }
    }

    /// The same without some top-level parameters.
    #[must_use]
    pub fn without(&self, names: &[&str]) -> Self {
        let mut rest = self.clone();
        rest.below.retain(|name, _| !names.contains(&name.as_str()));
        rest
    }

    /// The top-level parameters of these names, where they are given.
    #[must_use]
    pub fn only(&self, names: &[&str]) -> Self {
        let mut rest = self.clone();
        rest.below.retain(|name, _| names.contains(&name.as_str()));
        rest
    }

    /// Takes over each parameter that is given at the top, with all below it.
    #[must_use]
    pub fn replaced_by(&self, given: &Self) -> Self {
        let mut all = self.clone();
        all.below.extend(given.below.clone());
        all
    }

    /// Takes over what is given and keeps the rest, at every level. A list is replaced as a whole, unless `keys` knows the
    /// field its items are told apart by: then those of the same name are merged, and others follow.
    #[must_use]
    pub fn merged_with(&self, given: &Self, keys: &[(&str, &str)]) -> Self {
        let mut all = self.clone();
        if given.value.is_some() {
            all.value.clone_from(&given.value);
        }
        for (name, given) in &given.below {
            let key = keys.iter().find(|(list, _)| list == name);
            let merged = match (all.below.get(name), key) {
                (None, _) => given.clone(),
                (Some(before), Some((_, key))) => before.list_merged_with(given, key),
                (Some(_), None) if given.is_list() => given.clone(),
                // Lists in items are never merged: their items have no names.
                (Some(before), None) => before.merged_with(given, &[]),
            };
            all.below.insert(name.clone(), merged);
        }
        all
    }

    fn is_list(&self) -> bool {
        !self.below.is_empty() && self.below.keys().all(|name| name.parse::<u32>().is_ok())
    }

    /// The items of a list in their order.
    fn items(&self) -> Vec<&Self> {
        let mut items: Vec<_> = self
            .below
            .iter()
            .filter_map(|(name, item)| Some((name.parse::<u32>().ok()?, item)))
            .collect();
        items.sort_by_key(|(index, _)| *index);
        items.into_iter().map(|(_, item)| item).collect()
    }

    fn list_merged_with(&self, given: &Self, key: &str) -> Self {
        if !given.is_list() {
            return given.clone();
        }
        let mut all: Vec<Self> = self.items().into_iter().cloned().collect();
        for item in given.items() {
            let same = |before: &&mut Self| item.get(key).is_some() && before.get(key) == item.get(key);
            match all.iter_mut().find(same) {
                Some(before) => *before = before.merged_with(item, &[]),
                None => all.push(item.clone()),
            }
        }
        let numbered = all.into_iter().enumerate();
        Self {
            value: None,
            below: numbered
                .map(|(index, item)| ((index + 1).to_string(), item))
                .collect(),
        }
    }

    /// The canonical text of everything but the named top-level parameters; equal requests have equal texts.
    pub fn fingerprint(&self, without: &[&str]) -> String {
        fn write(node: &Params, path: &str, text: &mut String) {
            if let Some(value) = &node.value {
                // Lengths make it unambiguous.
                text.push_str(&format!("{}:{path}={}:{value};", path.len(), value.len()));
            }
            for (name, below) in &node.below {
                write(below, &format!("{path}.{name}"), text);
            }
        }
        let mut text = String::new();
        for (name, node) in &self.below {
            if !without.contains(&name.as_str()) {
                write(node, name, &mut text);
            }
        }
        text
    }
}

/// Reads typed values of a part of the tree; mistakes are collected, not returned.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    node: Option<&'a Params>,
    path: String,
    found: &'a RefCell<Violations>,
}

impl<'a> Reader<'a> {
    /// Reads from the top.
    pub fn new(params: &'a Params, found: &'a RefCell<Violations>) -> Self {
        Self {
            node: Some(params),
            path: String::new(),
            found,
        }
    }

    /// The name of a field as the user wrote it.
    pub fn name(&self, field: &str) -> String {
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    /// An object below.
    pub fn object(&self, field: &str) -> Self {
        Self {
            node: self.node.and_then(|node| node.below.get(field)),
            path: self.name(field),
            found: self.found,
        }
    }

    /// Whether anything is said here.
    pub fn is_given(&self) -> bool {
        fn given(node: &Params) -> bool {
            node.value.as_deref().is_some_and(|value| !value.is_empty()) || node.below.values().any(given)
        }
        self.node.is_some_and(given)
    }

    /// The items of a list, by index; gaps are tolerated.
    pub fn list(&self, field: &str) -> Vec<Self> {
        let list = self.object(field);
        let mut items = Vec::new();
        let mut seen = HashSet::new();
        for (key, node) in list.node.iter().flat_map(|node| &node.below) {
            match key.parse::<u32>() {
                Ok(index) if index > 0 && seen.insert(index) => items.push((
                    index,
                    Self {
                        node: Some(node),
                        path: format!("{}.{key}", list.path),
                        found: self.found,
                    },
                )),
                _ => self.found.borrow_mut().invalid(
                    format!("{}.{key}", list.path),
                    key,
                    "not a list index; valid: numbers from 1, each once",
                ),
            }
        }
        items.sort_by_key(|(index, _)| *index);
        items.into_iter().map(|(_, item)| item).collect()
    }

    /// The texts of a list of texts.
    pub fn texts(&self, field: &str) -> Vec<String> {
        self.list(field)
            .iter()
            .map(|item| item.own_text().unwrap_or_default().to_owned())
            .collect()
    }

    /// This node's own value.
    pub fn own_text(&self) -> Option<&'a str> {
        self.node?.value.as_deref()
    }

    /// A text; empty is none.
    pub fn text(&self, field: &str) -> Option<&'a str> {
        self.node?.get(field)
    }

    /// A text that must be there; its absence is noted and empty text returned.
    pub fn required(&self, field: &str) -> String {
        self.text(field).map_or_else(
            || {
                self.note(ViolationKind::Missing, field, "", "required");
                String::new()
            },
            str::to_owned,
        )
    }

    /// A text that is typed: the word `None`, which an old SDK sends for what is unset, is none.
    pub fn word(&self, field: &str) -> Option<&'a str> {
        self.text(field).filter(|text| *text != "None")
    }

    /// One of several words.
    pub fn choice<T: Copy>(&self, field: &str, choices: &[(&str, T)]) -> Option<T> {
        let word = self.text(field)?;
        let chosen = choices.iter().find(|(name, _)| *name == word);
        if chosen.is_none() && word != "None" {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            self.note(
                ViolationKind::Invalid,
                field,
                word,
                &format!("valid: {}", names.join(", ")),
            );
        }
        chosen.map(|(_, value)| *value)
    }

    /// A truth value, however it is capitalised.
    pub fn flag(&self, field: &str) -> Option<bool> {
        let word = self.word(field)?;
        if word.eq_ignore_ascii_case("true") {
            Some(true)
        } else if word.eq_ignore_ascii_case("false") {
            Some(false)
        } else {
            self.note(ViolationKind::Invalid, field, word, "valid: true or false");
            None
        }
    }

    /// A whole number within a range.
    pub fn number(&self, field: &str, valid: std::ops::RangeInclusive<u64>) -> Option<u64> {
        let word = self.word(field)?;
        // Some generators write whole numbers of float fields as 30.0.
        let digits = word.strip_suffix(".0").unwrap_or(word);
        match digits.parse::<u64>() {
            Ok(number) if valid.contains(&number) => Some(number),
            _ => {
                self.note(
                    ViolationKind::Invalid,
                    field,
                    word,
                    &format!("valid: {} to {}", valid.start(), valid.end()),
                );
                None
            }
        }
    }

    /// A decimal number in thousandths, rounded up.
    pub fn milli(&self, field: &str) -> Option<u32> {
        let word = self.word(field)?;
        let plain = word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let result = if plain {
            quantity::parse_milli(word)
        } else {
            Err(QuantityError::Form)
        };
        match result {
            Ok(0) => {
                self.note(ViolationKind::Size, field, word, "valid: more than 0");
                None
            }
            Ok(milli) => Some(milli),
            Err(_) => {
                self.note(
                    ViolationKind::Size,
                    field,
                    word,
                    "valid: a decimal number such as 0.5 or 2",
                );
                None
            }
        }
    }

    /// Notes a mistake in a field.
    pub fn note(&self, kind: ViolationKind, field: &str, value: &str, problem: &str) {
        self.found
            .borrow_mut()
            .add(kind, self.name(field), value, problem);
    }

    /// Notes a field that is given but not supported.
    pub fn refuse(&self, field: &str, instead: &str) {
        if self.object(field).is_given() && self.word(field).is_some_or_below(self.object(field).node) {
            let value = self.text(field).unwrap_or_default().to_owned();
            self.note(ViolationKind::Unsupported, field, &value, instead);
        }
    }
}

trait GivenOrBelow {
    fn is_some_or_below(&self, node: Option<&Params>) -> bool;
}

impl GivenOrBelow for Option<&str> {
    /// A typed value, or an object or list.
    fn is_some_or_below(&self, node: Option<&Params>) -> bool {
        self.is_some() || node.is_some_and(|node| !node.below.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Params {
        Params::parse(pairs.iter().copied()).unwrap()
    }

    #[test]
    fn lists_are_ordered_by_index_and_gaps_tolerated() {
        let params = parse(&[("A.10.X", "c"), ("A.2.X", "b"), ("A.1.X", "a")]);
        let found = RefCell::default();
        let reader = Reader::new(&params, &found);
        let texts: Vec<_> = reader.list("A").iter().map(|item| item.text("X")).collect();
        assert_eq!(texts, [Some("a"), Some("b"), Some("c")]);
        assert_eq!(reader.list("A")[2].name("X"), "A.10.X");
        assert!(found.borrow().0.is_empty());
    }

    #[test]
    fn wrong_values_are_collected_with_their_names() {
        let params = parse(&[
            ("P.1.Port", "x"),
            ("P.1.Flag", "maybe"),
            ("Cpu", "-1"),
            ("L.x", "1"),
        ]);
        let found = RefCell::default();
        let reader = Reader::new(&params, &found);
        let port = &reader.list("P")[0];
        assert_eq!(port.number("Port", 1..=9), None);
        assert_eq!(port.flag("Flag"), None);
        assert_eq!(reader.milli("Cpu"), None);
        assert!(reader.list("L").is_empty());
        let fields: Vec<_> = found.borrow().0.iter().map(|v| v.field.clone()).collect();
        assert_eq!(fields, ["P.1.Port", "P.1.Flag", "Cpu", "L.x"]);
    }

    #[test]
    fn values_of_the_sdks() {
        let params = parse(&[("T", "True"), ("F", "false"), ("N", "None"), ("G", "2.0")]);
        let found = RefCell::default();
        let reader = Reader::new(&params, &found);
        assert_eq!(
            (reader.flag("T"), reader.flag("F"), reader.flag("N")),
            (Some(true), Some(false), None)
        );
        assert_eq!(
            (reader.number("G", 0..=5), reader.milli("G")),
            (Some(2), Some(2000))
        );
        assert!(found.borrow().0.is_empty());
    }

    #[test]
    fn json_is_the_same_tree() {
        let json = serde_json::json!({"Container": [{"Image": "a", "Port": [{"Port": 80}]}], "Cpu": 0.5, "Tty": true});
        let flat = parse(&[
            ("Container.1.Image", "a"),
            ("Container.1.Port.1.Port", "80"),
            ("Cpu", "0.5"),
            ("Tty", "true"),
        ]);
        assert_eq!(Params::from_json(&json).unwrap(), flat);
    }

    #[test]
    fn limits() {
        let deep = "a.".repeat(20);
        assert!(matches!(
            Params::parse([(deep.as_str(), "x")]),
            Err(ParamsError::Depth { .. })
        ));
        assert!(matches!(
            Params::parse([("a", "1"), ("a", "2")]),
            Err(ParamsError::Twice { .. })
        ));
        assert!(Params::parse([("a", "1"), ("a", "1")]).is_ok());
    }

    proptest! {
        #[test]
        fn any_names_are_answered(pairs in prop::collection::vec(("[A-C0-3.]{0,12}", "[a-zN0-9.]{0,6}"), 0..20)) {
            if let Ok(params) = Params::parse(pairs.iter().map(|(n, v)| (n.as_str(), v.as_str()))) {
                let found = RefCell::default();
                let reader = Reader::new(&params, &found);
                for item in reader.list("A") {
                    let _ = (item.milli("B"), item.flag("B"), item.number("B", 0..=3), item.texts("C"));
                }
                reader.refuse("B", "x");
            }
        }
    }
}
