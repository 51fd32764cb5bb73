//! A group that becomes larger or smaller while its containers run: what its machine can become, and in which order. Pure.
//!
//! Who may have more gets it last, and who is to have less has to do with less first, so that nobody ever finds less than it was
//! promised:
//!
//! ```text
//!  larger   limits of the host  ->  sandbox     ->  containers
//!  smaller  containers          ->  sandbox     ->  limits of the host
//! ```
//! Each step may be done again, and does nothing then: an agent that was killed begins anew with the first. A resize that fails
//! is taken back by the same steps the other way.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::spec::{GroupSpec, Size};

/// Reason of the event that a group keeps its size.
pub const RESIZE_FAILED: &str = "ResizeFailed";

/// How far a resize is. What the group is to be is its update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resizing {
    /// It is brought about.
    Forth,
    /// It is taken back.
    Back {
        /// Why it was not brought about.
        why: String,
    },
}

/// The machine of a running sandbox, as far as it can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// vCPUs it can have.
    pub n_possible_vcpus: u64,
    /// Memory it began with.
    pub memory_mib: u64,
    /// Memory that can be plugged beside.
    pub hotplug_mib: u64,
}

impl Machine {
    /// Out of what a shim tells of its sandbox; `None` when it does not tell.
    pub fn of(info: &HashMap<String, String>) -> Option<Self> {
        let number = |key: &str| info.get(key)?.parse().ok();
        Some(Self {
            n_possible_vcpus: number("n_possible_vcpus")?,
            memory_mib: number("memory_mib")?,
            hotplug_mib: number("hotplug_mib")?,
        })
    }

    /// Whether it can come to have so much while it runs. Less than it began with it can always have: as a limit.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn can_have(&self, n_vcpus: u32, memory_mib: u32) -> Result<(), String> {
        if u64::from(n_vcpus) > self.n_possible_vcpus {
            return Err(format!(
                "the sandbox can have at most {} vCPUs while it runs, {n_vcpus} are wanted",
                self.n_possible_vcpus
            ));
        }
        let most = self.memory_mib + self.hotplug_mib;
        if u64::from(memory_mib) > most {
            return Err(format!(
                "the sandbox can have at most {most} MiB of memory while it runs, {memory_mib} are wanted"
            ));
        }
        Ok(())
    }
}

/// One step of a resize.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The host allows the sandbox this much.
    Host(Size),
    /// The sandbox has this much.
    Sandbox(Size),
    /// The container of this number has the limits of the group that it is to be.
    Container(usize),
}

/// The larger of both in each way.
pub fn larger(a: Size, b: Size) -> Size {
    Size {
        cpu_milli: a.cpu_milli.max(b.cpu_milli),
        memory_bytes: a.memory_bytes.max(b.memory_bytes),
    }
}

/// The steps from one form of a group to another that differs in sizes only.
pub fn steps(from: &GroupSpec, to: &GroupSpec) -> Vec<Step> {
    let containers = from.containers.iter().zip(&to.containers).enumerate();
    let containers = containers
        .filter(|(_, (from, to))| from.size != to.size)
        .map(|(index, _)| Step::Container(index));
    if from.size == to.size {
        return containers.collect();
    }
    let mut steps = vec![Step::Host(larger(from.size, to.size))];
    // Of memory there has to be enough for those who may use it; for processor time one only waits longer.
    let key = |size: Size| (size.memory_bytes, size.cpu_milli);
    if key(to.size) < key(from.size) {
        steps.extend(containers);
        steps.push(Step::Sandbox(to.size));
    } else {
        steps.push(Step::Sandbox(to.size));
        steps.extend(containers);
    }
    steps.push(Step::Host(to.size));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::spec::testing;

    fn size(cpu_milli: u32, mib: u64) -> Size {
        Size {
            cpu_milli,
            memory_bytes: mib << 20,
        }
    }

    fn group(whole: Size, second: Option<Size>) -> GroupSpec {
        let mut group = testing::group("g", 2);
        group.size = whole;
        group.containers[1].size = second;
        group
    }

    #[test]
    fn who_may_have_more_gets_it_last_and_who_is_to_have_less_goes_first() {
        let (small, large) = (
            group(size(1000, 512), Some(size(500, 256))),
            group(size(2000, 1024), None),
        );
        let (host, sandbox) = (Step::Host(large.size), Step::Sandbox(large.size));
        assert_eq!(steps(&small, &large), [host, sandbox, Step::Container(1), host]);
        let small_host = Step::Host(small.size);
        let expected = [host, Step::Container(1), Step::Sandbox(small.size), small_host];
        assert_eq!(steps(&large, &small), expected);
        // Limits within a group that stays as it is.
        let limited = group(small.size, None);
        assert_eq!(steps(&small, &limited), [Step::Container(1)]);
        // More processor and less memory: the host allows both until the end.
        let other = group(size(4000, 256), Some(size(500, 256)));
        let steps = steps(&small, &other);
        assert_eq!(steps.first(), Some(&Step::Host(size(4000, 512))));
        assert_eq!(steps[1..], [Step::Sandbox(other.size), Step::Host(other.size)]);
    }

    #[test]
    fn a_machine_can_have_what_it_was_made_for_and_anything_less() {
        let info = [
            ("n_possible_vcpus", "4"),
            ("memory_mib", "576"),
            ("hotplug_mib", "1024"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let machine = Machine::of(&info.clone().into()).unwrap();
        assert_eq!(Machine::of(&info[1..].iter().cloned().collect()), None);
        assert_eq!(machine.can_have(4, 1600), Ok(()));
        assert_eq!(machine.can_have(1, 64), Ok(()));
        assert!(machine.can_have(5, 64).unwrap_err().contains("at most 4 vCPUs"));
        assert!(
            machine
                .can_have(1, 1601)
                .unwrap_err()
                .contains("at most 1600 MiB")
        );
    }
}
