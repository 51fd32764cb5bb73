//! What is wrong with a group: every finding with its field in the words of the door it came through.

use std::fmt;

use super::spec::Door;

/// What kind of mistake it is, for doors that map it to a code of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViolationKind {
    /// A value that is not valid.
    Invalid,
    /// A required field is missing.
    Missing,
    /// Text or a list is too long.
    TooLong,
    /// A container name appears twice.
    DuplicateContainer,
    /// A volume name appears twice.
    DuplicateVolume,
    /// vCPU or memory.
    Size,
    /// Not supported by this host, now or ever; the text says which and what to use instead.
    Unsupported,
    /// Behind an operator switch (hostPath, privileged and the like).
    Restricted,
    /// A security group that this host does not have.
    UnknownSecurityGroup,
    /// An IPv6 address, on a host that has none to give.
    NoIpv6,
    /// A port of the host that is not free.
    PortTaken,
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// What kind of mistake it is.
    pub kind: ViolationKind,
    /// Path of the field.
    pub field: String,
    /// Its value, shortened; empty where the field is missing.
    pub value: String,
    /// What is wrong and what is valid.
    pub problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(formatter, "{}: {}", self.field, self.problem)
        } else {
            write!(formatter, "{}: {:?}: {}", self.field, self.value, self.problem)
        }
    }
}

/// All mistakes of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    /// Adds one.
    pub fn add(
        &mut self,
        kind: ViolationKind,
        field: impl Into<String>,
        value: impl fmt::Display,
        problem: impl Into<String>,
    ) {
        self.0.push(Violation {
            kind,
            field: field.into(),
            value: shortened(&value.to_string()),
            problem: problem.into(),
        });
    }

    /// A value that is not valid.
    pub fn invalid(
        &mut self,
        field: impl Into<String>,
        value: impl fmt::Display,
        problem: impl Into<String>,
    ) {
        self.add(ViolationKind::Invalid, field, value, problem);
    }

    /// `Ok` when there is none.
    ///
    /// # Errors
    /// Itself, when there is one.
    pub fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, violation) in self.0.iter().enumerate() {
            if index > 0 {
                formatter.write_str("\n")?;
            }
            violation.fmt(formatter)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

fn shortened(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Where a field is, written in the words of a door: `spec.containers[1].ports[0].containerPort` for a Pod,
/// `Container.2.Port.1.Port` for an ECI request.
#[derive(Debug, Clone)]
pub(super) struct FieldPath {
    door: Door,
    text: String,
}

impl FieldPath {
    pub(super) fn new(door: Door) -> Self {
        Self {
            door,
            text: String::new(),
        }
    }

    /// In whose words it is.
    pub(super) fn door(&self) -> Door {
        self.door
    }

    /// A field of the object this path names.
    pub(super) fn field(&self, pod: &str, eci: &str) -> Self {
        let name = match self.door {
            Door::Pod => pod,
            Door::Eci => eci,
        };
        let text = if self.text.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.text)
        };
        Self {
            door: self.door,
            text,
        }
    }

    /// An item of the list this path names, counted from 0.
    pub(super) fn item(&self, index: usize) -> Self {
        let text = match self.door {
            Door::Pod => format!("{}[{index}]", self.text),
            Door::Eci => format!("{}.{}", self.text, index + 1),
        };
        Self {
            door: self.door,
            text,
        }
    }

    /// The value of a key of the map this path names.
    pub(super) fn key(&self, key: &str) -> Self {
        Self {
            door: self.door,
            text: format!("{}[{key}]", self.text),
        }
    }
}

impl From<FieldPath> for String {
    fn from(path: FieldPath) -> Self {
        path.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(door: Door) -> String {
        FieldPath::new(door)
            .field("spec.containers", "Container")
            .item(1)
            .field("ports", "Port")
            .item(0)
            .field("containerPort", "Port")
            .into()
    }

    #[test]
    fn paths_are_in_the_words_of_the_door() {
        assert_eq!(path(Door::Pod), "spec.containers[1].ports[0].containerPort");
        assert_eq!(path(Door::Eci), "Container.2.Port.1.Port");
    }

    #[test]
    fn long_values_are_shortened_at_a_character() {
        let mut violations = Violations::default();
        violations.invalid("f", "é".repeat(100), "too long");
        assert_eq!(violations.0[0].value, format!("{}...", "é".repeat(80)));
    }
}
