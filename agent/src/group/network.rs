//! How a group takes part in the host's network, as asked for: security groups. Which of them exist is the host's to
//! know, so that is checked where a group is accepted.

use serde::{Deserialize, Serialize};

use super::{
    spec::{Door, GroupSpec},
    violation::{FieldPath, ViolationKind, Violations},
};

/// The security groups of a Pod, separated by commas.
pub const SECURITY_GROUP_ANNOTATION: &str = "k8s.aliyun.com/eci-security-group";
/// Most security groups of one group.
const MAX_SECURITY_GROUPS: usize = 5;

/// A group's place in the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkSpec {
    /// Security groups it is a member of, at most 5, each once. A member of none is open to all.
    pub security_groups: Vec<String>,
}

/// The items of a list separated by commas; empty text has none.
pub(super) fn comma_list(text: &str) -> Vec<String> {
    let items = text.split(',').map(str::trim);
    items.filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// The field that names the security groups of groups of this door.
pub fn security_group_field(door: Door) -> String {
    annotation_or(
        &FieldPath::new(door),
        SECURITY_GROUP_ANNOTATION,
        "SecurityGroupId",
    )
    .into()
}

/// A field that is an annotation of a Pod, or a parameter of ECI.
fn annotation_or(root: &FieldPath, annotation: &str, parameter: &str) -> FieldPath {
    let field = root.field("metadata.annotations", parameter);
    match root.door() {
        Door::Pod => field.key(annotation),
        Door::Eci => field,
    }
}

/// Finds what is wrong without knowing the host.
pub(super) fn validate(spec: &GroupSpec, root: &FieldPath, found: &mut Violations) {
    let groups = &spec.network.security_groups;
    let field = || annotation_or(root, SECURITY_GROUP_ANNOTATION, "SecurityGroupId");
    if groups.len() > MAX_SECURITY_GROUPS {
        found.add(
            ViolationKind::TooLong,
            field(),
            format!("{} security groups", groups.len()),
            format!("valid: at most {MAX_SECURITY_GROUPS}"),
        );
    }
    for (index, group) in groups.iter().enumerate() {
        if groups[..index].contains(group) {
            found.invalid(field(), group, "named twice; valid: each security group once");
        }
    }
}
