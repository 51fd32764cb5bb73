//! The network as groups find it: who has which address when an agent starts, and what of a group's wishes this host can
//! grant.

use super::Host;
use crate::{
    config::Config,
    error::{Error, Result},
    group::{
        network::security_group_field,
        spec::GroupSpec,
        violation::{ViolationKind, Violations},
    },
    network::{Lease, Network, Policy},
    store::Record,
};

/// Opens the network with the addresses that groups have.
pub(super) async fn open(config: &Config, records: &[Record]) -> Result<Network> {
    let lease = |record: &Record| {
        Some(Lease {
            id: record.group.id.clone(),
            ip: record.ip?,
            policy: Policy::of(&record.group.spec),
            is_attached: record.sandbox_running,
        })
    };
    let leases = records.iter().filter_map(lease).collect();
    Network::open(config.network.clone(), config.security_group.clone(), leases).await
}

impl Host {
    /// Refuses what the network of this host does not have, with all that is wrong about it.
    pub(super) fn admit_to_network(&self, spec: &GroupSpec) -> Result<()> {
        let mut found = Violations::default();
        let known: Vec<&str> = self.parts.network.security_groups().collect();
        unknown_security_groups(spec, &known, &mut found);
        if found.0.is_empty() {
            Ok(())
        } else {
            Err(Error::refused(found))
        }
    }
}

fn unknown_security_groups(spec: &GroupSpec, known: &[&str], found: &mut Violations) {
    let valid = if known.is_empty() {
        "none is configured; valid: nothing, or an id from [[security_group]] of the agent's configuration"
            .to_owned()
    } else {
        format!("valid: {}", known.join(", "))
    };
    for id in &spec.network.security_groups {
        if !known.contains(&id.as_str()) {
            found.add(
                ViolationKind::UnknownSecurityGroup,
                security_group_field(spec.door),
                id,
                format!("no such security group on this host; {valid}"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::spec::{Door, testing};

    #[test]
    fn unknown_security_groups_are_named_in_the_words_of_the_door_with_those_there_are() {
        let mut spec = testing::group("g", 1);
        spec.network.security_groups = vec!["sg-a".into(), "sg-x".into(), "sg-y".into()];
        let said = |spec: &GroupSpec, known: &[&str]| {
            let mut found = Violations::default();
            unknown_security_groups(spec, known, &mut found);
            found.to_string()
        };
        let field = "metadata.annotations[k8s.aliyun.com/eci-security-group]";
        assert_eq!(
            said(&spec, &["sg-a", "sg-b"]),
            format!(
                "{field}: \"sg-x\": no such security group on this host; valid: sg-a, sg-b\n\
                 {field}: \"sg-y\": no such security group on this host; valid: sg-a, sg-b"
            )
        );
        spec.door = Door::Eci;
        spec.network.security_groups.truncate(1);
        assert_eq!(said(&spec, &["sg-a"]), "");
        let text = said(&spec, &[]);
        assert!(
            text.starts_with("SecurityGroupId: \"sg-a\": no such security group")
                && text.contains("none is configured"),
            "{text}"
        );
    }
}
