//! An update of a group: what may change, what it reaches of what runs, and how the new containers follow the old. Pure.
//!
//! What is touched is as little as the change allows (ECI, UpdateContainerGroup; where ECI says less, this):
//!
//! | changed | what happens |
//! |---|---|
//! | labels, annotations, credentials, restart policy, grace, deadline; a volume is added | nothing is restarted |
//! | volumes of files | the files of running containers are replaced, all of a volume at once; nothing is restarted |
//! | sizes of the group and its containers, and nothing of the lines below | nothing is restarted, where the sandbox can have the size ([`super::resize`]); else all begin anew in a new sandbox |
//! | a container that does the group's work | it ends, and begins anew in the same sandbox |
//! | one that takes turns (init container, sidecar); whether processes are shared | all containers begin anew, in order, in the same sandbox |
//! | the group's size, network, host ports, DNS, hosts, sysctls, host name, `fsGroup`; another volume is changed or removed | all begin anew in a new sandbox |
//! | name, namespace, disks | refused |

use std::collections::BTreeSet;

use super::{
    spec::{ContainerSpec, Door, GroupSpec, VolumeSource, VolumeSpec},
    violation::Violations,
};
use crate::network::host_ports;

/// How far an update reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// These containers of the group as it was end; those still wanted begin anew.
    Containers(BTreeSet<usize>),
    /// All containers begin anew.
    Group,
    /// All containers begin anew, in a new sandbox.
    Sandbox,
    /// Only sizes change.
    Sizes,
}

/// Takes over what the group was given when it was accepted and no request can name: the ids of its new disks.
pub fn carry_over(old: &GroupSpec, new: &mut GroupSpec) {
    for volume in &mut new.volumes {
        if let (VolumeSource::Disk(disk), Some(VolumeSource::Disk(before))) =
            (&mut volume.source, source(old, &volume.name))
            && disk.id.is_none()
            && disk.new_gib == before.new_gib
        {
            disk.id.clone_from(&before.id);
        }
    }
}

/// All that can't be changed and is.
///
/// # Errors
/// Each such field.
pub fn check(old: &GroupSpec, new: &GroupSpec) -> Result<(), Violations> {
    let mut found = Violations::default();
    for (field, before, now) in [
        ("name", &old.name, &new.name),
        ("namespace", &old.namespace, &new.namespace),
    ] {
        if before != now {
            found.invalid(
                field,
                now,
                format!("can't be changed; valid: {before:?}, or another group"),
            );
        }
    }
    if old.door != new.door {
        let (made, given) = match old.door {
            Door::Eci => ("an ECI request", "a Pod"),
            Door::Pod => ("a Pod", "an ECI request"),
        };
        found.invalid(
            "kind",
            given,
            format!("the group was made of {made}; valid: {made}"),
        );
    }
    let is_disk = |volume: &VolumeSpec| matches!(volume.source, VolumeSource::Disk(_));
    for volume in &new.volumes {
        let before = source(old, &volume.name);
        let had_disk = matches!(before, Some(VolumeSource::Disk(_)));
        if (is_disk(volume) || had_disk) && before != Some(&volume.source) {
            found.invalid(
                format!("volume {}", volume.name),
                "",
                "disks can't be added, changed or removed by an update; valid: the disks the group has, as they are",
            );
        }
    }
    for volume in old.volumes.iter().filter(|volume| is_disk(volume)) {
        if source(new, &volume.name).is_none() {
            found.invalid(
                format!("volume {}", volume.name),
                "",
                "a disk can't be removed by an update; valid: the disks the group has, as they are",
            );
        }
    }
    found.into_result(())
}

/// What an update that [`check`] let pass reaches.
pub fn reach(old: &GroupSpec, new: &GroupSpec) -> Reach {
    let resized = with_sizes_of(old, new);
    if resized == *old {
        return reach_beside_sizes(old, new);
    }
    match reach_beside_sizes(&resized, new) {
        Reach::Containers(others) if others.is_empty() && has_same_containers(old, new) => Reach::Sizes,
        _ => reach_beside_sizes(old, new),
    }
}

/// The old group with the sizes of the new one.
fn with_sizes_of(old: &GroupSpec, new: &GroupSpec) -> GroupSpec {
    let mut resized = old.clone();
    resized.size = new.size;
    for before in &mut resized.containers {
        if let Some(now) = container(new, &before.name) {
            before.size = now.size;
        }
    }
    resized
}

/// No container is added, removed or in another place.
fn has_same_containers(old: &GroupSpec, new: &GroupSpec) -> bool {
    let names = |group: &GroupSpec| -> Vec<String> {
        group
            .containers
            .iter()
            .map(|container| container.name.clone())
            .collect()
    };
    names(old) == names(new)
}

fn reach_beside_sizes(old: &GroupSpec, new: &GroupSpec) -> Reach {
    // What the machine of the group is told when it starts.
    let machine = |group: &GroupSpec| {
        (
            group.size,
            group.hostname.clone(),
            group.dns.clone(),
            group.host_aliases.clone(),
            group.sysctls.clone(),
            group.fs_group,
            group.network.clone(),
            host_ports(group),
        )
    };
    let volume_goes = old.volumes.iter().any(|volume| match &volume.source {
        VolumeSource::Files(_) => {
            source(new, &volume.name).is_some_and(|source| !matches!(source, VolumeSource::Files(_)))
        }
        before => source(new, &volume.name) != Some(before),
    });
    if machine(old) != machine(new) || volume_goes {
        return Reach::Sandbox;
    }
    let is_changed = |before: &ContainerSpec| {
        container(new, &before.name) != Some(before)
            || old.supplemental_groups != new.supplemental_groups
            || namespaces(old) != namespaces(new)
    };
    let takes_turns = |container: &ContainerSpec| container.lifecycle.role.takes_turns();
    let turns = |group: &GroupSpec| -> Vec<String> {
        let names = group.containers.iter().filter(|container| takes_turns(container));
        names.map(|container| container.name.clone()).collect()
    };
    let changed: BTreeSet<usize> = (0..old.containers.len())
        .filter(|index| is_changed(&old.containers[*index]))
        .collect();
    let changes_turns = changed.iter().any(|index| takes_turns(&old.containers[*index]));
    if turns(old) != turns(new) || changes_turns {
        Reach::Group
    } else {
        Reach::Containers(changed)
    }
}

/// What containers share beside what all share.
fn namespaces(group: &GroupSpec) -> [bool; 3] {
    [group.share_process_namespace, group.host_pid, group.host_network]
}

/// Whether containers have files that an update may change: their content, or fields of the group.
pub fn has_files(group: &GroupSpec) -> bool {
    let is_files = |name: &str| matches!(source(group, name), Some(VolumeSource::Files(_)));
    let mut mounts = group
        .containers
        .iter()
        .flat_map(|container| &container.volume_mounts);
    mounts.any(|mount| is_files(&mount.name))
}

fn source<'a>(group: &'a GroupSpec, name: &str) -> Option<&'a VolumeSource> {
    let volume = group.volumes.iter().find(|volume| volume.name == name)?;
    Some(&volume.source)
}

fn container<'a>(group: &'a GroupSpec, name: &str) -> Option<&'a ContainerSpec> {
    group.containers.iter().find(|container| container.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{
        disk::{DiskId, DiskVolume},
        files::{FileItem, FileOrigin, FileSource, FileVolume},
        lifecycle::Role,
        spec::{VolumeMount, testing},
    };

    fn volume(name: &str, source: VolumeSource) -> VolumeSpec {
        VolumeSpec {
            name: name.into(),
            source,
        }
    }

    fn files(content: &str) -> VolumeSource {
        VolumeSource::Files(FileVolume {
            origin: FileOrigin::Projected,
            files: vec![FileItem {
                path: "f".into(),
                mode: 0o400,
                source: FileSource::Content(content.as_bytes().to_vec().into()),
            }],
        })
    }

    fn empty_dir() -> VolumeSource {
        VolumeSource::EmptyDir {
            memory: false,
            size_limit_bytes: None,
        }
    }

    fn disk(id: Option<&str>, new_gib: Option<u32>) -> VolumeSource {
        VolumeSource::Disk(DiskVolume {
            id: id.and_then(DiskId::parse),
            new_gib,
            delete_with_group: false,
            read_only: false,
            is_flex: false,
        })
    }

    /// Two containers that work, then a sidecar; the second mounts `files` and `dir`.
    fn before() -> GroupSpec {
        let mut group = testing::group("g", 3);
        group.containers[2].lifecycle.role = Role::Sidecar;
        group.volumes = vec![volume("files", files("a")), volume("dir", empty_dir())];
        group.containers[1].volume_mounts = ["files", "dir"]
            .map(|name| VolumeMount {
                name: name.into(),
                mount_path: format!("/{name}"),
                sub_path: None,
                is_sub_path_expr: false,
                read_only: false,
            })
            .to_vec();
        group
    }

    fn reached(change: impl FnOnce(&mut GroupSpec)) -> Reach {
        let (old, mut new) = (before(), before());
        change(&mut new);
        assert_eq!(check(&old, &new), Ok(()));
        reach(&old, &new)
    }

    fn only(indices: &[usize]) -> Reach {
        Reach::Containers(indices.iter().copied().collect())
    }

    #[test]
    fn an_update_reaches_no_further_than_it_must() {
        assert_eq!(reached(|_| {}), only(&[]));
        assert_eq!(
            reached(|new| drop(new.labels.insert("a".into(), "b".into()))),
            only(&[])
        );
        assert_eq!(reached(|new| new.termination_grace_period_seconds = 1), only(&[]));
        assert_eq!(
            reached(|new| new.volumes.push(volume("more", empty_dir()))),
            only(&[])
        );
        assert_eq!(
            reached(|new| new.containers[0].image = "other".into()),
            only(&[0])
        );
        assert_eq!(reached(|new| drop(new.containers.remove(0))), only(&[0]));
        assert_eq!(
            reached(|new| {
                let mut more = new.containers[0].clone();
                more.name = "more".into();
                new.containers.insert(0, more);
            }),
            only(&[])
        );
        assert_eq!(reached(|new| new.volumes[0].source = files("b")), only(&[]));
        assert_eq!(
            reached(|new| new.supplemental_groups.ids = vec![7]),
            Reach::Group,
            "the sidecar has them too"
        );
        assert_eq!(reached(|new| new.share_process_namespace = true), Reach::Group);
        assert_eq!(reached(|new| new.host_pid = true), Reach::Group);
        assert_eq!(reached(|new| new.host_network = true), Reach::Group);
        assert_eq!(
            reached(|new| new.containers[2].image = "other".into()),
            Reach::Group
        );
        assert_eq!(reached(|new| drop(new.containers.pop())), Reach::Group);
        assert_eq!(
            reached(|new| new.containers[0].lifecycle.role = Role::Init),
            Reach::Group
        );
        assert_eq!(reached(|new| new.size.cpu_milli += 2000), Reach::Sizes);
        assert_eq!(
            reached(|new| {
                new.containers[2].size = Some(new.size);
                new.labels.insert("a".into(), "b".into());
            }),
            Reach::Sizes,
            "a sidecar's too, and what disturbs nobody"
        );
        assert_eq!(
            reached(|new| {
                new.containers[0].size = Some(new.size);
                new.containers[1].image = "other".into();
            }),
            only(&[0, 1]),
            "not beside other changes"
        );
        assert_eq!(
            reached(|new| {
                new.size.cpu_milli += 2000;
                new.containers[1].image = "other".into();
            }),
            Reach::Sandbox
        );
        assert_eq!(
            reached(|new| {
                new.size.cpu_milli += 2000;
                new.containers.remove(0);
            }),
            Reach::Sandbox
        );
        assert_eq!(
            reached(|new| {
                new.size.cpu_milli += 2000;
                let mut more = new.containers[0].clone();
                more.name = "more".into();
                new.containers.insert(2, more);
            }),
            Reach::Sandbox
        );
        assert_eq!(reached(|new| new.dns = Some(Default::default())), Reach::Sandbox);
        assert_eq!(
            reached(|new| new.network.security_groups = vec!["sg-a".into()]),
            Reach::Sandbox
        );
        assert_eq!(
            reached(|new| {
                new.volumes[1].source = VolumeSource::EmptyDir {
                    memory: true,
                    size_limit_bytes: None,
                };
            }),
            Reach::Sandbox
        );
        assert_eq!(
            reached(|new| {
                new.volumes.pop();
                new.containers[1].volume_mounts.pop();
            }),
            Reach::Sandbox
        );
        assert!(has_files(&before()));
        let mut none = before();
        none.containers[1].volume_mounts.remove(0);
        assert!(!has_files(&none), "nobody mounts them");
        // Files that nobody mounts any more are no reason.
        assert_eq!(
            reached(|new| {
                new.volumes.remove(0);
                new.containers[1].volume_mounts.remove(0);
            }),
            only(&[1])
        );
    }

    #[test]
    fn what_cannot_change_is_told_all_at_once() {
        let mut old = before();
        old.volumes.push(volume("kept", disk(Some("d-1"), None)));
        old.volumes.push(volume("made", disk(Some("d-2"), Some(20))));
        let mut new = old.clone();
        new.volumes[3].source = disk(None, Some(20));
        carry_over(&old, &mut new);
        assert_eq!(new, old, "a disk that was made for the group is the same one");
        new.name = "other".into();
        new.door = Door::Eci;
        new.volumes[2].source = disk(Some("d-9"), None);
        new.volumes.pop();
        new.volumes.push(volume("fresh", disk(None, Some(30))));
        let found = check(&old, &new).unwrap_err();
        let fields: Vec<_> = found.0.iter().map(|found| found.field.as_str()).collect();
        assert_eq!(
            fields,
            ["name", "kind", "volume kept", "volume fresh", "volume made"]
        );
    }
}
