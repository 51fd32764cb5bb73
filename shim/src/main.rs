//! Wiring only.

use std::process::ExitCode;

use shim::{
    args::{Action, Args, SOCKET_DIR_ENV},
    delete, run, start,
};

fn main() -> ExitCode {
    let parsed = Args::parse(std::env::args().skip(1), std::env::var(SOCKET_DIR_ENV).ok());
    let done = parsed.and_then(|args| match args.action {
        Action::Start => start::start(&args),
        Action::Delete => delete::delete(&args),
        Action::Run => run::run(&args, run::this_host()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-eci-v2: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}
