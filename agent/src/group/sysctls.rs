//! Kernel parameters of a group, held against the rules of a kubelet (Kubernetes 1.34, `pkg/kubelet/sysctl` and
//! `ValidateSysctls` of the API server). Pure.

use std::collections::BTreeMap;

use super::{
    rules::Allow,
    violation::{FieldPath, ViolationKind, Violations},
};

/// Those that every group may set.
const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];
/// Beginnings of those that belong to a namespace, and one whole name.
const NAMESPACED: [&str; 4] = ["kernel.shm", "kernel.msg", "fs.mqueue.", "net."];
const SEMAPHORES: &str = "kernel.sem";
/// Longest name.
const MAX_NAME_BYTES: usize = 253;

/// A sysctl as a request has it.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) name: String,
    pub(super) value: String,
    /// Where it stands; name and value are fields of it.
    pub(super) at: FieldPath,
    /// It is named as unsafe, which is allowed where that is said (ECI, `HostSecurityContext`).
    pub(super) is_host: bool,
}

/// Holds them against the rules; the result is by name, with dots between its parts.
pub(super) fn accept(given: Vec<Given>, allow: &Allow, found: &mut Violations) -> BTreeMap<String, String> {
    let mut accepted = BTreeMap::new();
    for Given {
        name,
        value,
        at,
        is_host,
    } in given
    {
        let (name_field, value_field) = (at.field("name", "Name"), at.field("value", "Value"));
        if name.is_empty() {
            found.add(ViolationKind::Missing, name_field, "", "required");
            continue;
        }
        let name = with_dots(&name);
        if !is_name(&name) {
            let problem = format!("valid: at most {MAX_NAME_BYTES} characters, such as net.core.somaxconn");
            found.invalid(name_field, &name, problem);
            continue;
        }
        let is_safe = SAFE.contains(&name.as_str());
        let may = is_safe || (is_host && is_namespaced(&name)) || is_allowed(&name, allow);
        if !may {
            let instead = match at.door() {
                super::spec::Door::Eci if !is_host && is_namespaced(&name) => {
                    "HostSecurityContext.Sysctl".to_owned()
                }
                _ => format!(
                    "{}, or what the operator adds to allow.unsafe_sysctls",
                    SAFE.join(", ")
                ),
            };
            let problem = format!("forbidden sysctl: {name:?} not allowlisted; valid: {instead}");
            found.add(ViolationKind::Restricted, name_field, &name, problem);
        }
        if value.is_empty() || value.contains(['\n', '\0']) {
            found.invalid(value_field, &value, "valid: one line that is not empty");
        }
        if accepted.insert(name.clone(), value).is_some() {
            let again = at.field("name", "Name");
            found.invalid(again, &name, "another sysctl has this name; valid: each once");
        }
    }
    accepted
}

/// The name as a path below `/proc/sys`.
pub(crate) fn path(name: &str) -> String {
    swap(name)
}

/// Whether the operator may list this.
pub(super) fn is_pattern(pattern: &str) -> bool {
    let pattern = with_dots(pattern);
    match pattern.strip_suffix('*') {
        Some("") => true,
        // A beginning may end with a dot.
        Some(beginning) => is_name(beginning.strip_suffix('.').unwrap_or(beginning)),
        None => is_name(&pattern),
    }
}

fn is_allowed(name: &str, allow: &Allow) -> bool {
    allow.unsafe_sysctls.iter().any(|pattern| {
        let pattern = with_dots(pattern);
        match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        }
    })
}

fn is_namespaced(name: &str) -> bool {
    name == SEMAPHORES || NAMESPACED.iter().any(|beginning| name.starts_with(beginning))
}

/// The form with dots: where the first separator is a slash, each dot is one of a name's own (sysctl.d(5)).
fn with_dots(name: &str) -> String {
    match name.find(['.', '/']).map(|at| name.as_bytes()[at]) {
        Some(b'/') => swap(name),
        _ => name.to_owned(),
    }
}

fn swap(name: &str) -> String {
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    swapped.collect()
}

/// `SysctlContainSlashFmt`, and no way up once it is a path.
fn is_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    let is_part = |part: &str| {
        let ends_well = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = part.as_bytes();
        ends_well(bytes.first()) && ends_well(bytes.last()) && bytes.iter().all(|b| inner(*b))
    };
    name.len() <= MAX_NAME_BYTES && name.split(['.', '/']).all(is_part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::group::spec::Door;

    fn accepted(
        door: Door,
        is_host: bool,
        patterns: &[&str],
        given: &[(&str, &str)],
    ) -> Result<BTreeMap<String, String>, String> {
        let allow = Allow {
            unsafe_sysctls: patterns.iter().map(|pattern| (*pattern).to_owned()).collect(),
            ..Allow::default()
        };
        let root = FieldPath::new(door).field("spec.securityContext.sysctls", "SecurityContext.Sysctl");
        let given = given.iter().enumerate().map(|(index, (name, value))| Given {
            name: (*name).into(),
            value: (*value).into(),
            at: root.item(index),
            is_host,
        });
        let mut found = Violations::default();
        let accepted = accept(given.collect(), &allow, &mut found);
        found.into_result(accepted).map_err(|found| found.to_string())
    }

    #[test]
    fn safe_ones_are_taken_and_others_where_the_operator_says_so() {
        for (name, patterns, is_host, door, is_taken) in [
            ("net.ipv4.tcp_syncookies", &[][..], false, Door::Pod, true),
            ("net/ipv4/tcp_syncookies", &[], false, Door::Pod, true),
            ("net.core.somaxconn", &[], false, Door::Pod, false),
            (
                "net.core.somaxconn",
                &["net.core.somaxconn"],
                false,
                Door::Pod,
                true,
            ),
            ("net.core.somaxconn", &["net/core/*"], false, Door::Pod, true),
            ("net.core.somaxconn", &["net.*"], false, Door::Pod, true),
            ("net.core.somaxconn", &["net.core"], false, Door::Pod, false),
            ("net.core.somaxconn", &["kernel.*"], false, Door::Pod, false),
            ("vm.max_map_count", &[], false, Door::Pod, false),
            ("vm.max_map_count", &["vm.*"], false, Door::Pod, true),
            ("net.core.somaxconn", &[], false, Door::Eci, false),
            ("net.core.somaxconn", &[], true, Door::Eci, true),
            ("kernel.sem", &[], true, Door::Eci, true),
            ("kernel.semaphore", &[], true, Door::Eci, false),
            ("vm.max_map_count", &[], true, Door::Eci, false),
        ] {
            let result = accepted(door, is_host, patterns, &[(name, "1")]);
            assert_eq!(result.is_ok(), is_taken, "{name} with {patterns:?}: {result:?}");
        }
    }

    #[test]
    fn all_mistakes_are_told_with_their_fields() {
        let given = [
            ("", "1"),
            ("Net.core", "1"),
            ("net..core", "1"),
            ("vm.swappiness", ""),
            ("net.ipv4.tcp_wmem", "1\n2"),
            ("net/ipv4/tcp_wmem", "1"),
        ];
        let said = accepted(Door::Pod, false, &[], &given).unwrap_err();
        for part in [
            "sysctls[0].name: required",
            "sysctls[1].name: \"Net.core\": valid: at most",
            "sysctls[2].name",
            "sysctls[3].name: \"vm.swappiness\": forbidden sysctl: \"vm.swappiness\" not allowlisted",
            "sysctls[3].value",
            "sysctls[4].value",
            "sysctls[5].name: \"net.ipv4.tcp_wmem\": another sysctl has this name",
        ] {
            assert!(said.contains(part), "{part} is not in:\n{said}");
        }
        let said = accepted(Door::Eci, false, &[], &[("net.core.somaxconn", "1")]).unwrap_err();
        assert!(
            said.starts_with("SecurityContext.Sysctl.1.Name:")
                && said.ends_with("valid: HostSecurityContext.Sysctl"),
            "{said}"
        );
    }

    #[test]
    fn dots_in_the_name_of_an_interface_survive() {
        let name = "net/ipv4/conf/eth0.100/rp_filter";
        let taken = accepted(Door::Pod, false, &["net.*"], &[(name, "1")]).unwrap();
        let (dotted, _) = taken.first_key_value().unwrap();
        assert_eq!(dotted, "net.ipv4.conf.eth0/100.rp_filter");
        assert_eq!(path(dotted), name);
    }

    #[test]
    fn patterns_are_names_or_their_beginnings() {
        for pattern in ["net.*", "net.core.somaxconn", "kernel.shm*", "net/ipv4/*", "*"] {
            assert!(is_pattern(pattern), "{pattern}");
        }
        for pattern in ["", ".", "net.", "net.*.x", "Net.*", "../*", "net..*"] {
            assert!(!is_pattern(pattern), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn no_name_leads_out_of_proc_sys(name in "[a-z./]{0,16}") {
            if let Ok(taken) = accepted(Door::Pod, false, &["*"], &[(&name, "1")]) {
                for name in taken.keys() {
                    prop_assert!(path(name).split('/').all(|part| !part.is_empty() && part != ".."));
                }
            }
        }
    }
}
