//! Capability names (`linux/capability.h`).

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::{
    container::spec,
    error::{Error, Result},
};

/// Highest capability number this knows: `CAP_CHECKPOINT_RESTORE`.
const LAST: u32 = CapabilitySet::CHECKPOINT_RESTORE.bits().trailing_zeros();

/// The five sets of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Upper limit.
    pub bounding: CapabilitySet,
    /// Effective, permitted and inheritable.
    pub sets: CapabilitySets,
    /// Kept through `execve` of ordinary files.
    pub ambient: CapabilitySet,
}

/// Every capability there is, lowest number first.
pub fn all() -> impl Iterator<Item = CapabilitySet> {
    (0..=LAST).map(|number| CapabilitySet::from_bits_retain(1 << number))
}

fn parse_set(field: &str, names: &[String]) -> Result<CapabilitySet> {
    let mut set = CapabilitySet::empty();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        set |= CapabilitySet::from_name(short).ok_or_else(|| {
            Error::invalid(format!(
                "process.capabilities.{field}: {name:?} is not a capability, such as CAP_CHOWN"
            ))
        })?;
    }
    Ok(set)
}

/// Turns the names of `spec` into sets.
///
/// # Errors
/// `InvalidArgument` for an unknown name.
pub fn parse(spec: &spec::Capabilities) -> Result<Capabilities> {
    Ok(Capabilities {
        bounding: parse_set("bounding", &spec.bounding)?,
        sets: CapabilitySets {
            effective: parse_set("effective", &spec.effective)?,
            permitted: parse_set("permitted", &spec.permitted)?,
            inheritable: parse_set("inheritable", &spec.inheritable)?,
        },
        ambient: parse_set("ambient", &spec.ambient)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_the_kernels_numbers() {
        let spec = spec::Capabilities {
            bounding: vec![
                "CAP_CHOWN".into(),
                "cap_checkpoint_restore".into(),
                "SYS_ADMIN".into(),
            ],
            ..Default::default()
        };
        let sets = parse(&spec).unwrap();
        assert_eq!(sets.bounding.bits(), 1 | 1 << 40 | 1 << 21);
        assert_eq!(
            sets.bounding,
            CapabilitySet::CHOWN | CapabilitySet::CHECKPOINT_RESTORE | CapabilitySet::SYS_ADMIN
        );
        assert!(sets.sets.effective.is_empty());
    }

    #[test]
    fn an_unknown_name_is_refused_by_field() {
        let spec = spec::Capabilities {
            ambient: vec!["CAP_FLY".into()],
            ..Default::default()
        };
        assert!(
            parse(&spec)
                .unwrap_err()
                .to_string()
                .contains("process.capabilities.ambient: \"CAP_FLY\"")
        );
    }
}
