//! Takes the control socket and serves one VM. Everything else comes over that socket.

// A test harness brings a main.
#![cfg_attr(not(test), no_main)]

use std::ffi::c_int;

use vmm::control::{CONTROL_FD, ExitReason};

const SUCCESS: c_int = 0;
const FAILURE: c_int = 1;
const USAGE: c_int = 2;

/// The C library calls this when it is ready: see [`vmm::sys::process::set_up`] for why there is no Rust runtime before it.
// SAFETY: the only `main` of the program, with the type that the C library expects. A panic in it ends the process
// (`extern "C"`).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    vmm::sys::process::set_up();
    let Ok(control) = vmm::sys::inherited::take_control_fd() else {
        eprintln!("eci-vmm: descriptor {CONTROL_FD} is not open: this program is started by the shim");
        return USAGE;
    };
    match vmm::event_loop::run(control.into()) {
        ExitReason::Shutdown | ExitReason::Reset | ExitReason::Killed => SUCCESS,
        _ => FAILURE,
    }
}
