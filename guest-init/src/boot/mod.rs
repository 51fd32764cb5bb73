//! What PID 1 does before it serves: the steps, each once.

pub mod clock;
pub mod cmdline;
pub mod entropy;
pub mod limits;
pub mod mounts;

use std::{fs, io::Write, sync::mpsc, thread, time::Duration};

use rustix::system::{RebootCommand, reboot};

/// For what was written to reach the disks when the guest ends.
const SYNC_DEADLINE: Duration = Duration::from_secs(3);

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
        sync();
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

/// Writes what was written to the disks. A volume whose server is gone would hold this for ever.
fn sync() {
    let (done, end) = mpsc::channel();
    let synced = thread::Builder::new().spawn(move || {
        rustix::fs::sync();
        let _ = done.send(());
    });
    if synced.is_ok() {
        let _ = end.recv_timeout(SYNC_DEADLINE);
    }
}

/// Ends the guest. Returns only when the kernel refuses.
pub fn power_off() {
    sync();
    let _ = reboot(RebootCommand::PowerOff);
    let _ = reboot(RebootCommand::Restart);
}
