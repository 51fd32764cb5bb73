//! Devices at I/O ports: one-way serial console, and the ports that end the machine.

mod console;
mod ports;

pub use console::{Console, ConsoleOutput, ConsoleState, ConsoleStats};
pub use ports::{PanicPort, ResetPort, SleepPort};
