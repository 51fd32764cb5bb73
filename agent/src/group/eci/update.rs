//! The parameters of UpdateContainerGroup, together with those the group was made of, become the group it is to be. Pure.

use super::{Params, to_group};
use crate::group::{rules::Rules, spec::GroupSpec, violation::Violations};

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

/// A group after an update; `None` when it was not made of parameters.
///
/// # Errors
/// All mistakes found, each with its field.
pub fn updated(
    group: &GroupSpec,
    given: &Params,
    kind: UpdateType,
    rules: &Rules,
) -> Option<Result<GroupSpec, Violations>> {
    let mut request = group.request.clone()?;
    // A group that was made from another one's snapshot has names of its own.
    request.set("ContainerGroupName", &group.name);
    request.set("HostName", &group.hostname);
    let given = given.only(&UPDATABLE);
    let request = match kind {
        UpdateType::Renew => request.replaced_by(&given),
        UpdateType::Incremental => request.merged_with(&given, &KEYS),
    };
    Some(to_group(&request, rules))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Params {
        Params::parse(pairs.iter().copied()).unwrap()
    }

    fn made_of() -> GroupSpec {
        let params = parse(&[
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
        ]);
        to_group(&params, &Rules::default()).unwrap()
    }

    fn update(kind: UpdateType, pairs: &[(&str, &str)]) -> Result<GroupSpec, Violations> {
        updated(&made_of(), &parse(pairs), kind, &Rules::default()).unwrap()
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
        // The next update goes on from there; a clone's keeps its names.
        let clone = GroupSpec {
            name: "clone".into(),
            hostname: "elsewhere".into(),
            ..group
        };
        let given = parse(&[("Tag.1.Key", "u")]);
        let next = updated(&clone, &given, UpdateType::Renew, &Rules::default());
        let next = next.unwrap().unwrap();
        assert_eq!(
            (next.name.as_str(), next.hostname.as_str()),
            ("clone", "elsewhere")
        );
        assert_eq!(names(&next), [("a", "three")]);
        assert_eq!(next.labels.keys().collect::<Vec<_>>(), ["u"]);
    }

    #[test]
    fn a_group_that_was_a_pod_has_no_parameters() {
        let pod = GroupSpec {
            request: None,
            ..made_of()
        };
        let given = parse(&[("Tag.1.Key", "u")]);
        assert_eq!(updated(&pod, &given, UpdateType::Renew, &Rules::default()), None);
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
