//! The files of the sandbox's identity that containers see, as bind mounts of files here.
//!
//! All are opened before the guest is ready and rewritten in place, so that mounts of them stay mounts of them.

use std::{
    fmt::Write as _,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use super::{Identity, Ids};
use crate::error::{Context, Result};

/// Name in the directory, where containers see it, and whether it must be read-only for them.
pub const FILES: [(&str, &str, Access); 6] = [
    ("hosts", "/etc/hosts", Access::OfRoot),
    ("hostname", "/etc/hostname", Access::OfRoot),
    ("resolv.conf", "/etc/resolv.conf", Access::OfRoot),
    ("machine-id", "/etc/machine-id", Access::ReadOnly),
    ("generation", "/run/eci/generation", Access::ReadOnly),
    ("boot_id", "/proc/sys/kernel/random/boot_id", Access::ReadOnly),
];

/// What containers may do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// What they may do with their root file system.
    OfRoot,
    /// Read it.
    ReadOnly,
}

/// The open files.
#[derive(Debug)]
pub(super) struct Files {
    hosts: File,
    hostname: File,
    resolv_conf: File,
    machine_id: File,
    generation: File,
    boot_id: File,
}

impl Files {
    /// Makes the files, empty, in `directory`.
    pub(super) fn make(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).context(|| format!("make {}", directory.display()))?;
        let make = |name: &str| {
            File::create(directory.join(name)).context(|| format!("make {name} in {}", directory.display()))
        };
        Ok(Self {
            hosts: make("hosts")?,
            hostname: make("hostname")?,
            resolv_conf: make("resolv.conf")?,
            machine_id: make("machine-id")?,
            generation: make("generation")?,
            boot_id: make("boot_id")?,
        })
    }

    /// Rewrites what the host says.
    pub(super) fn write_names(&self, identity: &Identity) -> Result<()> {
        for (name, file, text) in [
            ("hosts", &self.hosts, hosts(identity)),
            ("hostname", &self.hostname, format!("{}\n", identity.hostname)),
            ("resolv.conf", &self.resolv_conf, resolv_conf(identity)),
        ] {
            file.write_all_at(text.as_bytes(), 0)
                .and_then(|()| file.set_len(text.len() as u64))
                .context(|| format!("write {name}"))?;
        }
        Ok(())
    }

    /// Rewrites the ids, the generation last: who sees it changed finds the others changed.
    pub(super) fn write_ids(&self, ids: &Ids) -> Result<()> {
        for (name, file, text) in [
            ("machine-id", &self.machine_id, ids.machine.hex()),
            ("boot_id", &self.boot_id, ids.boot.uuid()),
            ("generation", &self.generation, ids.generation.uuid()),
        ] {
            // One write of a length that never changes: a reader sees the old id or the new one.
            file.write_all_at(format!("{text}\n").as_bytes(), 0)
                .context(|| format!("write {name}"))?;
        }
        Ok(())
    }
}

fn hosts(identity: &Identity) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let interfaces = identity.interfaces.iter();
    let addresses = interfaces.flat_map(|interface| &interface.addresses);
    for (address, _) in addresses.filter(|_| !identity.hostname.is_empty()) {
        let Identity { hostname, domain, .. } = identity;
        let _ = match hostname.split_once('.').map_or(&**hostname, |(short, _)| short) {
            _ if domain.is_empty() => writeln!(text, "{address}\t{hostname}"),
            // The first is the canonical one.
            short => writeln!(text, "{address}\t{short}.{domain}\t{short}"),
        };
    }
    for (address, names) in &identity.host_aliases {
        let _ = writeln!(text, "{address}\t{}", names.join(" "));
    }
    text
}

fn resolv_conf(identity: &Identity) -> String {
    let mut text = String::new();
    for server in &identity.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, words) in [("search", &identity.searches), ("options", &identity.dns_options)] {
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Interface;

    fn identity(hostname: &str) -> Identity {
        Identity {
            hostname: hostname.into(),
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: [0; 6],
                addresses: vec![
                    ("10.0.0.2".parse().unwrap(), 24),
                    ("fd00::2".parse().unwrap(), 128),
                ],
                gateways: Vec::new(),
                mtu: 0,
            }],
            nameservers: vec!["10.0.0.10".into()],
            searches: vec!["a.local".into(), "local".into()],
            dns_options: vec!["ndots:5".into()],
            host_aliases: vec![("10.0.0.9".into(), vec!["db".into(), "db.local".into()])],
            ..Default::default()
        }
    }

    #[test]
    fn files_in_etc_say_what_the_host_said() {
        let identity = identity("web-0");
        assert!(hosts(&identity).ends_with("10.0.0.2\tweb-0\nfd00::2\tweb-0\n10.0.0.9\tdb db.local\n"));
        assert_eq!(
            resolv_conf(&identity),
            "nameserver 10.0.0.10\nsearch a.local local\noptions ndots:5\n"
        );
    }

    #[test]
    fn a_name_in_a_domain_comes_first_with_it() {
        for hostname in ["web-0", "web-0.db.shop.svc.cluster.local"] {
            let identity = Identity {
                domain: "db.shop.svc.cluster.local".into(),
                ..identity(hostname)
            };
            let expected = "\n10.0.0.2\tweb-0.db.shop.svc.cluster.local\tweb-0\n";
            assert!(hosts(&identity).contains(expected), "{}", hosts(&identity));
        }
    }

    #[test]
    fn files_are_rewritten_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::make(directory.path()).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        // What a mount would hold on to.
        let held: Vec<_> = FILES
            .iter()
            .map(|(name, ..)| File::open(directory.path().join(name)).unwrap())
            .collect();
        for hostname in ["a-longer-name", "short"] {
            let ids = Ids::draw(None).unwrap();
            files.write_names(&identity(hostname)).unwrap();
            files.write_ids(&ids).unwrap();
            assert_eq!(read("hostname"), format!("{hostname}\n"));
            assert_eq!(read("machine-id"), format!("{}\n", ids.machine.hex()));
            assert_eq!(read("boot_id"), format!("{}\n", ids.boot.uuid()));
            assert_eq!(read("generation"), format!("{}\n", ids.generation.uuid()));
            for ((name, ..), file) in FILES.iter().zip(&held) {
                let mut bytes = vec![0; 4096];
                let length = file.read_at(&mut bytes, 0).unwrap();
                assert_eq!(String::from_utf8_lossy(&bytes[..length]), read(name), "{name}");
            }
        }
    }
}
