//! Reads container logs: files of CRI lines (`<RFC 3339 time> stdout|stderr F|P <text>`) that the shim writes and
//! rotates (`0.log` becomes `0.log.1`).
//!
//! A reader takes in complete lines only, joins partial ones, and when following waits for inotify events.

mod follow;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod last;
mod line;
mod read;

pub use follow::stream;
pub use last::last_text;
pub use line::{Entry, Joiner, parse_entry};
