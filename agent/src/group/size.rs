//! The sizes a group may have, as data, and the rules that bring a wanted size to one of them.

use super::{lifecycle::Role, spec::Size};

const GIB: u64 = 1 << 30;

/// A container that says nothing counts as this much.
pub const DEFAULT_CONTAINER: Size = Size {
    cpu_milli: 1000,
    memory_bytes: 2 * GIB,
};

/// A group in which nothing is said at all.
pub const DEFAULT_GROUP: Size = Size {
    cpu_milli: 2000,
    memory_bytes: 4 * GIB,
};

/// Sizes that exist, by vCPU and then memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizeTable {
    sizes: Vec<Size>,
    /// Up to this vCPU count a size that does not exist is raised to the next one; above it is refused.
    raise_up_to_cpu_milli: u32,
}

/// vCPU in thousandths, and the memory sizes in MiB offered with it.
const PUBLISHED: &[(u32, &[u64])] = &[
    (250, &[512, 1024]),
    (500, &[1024, 2048]),
    (1000, &[2048, 4096, 8192]),
    (2000, &[2048, 4096, 8192, 16_384]),
    (4000, &[4096, 8192, 16_384, 32_768]),
    (8000, &[8192, 16_384, 32_768, 65_536]),
    (12_000, &[12_288, 24_576, 49_152, 98_304]),
    (16_000, &[16_384, 32_768, 65_536, 131_072]),
    (24_000, &[49_152, 98_304, 196_608]),
    (32_000, &[65_536, 131_072, 262_144]),
    (52_000, &[98_304, 196_608, 393_216]),
    (64_000, &[131_072, 262_144, 524_288]),
];

impl Default for SizeTable {
    fn default() -> Self {
        let sizes = PUBLISHED.iter().flat_map(|(cpu_milli, memories)| {
            memories.iter().map(|mib| Size {
                cpu_milli: *cpu_milli,
                memory_bytes: mib << 20,
            })
        });
        Self {
            sizes: sizes.collect(),
            raise_up_to_cpu_milli: 4000,
        }
    }
}

/// A size that does not exist and is not raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSuchSize {
    /// The largest that exists and is not above it in any way.
    pub below: Option<Size>,
    /// The smallest that exists and is not below it in any way.
    pub above: Option<Size>,
}

impl std::fmt::Display for NoSuchSize {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("no such size; nearest valid: ")?;
        match (self.below, self.above) {
            (Some(below), Some(above)) => write!(formatter, "{} or {}", text(below), text(above)),
            (Some(only), None) | (None, Some(only)) => formatter.write_str(&text(only)),
            (None, None) => formatter.write_str("none"),
        }
    }
}

/// `2 vCPU / 4 GiB`
pub fn text(size: Size) -> String {
    // Exact to thousandths; for people only.
    let gib_milli = u128::from(size.memory_bytes) * 1000 / u128::from(GIB);
    format!(
        "{} vCPU / {} GiB",
        thousandths(u128::from(size.cpu_milli)),
        thousandths(gib_milli)
    )
}

fn thousandths(value: u128) -> String {
    let text = format!("{}.{:03}", value / 1000, value % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl SizeTable {
    /// The size a group gets that wants `wanted`.
    ///
    /// # Errors
    /// No such size, and none it is raised to.
    pub fn fit(&self, wanted: Size) -> Result<Size, NoSuchSize> {
        let above = self
            .sizes
            .iter()
            .find(|size| size.cpu_milli >= wanted.cpu_milli && size.memory_bytes >= wanted.memory_bytes)
            .copied();
        match above {
            Some(size) if size == wanted || size.cpu_milli <= self.raise_up_to_cpu_milli => Ok(size),
            _ => Err(NoSuchSize {
                below: self
                    .sizes
                    .iter()
                    .rfind(|size| {
                        size.cpu_milli <= wanted.cpu_milli && size.memory_bytes <= wanted.memory_bytes
                    })
                    .copied(),
                above,
            }),
        }
    }
}

/// What a container asks for; a missing half counts as the half of [`DEFAULT_CONTAINER`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Thousandths of a vCPU.
    pub cpu_milli: Option<u32>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// What the containers of a group say together: those that run side by side add up, and an init container counts with the
/// sidecars before it. Unsaid is none.
pub fn said_in_turns(containers: &[(Role, Wanted)]) -> (u32, u64) {
    let said = |wanted: &Wanted| (wanted.cpu_milli.unwrap_or(0), wanted.memory_bytes.unwrap_or(0));
    let add = |a: (u32, u64), b: (u32, u64)| (a.0.saturating_add(b.0), a.1.saturating_add(b.1));
    let (mut together, mut most) = ((0, 0), (0, 0));
    for (role, wanted) in containers.iter().filter(|(role, _)| role.takes_turns()) {
        let now = add(together, said(wanted));
        most = (now.0.max(most.0), now.1.max(most.1));
        if *role == Role::Sidecar {
            together = now;
        }
    }
    let apps = containers.iter().filter(|(role, _)| *role == Role::App);
    let together = apps.fold(together, |sum, (_, wanted)| add(sum, said(wanted)));
    (together.0.max(most.0), together.1.max(most.1))
}

/// The size a group wants whose own is not given: the sum of what runs side by side, or what an init container needs.
pub fn sum_in_turns(containers: &[(Role, Wanted)]) -> Size {
    let beside: Vec<_> = containers
        .iter()
        .filter(|(role, _)| *role != Role::Init)
        .map(|(_, wanted)| *wanted)
        .collect();
    let sum = sum(&beside);
    let (cpu_milli, memory_bytes) = said_in_turns(containers);
    Size {
        cpu_milli: sum.cpu_milli.max(cpu_milli),
        memory_bytes: sum.memory_bytes.max(memory_bytes),
    }
}

/// The sum a group wants whose own size is not given.
pub fn sum(containers: &[Wanted]) -> Size {
    if containers.iter().all(|wanted| *wanted == Wanted::default()) {
        return DEFAULT_GROUP;
    }
    containers.iter().fold(
        Size {
            cpu_milli: 0,
            memory_bytes: 0,
        },
        |sum, wanted| Size {
            cpu_milli: sum
                .cpu_milli
                .saturating_add(wanted.cpu_milli.unwrap_or(DEFAULT_CONTAINER.cpu_milli)),
            memory_bytes: sum
                .memory_bytes
                .saturating_add(wanted.memory_bytes.unwrap_or(DEFAULT_CONTAINER.memory_bytes)),
        },
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(cpu_milli: u32, mib: u64) -> Size {
        Size {
            cpu_milli,
            memory_bytes: mib << 20,
        }
    }

    #[test]
    fn sizes_are_raised_up_to_four_cpus() {
        let table = SizeTable::default();
        for (wanted, given) in [
            (size(2000, 3072), size(2000, 4096)),
            (size(250, 4096), size(1000, 4096)),
            (size(100, 64), size(250, 512)),
            (size(3000, 4096), size(4000, 4096)),
            (size(4000, 32_768), size(4000, 32_768)),
            (size(24_000, 49_152), size(24_000, 49_152)),
            (size(0, 0), size(250, 512)),
        ] {
            assert_eq!(table.fit(wanted), Ok(given), "{}", text(wanted));
        }
    }

    #[test]
    fn above_four_cpus_the_nearest_are_named() {
        let table = SizeTable::default();
        let refused = table.fit(size(7000, 13 * 1024)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "no such size; nearest valid: 4 vCPU / 8 GiB or 8 vCPU / 16 GiB"
        );
        assert!(table.fit(size(4000, 40 * 1024)).is_err());
        let refused = table.fit(size(65_000, 1)).unwrap_err();
        assert_eq!(refused.above, None);
    }

    #[test]
    fn sums() {
        let none = Wanted::default();
        let some = Wanted {
            cpu_milli: Some(500),
            memory_bytes: Some(GIB),
        };
        assert_eq!(sum(&[none, none]), DEFAULT_GROUP);
        assert_eq!(sum(&[none, some]), size(1500, 3072));
        let half = Wanted {
            cpu_milli: Some(100),
            memory_bytes: None,
        };
        assert_eq!(sum(&[half]), size(100, 2048));
        let huge = Wanted {
            cpu_milli: Some(u32::MAX),
            memory_bytes: Some(u64::MAX),
        };
        assert_eq!(sum(&[huge, huge]).cpu_milli, u32::MAX);
    }

    proptest! {
        /// What is given exists, is enough, and nothing smaller that exists would be.
        #[test]
        fn given_sizes_exist_and_are_the_least(cpu in 0_u32..70_000, mib in 0_u64..600_000) {
            let table = SizeTable::default();
            let wanted = size(cpu, mib);
            match table.fit(wanted) {
                Ok(given) => {
                    prop_assert!(table.sizes.contains(&given));
                    prop_assert!(given.cpu_milli >= cpu && given.memory_bytes >= wanted.memory_bytes);
                    prop_assert!(given == wanted || given.cpu_milli <= 4000);
                    for other in &table.sizes {
                        let enough = other.cpu_milli >= cpu && other.memory_bytes >= wanted.memory_bytes;
                        let less = other.cpu_milli < given.cpu_milli
                            || (other.cpu_milli == given.cpu_milli && other.memory_bytes < given.memory_bytes);
                        prop_assert!(!(enough && less));
                    }
                    // Asking for what was given gives the same.
                    prop_assert_eq!(table.fit(given), Ok(given));
                }
                Err(refused) => {
                    prop_assert!(!table.sizes.contains(&wanted));
                    if let Some(above) = refused.above {
                        prop_assert!(above.cpu_milli > 4000);
                    }
                }
            }
        }
    }
}
