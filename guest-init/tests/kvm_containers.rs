//! The guest API in a virtual machine, with the guest's own kernel: the cases of `containers.rs` one after the other, since
//! a boot takes long where KVM is emulated, and forks of a running one. Needs KVM and `make build`; what is missing is said.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cases;
mod framework;
mod machine;

use std::collections::HashSet;

use framework::{run_case, spec};
use protocol::guest::ConfigureSandboxRequest;
use serde_json::json;
use ttrpc::Code;

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
        // The kernel was told to start one only.
        let (_, out, _) = guest.run_to_end("c1", &spec(&["nproc"])).await;
        assert_eq!(out, format!("{}\n", machine::N_VCPUS));
        let stats = guest.sandbox_stats().await;
        eprintln!("resident: {} KiB", stats.init_resident_bytes >> 10);
        assert!(stats.init_resident_bytes <= 4 << 20, "{stats}");
    });
}

/// Answers each line with what it was told at its start, the line, and 16 random bytes.
const ECHO: &str = "secret=$(cat /proc/sys/kernel/random/uuid); \\
    while read line; do echo \"$secret $line $(cat /proc/sys/kernel/random/uuid)\"; done";

/// What the program in `guest` answers to `line`: its memory, and something random.
async fn ask(input: &mut framework::Stream, out: &mut framework::Stream, line: &str) -> (String, String) {
    input.send(format!("{line}\n").as_bytes()).await;
    let answer = out.line().await;
    let words: Vec<_> = answer.split(' ').collect();
    assert_eq!(words[1], line, "{answer}");
    (words[0].to_owned(), words[2].to_owned())
}

#[test]
fn forks_go_on_as_sandboxes_of_their_own() {
    let size = machine::Size {
        memory_mib: 256,
        hotplug_mib: 0,
    };
    machine::run_sized(size, async |machine, guest| {
        let mut spec = spec(&["sh", "-c", ECHO]);
        spec["hostname"] = json!("guest");
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "uts"}]);
        guest.create("c1", &spec).await.unwrap();
        let (mut input, mut out) = (
            guest.stream("c1", "", "stdin").await,
            guest.stream("c1", "", "stdout").await,
        );
        guest.start("c1", "").await.unwrap();
        let (memory, first) = ask(&mut input, &mut out, "before").await;
        guest.freeze().await.unwrap();
        let snapshot = machine.capture();
        guest.thaw().await.unwrap();
        let (_, of_parent) = ask(&mut input, &mut out, "parent").await;

        let mut random = HashSet::from([first, of_parent]);
        let mut ids = HashSet::from([
            guest.configured.machine_id.clone(),
            guest.configured.boot_id.clone(),
            guest.configured.generation.clone(),
        ]);
        for name in ["fork-a", "fork-b"] {
            let (_machine, fork) = machine.restore(&snapshot).await;
            // Nothing runs, and nothing can be started, before it is another.
            let refused = fork.start("c1", "").await.unwrap_err();
            assert_eq!(refused.code(), Code::FAILED_PRECONDITION, "{refused}");
            // The same entropy for both, on purpose: the generation must do.
            let identity = ConfigureSandboxRequest {
                hostname: name.into(),
                entropy: vec![3; 32],
                is_clone: true,
                ..Default::default()
            };
            let configured = fork.adopt(&identity).await.unwrap();
            let (mut input, mut out) = (
                fork.stream("c1", "", "stdin").await,
                fork.stream("c1", "", "stdout").await,
            );
            fork.thaw().await.unwrap();
            let (its_memory, of_fork) = ask(&mut input, &mut out, name).await;
            assert_eq!(its_memory, memory, "the program went on");
            assert!(random.insert(of_fork), "{random:?}");
            for id in [configured.machine_id, configured.boot_id, configured.generation] {
                assert!(ids.insert(id), "{ids:?}");
            }
            assert_eq!(fork.exec("c1", "hostname").await, format!("{name}\n"));
            input.finish().await;
            assert_eq!(fork.wait("c1", "").await.unwrap().exit_status, 0);
        }
        // The parent never noticed.
        ask(&mut input, &mut out, "after").await;
    });
}
