//! The guest API against a real kernel, without a virtual machine: the guest init's service runs as process 1 of
//! namespaces of its own, on Unix sockets, with loop devices as slice disks.
//!
//! Needs root, loop devices, EROFS, overlay, a cgroup v2 hierarchy (with or without controllers), and `mkfs.erofs` and
//! `busybox` to make an image. What is missing is said, and the tests pass without having run.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cases;
mod framework;
mod server;

/// Runs as process 1 of the namespaces: not a test of its own.
#[test]
fn serve() {
    server::serve();
}

macro_rules! cases {
    ($($name:ident,)*) => {
        $(#[test]
        fn $name() {
            server::run(cases::$name);
        })*
    };
}

cases! {
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
    containers_share_their_processes_when_they_are_to,
    paths_of_the_host_are_the_guests,
    all_devices_are_a_containers_that_may_use_all,
    wrong_requests_leave_nothing,
    a_filter_of_the_specification_wins,
    counters_count,
    a_container_that_takes_too_much_memory_is_killed,
    containers_see_the_ids_of_their_sandbox,
    frozen_containers_stand_still,
    a_clone_becomes_another_sandbox,
    a_terminal_takes_another_host,
}
