//! `/etc/passwd` and `/etc/group` of the image. Pure; the C library's lookup would need shared objects of the image's.

use crate::error::{Error, Result};

/// Most bytes of either file that are read.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, `/` when the user has no entry.
    pub home: String,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(passwd: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1)?;
        Some(PasswdEntry { name, uid, gid, home })
    })
}

/// Name, id and members.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("")))
    })
}

/// The identity of numeric ids: the home directory comes from `passwd`.
#[must_use]
pub fn by_ids(passwd: &str, uid: u32, gid: u32, groups: &[u32]) -> Identity {
    let home = passwd_entries(passwd)
        .find(|entry| entry.uid == uid)
        .map_or("", |entry| entry.home);
    Identity {
        uid,
        gid,
        groups: groups.to_vec(),
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    }
}

/// The identity of `user[:group]`, names or numbers. A user by name is in the groups that list it, unless a group is
/// given.
///
/// # Errors
/// `InvalidArgument` for a name the files do not have.
pub fn by_name(passwd: &str, group: &str, name: &str, additional: &[u32]) -> Result<Identity> {
    let (user, wanted_group) = match name.split_once(':') {
        Some((user, wanted_group)) => (user, Some(wanted_group)),
        None => (name, None),
    };
    let entry = passwd_entries(passwd).find(|entry| entry.name == user || user.parse() == Ok(entry.uid));
    let uid = match (&entry, user.parse()) {
        (Some(entry), _) => entry.uid,
        (None, Ok(uid)) => uid,
        (None, Err(_)) => {
            return Err(Error::invalid(format!(
                "process.user: {user:?} is not in the image's /etc/passwd"
            )));
        }
    };
    let mut groups = additional.to_vec();
    let gid = match wanted_group {
        Some(wanted) => match group_entries(group).find(|(name, ..)| *name == wanted) {
            Some((_, gid, _)) => gid,
            None => wanted.parse().map_err(|_| {
                Error::invalid(format!(
                    "process.user: group {wanted:?} is not in the image's /etc/group"
                ))
            })?,
        },
        None => {
            if let Some(entry) = &entry {
                let member_of = group_entries(group)
                    .filter(|(.., members)| members.split(',').any(|member| member == entry.name))
                    .map(|(_, gid, _)| gid);
                groups.extend(member_of);
            }
            entry.as_ref().map_or(0, |entry| entry.gid)
        }
    };
    groups.sort_unstable();
    groups.dedup();
    let home = entry.map_or("", |entry| entry.home);
    Ok(Identity {
        uid,
        gid,
        groups,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken line\nweb:x:33:34::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:40:root,web\nother:x:41:webmaster\n";

    #[test]
    fn a_name_brings_its_groups() {
        let identity = by_name(PASSWD, GROUP, "web", &[7]).unwrap();
        assert_eq!(
            identity,
            Identity {
                uid: 33,
                gid: 34,
                groups: vec![7, 40],
                home: "/var/www".into()
            }
        );
    }

    #[test]
    fn a_given_group_wins() {
        let identity = by_name(PASSWD, GROUP, "web:logs", &[]).unwrap();
        assert_eq!((identity.gid, identity.groups), (40, Vec::new()));
        assert_eq!(by_name(PASSWD, GROUP, "1000:2000", &[]).unwrap().gid, 2000);
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(
            by_name(PASSWD, GROUP, "nobody", &[])
                .unwrap_err()
                .to_string()
                .contains("\"nobody\"")
        );
        assert!(
            by_name(PASSWD, GROUP, "web:wheel", &[])
                .unwrap_err()
                .to_string()
                .contains("\"wheel\"")
        );
    }

    #[test]
    fn ids_need_no_entry() {
        assert_eq!(by_ids(PASSWD, 0, 0, &[]).home, "/root");
        assert_eq!(
            by_ids("", 12, 13, &[14]),
            Identity {
                uid: 12,
                gid: 13,
                groups: vec![14],
                home: "/".into()
            }
        );
    }
}
