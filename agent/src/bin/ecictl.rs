//! Wiring only.

fn main() -> std::process::ExitCode {
    agent::ctl::main()
}
