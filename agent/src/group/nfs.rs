//! Volumes on NFS servers. Plain data and how it is checked, the same for both doors.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{
    validate::{is_dns_subdomain, is_plain_path},
    violation::{FieldPath, ViolationKind, Violations},
};

/// A directory of an NFS server (Kubernetes, NFSVolumeSource; ECI, NFSVolume).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NfsVolume {
    /// Host name or IPv4 address of the server. Names are looked up by the host, each time the volume is mounted.
    pub server: String,
    /// Absolute path that the server exports.
    pub path: String,
    /// No container writes to it.
    pub read_only: bool,
}

impl std::fmt::Display for NfsVolume {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}", self.server, self.path)
    }
}

impl NfsVolume {
    /// Finds what is wrong; `path` is the volume's.
    pub(super) fn check(&self, path: &FieldPath, found: &mut Violations) {
        let server = path.field("nfs.server", "NFSVolume.Server");
        let name = self.server.strip_suffix('.').unwrap_or(&self.server);
        // What looks like an address has to be one.
        let is_name = is_dns_subdomain(&name.to_ascii_lowercase())
            && name.bytes().any(|byte| byte.is_ascii_alphabetic());
        if self.server.is_empty() {
            found.add(ViolationKind::Missing, server, "", "required");
        } else if !is_name && self.server.parse::<Ipv4Addr>().is_err() {
            found.invalid(
                server,
                &self.server,
                "valid: a host name or an IPv4 address; groups have IPv4 addresses only",
            );
        }
        let directory = path.field("nfs.path", "NFSVolume.Path");
        let below = self.path.strip_prefix('/');
        if self.path.is_empty() {
            found.add(ViolationKind::Missing, directory, "", "required");
        } else if below.is_none_or(|below| !below.is_empty() && !is_plain_path(below)) {
            found.invalid(
                directory,
                &self.path,
                "valid: an absolute path of the server, without '..'",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::spec::Door;

    fn refused(server: &str, path: &str) -> Vec<String> {
        let volume = NfsVolume {
            server: server.into(),
            path: path.into(),
            read_only: false,
        };
        let mut found = Violations::default();
        volume.check(
            &FieldPath::new(Door::Pod).field("spec.volumes", "").item(0),
            &mut found,
        );
        found.0.into_iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn a_server_and_an_absolute_path() {
        let (server, path) = ("spec.volumes[0].nfs.server", "spec.volumes[0].nfs.path");
        for good in ["nas", "nas.example.com.", "NAS-1.local", "10.0.0.7", "7-up.local"] {
            assert_eq!(refused(good, "/"), Vec::<String>::new(), "{good}");
        }
        for bad in [
            "",
            "na s",
            "nas:2049",
            "nas/a",
            "http://nas",
            "fd00::1",
            "[fd00::1]",
            "-nas",
            "nas..x",
            ".",
            "10.0.0",
            "10.0.0.256",
        ] {
            assert_eq!(refused(bad, "/exports/a"), [server], "{bad:?}");
        }
        for bad in ["", "a", "a/b", "./a", "/a/../b", "/..", "/a\0b"] {
            assert_eq!(refused("nas", bad), [path], "{bad:?}");
        }
        assert_eq!(refused("", ".."), [server, path]);
    }
}
