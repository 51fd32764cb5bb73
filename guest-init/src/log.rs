//! Lines in the kernel's log, which goes to the serial console; the kernel limits their rate and number.

use std::{error::Error, fs::OpenOptions, io::Write};

/// Longest message; the kernel cuts at about this length too.
const MAX_BYTES: usize = 900;

/// Something the operator should see.
pub fn error(message: &str) {
    write(3, message);
}

/// Something that helps to understand an error.
pub fn info(message: &str) {
    write(6, message);
}

/// An error nobody is told of otherwise, with its causes.
pub fn failure(action: &str, failed: &(dyn Error + 'static)) {
    error(&format!("{action}: {}", chain(failed)));
}

/// An error with its causes.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn write(level: u8, message: &str) {
    let mut end = message.len().min(MAX_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let line = format!("<{level}>eci-guest-init: {}", &message[..end].replace('\n', " "));
    // Outside a guest, and when the log cannot be opened, there is nobody else to tell.
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
