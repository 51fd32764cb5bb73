//! Where a field stands in a text, which deserialization that passes a field over does not tell: the text is read once
//! more, and reading ends with an error at the field's key. Parsers place errors by line.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_ignored::Path;

/// One step down into a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

/// The steps to a field; optional values and new types are none.
pub(super) fn steps(path: &Path<'_>) -> Vec<Step> {
    match path {
        Path::Root => Vec::new(),
        Path::Seq { parent, index } => with(parent, Step::Index(*index)),
        Path::Map { parent, key } => with(parent, Step::Key(key.clone())),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            steps(parent)
        }
    }
}

fn with(parent: &Path<'_>, step: Step) -> Vec<Step> {
    let mut steps = steps(parent);
    steps.push(step);
    steps
}

/// The steps as text: `spec.containers[0].image`.
pub(super) fn text(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Key(key) if text.is_empty() => text.push_str(key),
            Step::Key(key) => text.push_str(&format!(".{key}")),
            Step::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    text
}

/// The parser's error at the key of a field; `None` when the document has no such field.
pub(super) fn error_at<'de, D: Deserializer<'de>>(document: D, steps: &[Step]) -> Option<D::Error> {
    Walk { steps }.deserialize(document).err()
}

/// A walk down these steps; an error is its arrival.
struct Walk<'a> {
    steps: &'a [Step],
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the document as it was read before")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let key = match self.steps.first() {
            Some(Step::Key(key)) => Some(key.as_str()),
            _ => None,
        };
        let rest = self.steps.get(1..).unwrap_or_default();
        let is_last = rest.is_empty();
        while let Some(fits) = map.next_key_seed(Key { key, is_last })? {
            if fits {
                map.next_value_seed(Walk { steps: rest })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        let wanted = match self.steps.first() {
            Some(Step::Index(index)) => Some(*index),
            _ => None,
        };
        let rest = self.steps.get(1..).unwrap_or_default();
        for index in 0.. {
            let more = if wanted == Some(index) {
                sequence.next_element_seed(Walk { steps: rest })?
            } else {
                sequence.next_element::<IgnoredAny>()?.map(|_| ())
            };
            if more.is_none() {
                break;
            }
        }
        Ok(())
    }
}

/// A key of a map: whether it is the one that is looked for. The last one is an error, so that it gets a place.
struct Key<'a> {
    key: Option<&'a str>,
    is_last: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        let fits = self.key == Some(key);
        if fits && self.is_last {
            return Err(E::custom("no such field"));
        }
        Ok(fits)
    }
}
