//! What the halves of a balloon and its owner share.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::PFN_SHIFT;
use crate::devices::virtio::Counters;
use crate::devices::virtio::counters::define_counters;
use crate::devices::virtio::worker::event_fd;

define_counters!(
    /// What a balloon counts.
    BalloonCounters {
        /// Bytes that the guest gave up on request.
        inflated_bytes,
        /// Bytes that the guest took back.
        deflated_bytes,
        /// Bytes that the guest reported as free.
        reported_bytes,
        /// Bytes given back to the host, by either way.
        discarded_bytes,
        /// Chains that are no request.
        bad_requests,
        /// Ranges that are no whole pages of guest memory.
        bad_ranges,
        /// Ranges that the host did not take back.
        discard_failures,
    }
);

/// The statistics that are passed on: tag (linux/virtio_balloon.h) and name. The driver has more.
const STATS: [(u16, &str); 5] = [
    (4, "balloon_guest_free_bytes"),
    (5, "balloon_guest_total_bytes"),
    (6, "balloon_guest_available_bytes"),
    (7, "balloon_guest_cache_bytes"),
    (10, "balloon_guest_oom_kills"),
];

/// Sizes, statistics and counters of one balloon.
#[derive(Debug)]
pub(super) struct Shared {
    /// What the owner asks for, in pages of 4 KiB: `num_pages` of the configuration.
    target_pages: AtomicU32,
    /// What the driver says it has given up: `actual` of the configuration.
    actual_pages: AtomicU32,
    /// As the driver said it last, in the order of [`STATS`].
    stats: [AtomicU64; STATS.len()],
    /// Readable when the target changed.
    pub(super) target_changed: EventFd,
    /// Readable when somebody wants newer statistics.
    pub(super) stats_wanted: EventFd,
    pub(super) counters: BalloonCounters,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Shared {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            stats: Default::default(),
            target_changed: event_fd()?,
            stats_wanted: event_fd()?,
            counters: BalloonCounters::new("balloon"),
        })
    }

    pub(super) fn set_target(&self, pages: u32) {
        self.target_pages.store(pages, Ordering::Release);
        // A full counter is readable, which is all that is wanted.
        let _ = self.target_changed.write(1);
    }

    /// The guest has given up what was asked for.
    pub(super) fn is_settled(&self) -> bool {
        self.target_pages.load(Ordering::Acquire) == self.actual_pages.load(Ordering::Acquire)
    }

    /// What both were when the device was saved. A guest that has what was asked for is told nothing.
    pub(super) fn load(&self, target_pages: u32, actual_pages: u32) {
        self.set_actual(actual_pages);
        if target_pages == actual_pages {
            self.target_pages.store(target_pages, Ordering::Release);
        } else {
            self.set_target(target_pages);
        }
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual_pages.store(pages, Ordering::Release);
    }

    /// `num_pages` and `actual` as the driver reads them (virtio 1.2, 5.5.4).
    pub(super) fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target_pages.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&self.actual_pages.load(Ordering::Acquire).to_le_bytes());
        config
    }

    pub(super) fn set_stats(&self, said: &[(u16, u64)]) {
        for ((tag, _), slot) in STATS.iter().zip(&self.stats) {
            if let Some((_, value)) = said.iter().find(|(said, _)| said == tag) {
                slot.store(*value, Ordering::Relaxed);
            }
        }
    }
}

impl Counters for Shared {
    /// Also asks the guest for newer statistics: they are in the next answer.
    fn collect(&self, into: &mut BTreeMap<String, u64>) {
        self.counters.collect(into);
        for ((_, name), value) in STATS.iter().zip(&self.stats) {
            into.insert((*name).to_owned(), value.load(Ordering::Relaxed));
        }
        for (name, pages) in [
            ("balloon_target_bytes", &self.target_pages),
            ("balloon_actual_bytes", &self.actual_pages),
        ] {
            let bytes = u64::from(pages.load(Ordering::Relaxed)) << PFN_SHIFT;
            into.insert(name.to_owned(), bytes);
        }
        // A full counter is readable, which is all that is wanted.
        let _ = self.stats_wanted.write(1);
    }
}
