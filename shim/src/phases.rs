//! How long the phases of a piece of work take, one after the other.

use std::time::Instant;

/// A stop watch with names.
#[derive(Debug, Clone)]
pub struct Phases {
    last: Instant,
    done: Vec<(&'static str, u64)>,
}

impl Phases {
    /// The first phase begins.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            last: Instant::now(),
            done: Vec::new(),
        }
    }

    /// The phase that was under way ends, and was called so; the next one begins.
    pub fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        let us = u64::try_from((now - self.last).as_micros()).unwrap_or(u64::MAX);
        self.last = now;
        self.done.push((name, us));
    }

    /// `name=microseconds`, in order, separated by spaces.
    #[must_use]
    pub fn text(&self) -> String {
        let parts: Vec<String> = self
            .done
            .iter()
            .map(|(name, us)| format!("{name}={us}"))
            .collect();
        parts.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_in_order() {
        let mut phases = Phases::begin();
        assert_eq!(phases.text(), "");
        phases.end("a");
        std::thread::sleep(std::time::Duration::from_millis(2));
        phases.end("b");
        let text = phases.text();
        let parts: Vec<_> = text.split([' ', '=']).collect();
        assert_eq!((parts[0], parts[2]), ("a", "b"));
        assert!(parts[3].parse::<u64>().unwrap() >= 2000, "{text}");
    }
}
