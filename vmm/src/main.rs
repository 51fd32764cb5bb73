//! Takes the control socket and serves one VM. Everything else comes over that socket.

use std::process::ExitCode;

use vmm::control::{CONTROL_FD, ExitReason};

fn main() -> ExitCode {
    let Ok(control) = vmm::sys::inherited::take_control_fd() else {
        eprintln!("eci-vmm: descriptor {CONTROL_FD} is not open: this program is started by the shim");
        return ExitCode::from(2);
    };
    match vmm::event_loop::run(control.into()) {
        ExitReason::Shutdown | ExitReason::Reset | ExitReason::Killed => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
