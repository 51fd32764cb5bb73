//! Who may use the local socket: root, the agent's own user, and members of one group.

use std::fs;

use tokio::net::UnixStream;

/// Who may use the socket.
#[derive(Debug, Clone)]
pub(crate) struct AllowedPeers {
    own_uid: u32,
    group: Option<AllowedGroup>,
}

#[derive(Debug, Clone)]
struct AllowedGroup {
    name: String,
    gid: u32,
    /// Users that have it as a further group.
    members: Vec<u32>,
}

impl AllowedPeers {
    /// Root and the own user.
    pub(crate) fn root_only() -> Self {
        Self {
            own_uid: rustix::process::geteuid().as_raw(),
            group: None,
        }
    }

    /// Also the group of this name or number; `None` when the host has none such.
    pub(crate) fn with_group(text: &str) -> Option<Self> {
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        Some(Self {
            group: Some(find_group(text, &groups, &users)?),
            ..Self::root_only()
        })
    }

    /// The group's number.
    pub(crate) fn gid(&self) -> Option<u32> {
        self.group.as_ref().map(|group| group.gid)
    }

    /// Checks the process at the other end.
    ///
    /// # Errors
    /// What to tell it.
    pub(crate) fn check(&self, stream: &UnixStream) -> Result<(), String> {
        let peer = stream
            .peer_cred()
            .map_err(|error| format!("The agent can't tell who you are: {error}"))?;
        if self.allows(peer.uid(), peer.gid()) {
            return Ok(());
        }
        let who = match &self.group {
            Some(group) => format!("root and members of the group {}", group.name),
            None => "root".to_owned(),
        };
        Err(format!(
            "User {} may not use the agent's socket; only {who} may (see admin.group in the agent's configuration)",
            peer.uid()
        ))
    }

    fn allows(&self, uid: u32, gid: u32) -> bool {
        let in_group = |group: &AllowedGroup| group.gid == gid || group.members.contains(&uid);
        uid == 0 || uid == self.own_uid || self.group.as_ref().is_some_and(in_group)
    }
}

/// Finds a group and its members in the texts of `/etc/group` and `/etc/passwd`.
fn find_group(text: &str, groups: &str, users: &str) -> Option<AllowedGroup> {
    let uid_of = |name: &str| {
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then(|| fields.nth(1)?.parse::<u32>().ok())?
        })
    };
    let line = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let found = line
        .filter(|fields| fields.len() >= 4)
        .find(|fields| fields[0] == text || fields[2] == text);
    match found {
        Some(fields) => Some(AllowedGroup {
            name: fields[0].to_owned(),
            gid: fields[2].parse().ok()?,
            members: fields[3].split(',').filter_map(uid_of).collect(),
        }),
        // A number needs no entry.
        None => Some(AllowedGroup {
            name: text.to_owned(),
            gid: text.parse().ok()?,
            members: Vec::new(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\neci:x:120:alice,bob,ghost\n";
    const USERS: &str =
        "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\n";

    #[test]
    fn members_are_found_by_name_or_number() {
        for text in ["eci", "120"] {
            let group = find_group(text, GROUPS, USERS).unwrap();
            assert_eq!((group.gid, group.members), (120, vec![1000, 1001]));
        }
        assert_eq!(find_group("7", GROUPS, USERS).unwrap().gid, 7);
        assert!(find_group("nope", GROUPS, USERS).is_none());
    }

    #[test]
    fn others_are_refused() {
        let allowed = AllowedPeers {
            own_uid: 500,
            group: find_group("eci", GROUPS, USERS),
        };
        assert!(
            allowed.allows(0, 0)
                && allowed.allows(500, 9)
                && allowed.allows(9, 120)
                && allowed.allows(1000, 9)
        );
        assert!(!allowed.allows(9, 9));
        let root = AllowedPeers {
            own_uid: 0,
            group: None,
        };
        assert!(!root.allows(1000, 120));
    }
}
