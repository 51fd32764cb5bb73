//! What PID 1 does before it serves: the steps, each once.

pub mod clock;
pub mod cmdline;
pub mod entropy;
pub mod limits;
pub mod mounts;

use std::{fs, io::Write};

use rustix::system::{RebootCommand, reboot};

/// Prints one line on the console.
pub fn print(line: &str) {
    if let Ok(mut console) = fs::OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
}

/// Makes a panic visible, and ends the guest: without its init it is lost, and the host learns of it by the reset.
pub fn end_guest_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        print(&format!("eci: init panicked: {panic}"));
        rustix::fs::sync();
        let _ = reboot(RebootCommand::Restart);
    }));
}

/// Puts this process last in the kernel's choice of whom to kill for memory.
///
/// # Errors
/// When `/proc` is not there.
pub fn protect_from_oom() -> std::io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

/// Ends the guest. Returns only when the kernel refuses.
pub fn power_off() {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    let _ = reboot(RebootCommand::Restart);
}
