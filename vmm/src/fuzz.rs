//! Entry points of the fuzz targets in `fuzz/` at the top of the repository: one a surface that takes bytes from a guest,
//! from a broken VMM, or from a snapshot. Built for fuzzers and for tests only; the tests replay the seeds.

pub use crate::control::fuzz::control_event;
pub use crate::devices::virtio::balloon::fuzz::balloon_queues;
pub use crate::devices::virtio::block::fuzz::block_queue;
pub use crate::devices::virtio::fuzz::{virtio_registers, virtqueue};
pub use crate::devices::virtio::mem::fuzz::mem_queue;
pub use crate::devices::virtio::net::fuzz::net_queue;
pub use crate::devices::virtio::rng::fuzz::rng_queue;
pub use crate::devices::virtio::vsock::fuzz::{vsock_packets, vsock_queue};
pub use crate::snapshot::fuzz::machine_state;

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this crate.
pub const TARGETS: &[Target] = &[
    ("balloon_queues", balloon_queues),
    ("block_queue", block_queue),
    ("control_event", control_event),
    ("machine_state", machine_state),
    ("mem_queue", mem_queue),
    ("net_queue", net_queue),
    ("rng_queue", rng_queue),
    ("virtio_registers", virtio_registers),
    ("virtqueue", virtqueue),
    ("vsock_packets", vsock_packets),
    ("vsock_queue", vsock_queue),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Seeds and former findings, and what is left of each when its end is lost.
    #[test]
    fn seeds_replay() {
        for (target, run) in super::TARGETS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../fuzz/seeds")
                .join(target);
            let mut seeds: Vec<_> = std::fs::read_dir(&directory)
                .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(!seeds.is_empty(), "{} has no seeds", directory.display());
            seeds.sort();
            for seed in seeds {
                println!("{}", seed.display());
                let bytes = std::fs::read(&seed).unwrap();
                run(&bytes);
                for eighth in 0..8 {
                    run(&bytes[..bytes.len() * eighth / 8]);
                }
            }
        }
    }
}
