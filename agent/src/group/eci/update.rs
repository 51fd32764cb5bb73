//! The parameters of UpdateContainerGroup, together with those the group was made of, become the group it is to be. Pure.

use super::{Params, to_group};
use crate::group::{size::SizeTable, spec::GroupSpec, violation::Violations};

/// What is given beside what is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateType {
    /// A list or object that is given replaces the whole old one.
    Renew,
    /// Only the fields that are given change. Items of the lists in [`KEYS`] are found by their names, and others are added;
    /// further lists are replaced.
    Incremental,
}

/// What can be given.
const UPDATABLE: [&str; 11] = [
    "AcrRegistryInfo",
    "Container",
    "Cpu",
    "DnsConfig",
    "DnsPolicy",
    "ImageRegistryCredential",
    "InitContainer",
    "Memory",
    "RestartPolicy",
    "Tag",
    "Volume",
];
/// Lists of named things, and the fields with the names.
const KEYS: [(&str, &str); 5] = [
    ("Container", "Name"),
    ("ImageRegistryCredential", "Server"),
    ("InitContainer", "Name"),
    ("Tag", "Key"),
    ("Volume", "Name"),
];

/// The group that was made of `request`, after an update.
///
/// # Errors
/// All mistakes found, each with its field.
pub fn updated(
    request: &Params,
    given: &Params,
    kind: UpdateType,
    table: &SizeTable,
) -> Result<GroupSpec, Violations> {
    let given = given.only(&UPDATABLE);
    let request = match kind {
        UpdateType::Renew => request.replaced_by(&given),
        UpdateType::Incremental => request.merged_with(&given, &KEYS),
    };
    to_group(&request, table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Params {
        Params::parse(pairs.iter().copied()).unwrap()
    }

    fn made_of() -> Params {
        parse(&[
            ("ContainerGroupName", "group"),
            ("Container.1.Name", "a"),
            ("Container.1.Image", "one"),
            ("Container.1.Command.1", "x"),
            ("Container.1.Command.2", "y"),
            ("Container.1.EnvironmentVar.1.Key", "K"),
            ("Container.1.EnvironmentVar.1.Value", "1"),
            ("Container.2.Name", "b"),
            ("Container.2.Image", "two"),
            ("Tag.1.Key", "t"),
            ("Tag.1.Value", "1"),
        ])
    }

    fn update(kind: UpdateType, pairs: &[(&str, &str)]) -> Result<GroupSpec, Violations> {
        updated(&made_of(), &parse(pairs), kind, &SizeTable::default())
    }

    fn names(group: &GroupSpec) -> Vec<(&str, &str)> {
        let containers = group.containers.iter();
        containers
            .map(|container| (container.name.as_str(), container.image.as_str()))
            .collect()
    }

    #[test]
    fn a_renewal_replaces_whole_lists_and_leaves_the_rest() {
        let group = update(
            UpdateType::Renew,
            &[
                ("Container.1.Name", "a"),
                ("Container.1.Image", "three"),
                // Says nothing of the group, or nothing that can change.
                ("ContainerGroupName", "other"),
                ("ContainerGroupId", "eci-1"),
                ("Timestamp", "now"),
            ],
        )
        .unwrap();
        assert_eq!(names(&group), [("a", "three")]);
        assert!(group.containers[0].command.is_empty() && group.containers[0].env.is_empty());
        assert_eq!((group.name.as_str(), group.labels["t"].as_str()), ("group", "1"));
        // The next update goes on from there.
        let request = group.request.unwrap();
        let next = updated(
            &request,
            &parse(&[("Tag.1.Key", "u")]),
            UpdateType::Renew,
            &SizeTable::default(),
        );
        let next = next.unwrap();
        assert_eq!(names(&next), [("a", "three")]);
        assert_eq!(next.labels.keys().collect::<Vec<_>>(), ["u"]);
    }

    #[test]
    fn an_increment_changes_only_what_is_given() {
        let group = update(
            UpdateType::Incremental,
            &[
                ("Container.1.Name", "b"),
                ("Container.1.Command.1", "z"),
                ("Container.2.Name", "c"),
                ("Container.2.Image", "three"),
                ("Container.3.Name", "a"),
                ("Container.3.Command.1", "only"),
                ("Tag.1.Key", "u"),
            ],
        )
        .unwrap();
        assert_eq!(names(&group), [("a", "one"), ("b", "two"), ("c", "three")]);
        assert_eq!(group.containers[0].command, ["only"]);
        assert_eq!(group.containers[0].env.len(), 1);
        assert_eq!(group.containers[1].command, ["z"]);
        assert_eq!(group.labels.keys().collect::<Vec<_>>(), ["t", "u"]);
    }

    #[test]
    fn mistakes_are_those_of_a_new_group() {
        let found = update(
            UpdateType::Renew,
            &[
                ("Container.1.Name", "a"),
                ("Cpu", "x"),
                ("RestartPolicy", "Sometimes"),
            ],
        );
        let found = found.unwrap_err();
        let fields: Vec<_> = found.0.iter().map(|found| found.field.as_str()).collect();
        assert_eq!(fields, ["Container.1.Image", "Cpu", "RestartPolicy"]);
    }
}
