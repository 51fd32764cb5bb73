//! The kernel's command line, as far as it concerns the guest init.

/// What the guest is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Serve the guest API.
    #[default]
    Serve,
    /// Say that the init was reached, and power off (`eci.mode=bench`).
    Bench,
}

/// Options of the guest init; each is a word `eci.<name>=<value>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// `eci.mode`.
    pub mode: Mode,
}

impl Options {
    /// Reads a command line; other words, and words not understood, are skipped: nobody could be told.
    #[must_use]
    pub fn parse(cmdline: &str) -> Self {
        let mut options = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            if word == "eci.mode=bench" {
                options.mode = Mode::Bench;
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_words_count() {
        assert_eq!(
            Options::parse("console=ttyS0 eci.mode=bench quiet\n").mode,
            Mode::Bench
        );
        assert_eq!(
            Options::parse("x.eci.mode=bench eci.mode=benchmark").mode,
            Mode::Serve
        );
    }
}
