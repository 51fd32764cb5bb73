//! The kill matrix: the agent, a shim or a VMM is killed at every moment the store counts, in every life of a group that
//! starts, is restarted and is deleted. Agent, shim and VMM are processes of their own, with the product's code in agent and
//! shim and the real store; in place of a virtual machine the VMM process has a guest that only keeps books (`machine`).
//!
//! This program plays every part: see [`main`].

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod agent_process;
mod bench;
mod machine;
mod matrix;

use std::{env, path::Path, process::ExitCode};

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let program = env::args_os().next().unwrap_or_default();
    if Path::new(&program)
        .file_name()
        .is_some_and(|name| name == bench::VMM)
    {
        machine::run();
        return ExitCode::SUCCESS;
    }
    if env::args().any(|argument| argument == "-namespace") {
        return agent_process::shim();
    }
    if let Some(dir) = env::var_os(bench::AGENT_VARIABLE) {
        return agent_process::agent(Path::new(&dir));
    }
    let trial = |name: &str, case: fn()| {
        Trial::test(name, move || {
            case();
            Ok(())
        })
    };
    let trials = vec![
        trial(
            "a_killed_shim_ends_a_group_that_is_not_restarted",
            matrix::a_killed_shim_ends_a_group_that_is_not_restarted,
        ),
        trial(
            "a_killed_vmm_ends_a_group_that_is_not_restarted",
            matrix::a_killed_vmm_ends_a_group_that_is_not_restarted,
        ),
        trial(
            "a_killed_vmm_is_a_failure_to_start_again_after",
            matrix::a_killed_vmm_is_a_failure_to_start_again_after,
        ),
        trial(
            "a_killed_agent_loses_nothing",
            matrix::a_killed_agent_loses_nothing,
        ),
        trial(
            "a_killed_shim_costs_one_sandbox",
            matrix::a_killed_shim_costs_one_sandbox,
        ),
        trial(
            "a_killed_vmm_costs_one_sandbox",
            matrix::a_killed_vmm_costs_one_sandbox,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
