//! Counters of a device: written by its threads, read by whoever asks for statistics.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A device's counters under their public, stable names.
pub trait Counters: Debug + Send + Sync {
    /// Adds every counter to `into`, its name prefixed with the device's (`blk_vda_read_bytes`).
    fn collect(&self, into: &mut BTreeMap<String, u64>);
}

/// Declares a struct of [`Counter`]s with a name prefix, and its [`Counters`] implementation.
macro_rules! define_counters {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name {
            prefix: &'static str,
            $($(#[$field_meta])* pub $field: $crate::devices::virtio::counters::Counter,)*
        }

        impl $name {
            /// All zero. `prefix` begins every name.
            pub fn new(prefix: &'static str) -> Self {
                $name { prefix, $($field: Default::default(),)* }
            }
        }

        impl $crate::devices::virtio::counters::Counters for $name {
            fn collect(&self, into: &mut std::collections::BTreeMap<String, u64>) {
                $(into.insert(format!("{}_{}", self.prefix, stringify!($field)), self.$field.get());)*
            }
        }
    };
}
pub(crate) use define_counters;
