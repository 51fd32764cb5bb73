//! The guest API in a virtual machine, with the guest's own kernel: the cases of `containers.rs` one after the other, since
//! a boot takes long where KVM is emulated. Needs KVM and `make build`; what is missing is said.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cases;
mod framework;
mod machine;

use framework::{run_case, spec};

macro_rules! run_all {
    ($guest:ident: $($name:ident,)*) => {
        $(if is_wanted(stringify!($name)) {
            eprintln!("{}", stringify!($name));
            run_case($guest, cases::$name).await;
        })*
    };
}

/// With `ECI_CASE` set, only cases with that in their name are.
fn is_wanted(case: &str) -> bool {
    std::env::var("ECI_CASE").map_or(true, |wanted| case.contains(&wanted))
}

#[test]
fn the_guest_does_what_it_must() {
    machine::run(async |guest| {
        run_all! { guest:
            a_container_says_hello_and_its_exit_code_arrives,
            the_inside_is_closed,
            mounts_stay_inside_the_root,
            output_is_never_lost,
            a_host_that_reads_late_gets_everything,
            input_ends_when_the_host_closes_it,
            processes_are_added_signalled_and_deleted,
            what_cannot_be_run_is_named,
            a_terminal_is_a_terminal,
            daemons_do_not_hold_up_the_end,
            a_shared_pid_namespace_is_cleared_with_its_container,
            wrong_requests_leave_nothing,
            a_filter_of_the_specification_wins,
            counters_count,
            a_container_that_takes_too_much_memory_is_killed,
            containers_see_the_ids_of_their_sandbox,
            frozen_containers_stand_still,
            a_clone_becomes_another_sandbox,
            a_terminal_takes_another_host,
        }
        // The kernel was told to start one only.
        let (_, out, _) = guest.run_to_end("c1", &spec(&["nproc"])).await;
        assert_eq!(out, format!("{}\n", machine::N_VCPUS));
        let stats = guest.sandbox_stats().await;
        eprintln!("resident: {} KiB", stats.init_resident_bytes >> 10);
        assert!(stats.init_resident_bytes <= 4 << 20, "{stats}");
    });
}
