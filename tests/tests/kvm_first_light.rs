//! The whole system at work: whole groups on real KVM, driven through the agent's doors as users drive them. Needs KVM
//! and what `make build images sdks` makes; what is missing is said, and fails every case. All cases share a registry and
//! an agent, and each is compared before and after: it has to leave the host as it found it.

#![allow(missing_docs, reason = "a test")]

mod cases;

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use tests::stage::Stage;

/// A stage that is set up by the first case that is run, so that listing the cases starts nothing.
type Shared = Arc<Mutex<Option<Stage>>>;

macro_rules! trials {
    ($shared:ident: $($module:ident::{$($case:ident),* $(,)?},)*) => {
        vec![$($(trial(&$shared, concat!(stringify!($module), "::", stringify!($case)), cases::$module::$case)),*),*]
    };
}

fn trial(shared: &Shared, name: &str, case: fn(&mut Stage) -> Result<()>) -> Trial {
    let (shared, title) = (Arc::clone(shared), name.to_owned());
    Trial::test(name, move || {
        let started = Instant::now();
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match &mut *shared {
            Some(stage) => stage.run(case),
            empty => Stage::set_up().and_then(|stage| empty.insert(stage).run(case)),
        };
        eprintln!("{title}: {:.1} s", started.elapsed().as_secs_f64());
        result.map_err(|error| Failed::from(format!("{error:#}")))
    })
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share a host, and are compared before and after.
    arguments.test_threads = Some(1);
    let shared = Shared::default();
    let trials = trials! { shared:
        life::{
            leftovers_of_every_kind_are_seen,
            twenty_runs_leave_nothing_behind,
        },
        lifecycle::{
            init_containers_and_sidecars_take_turns,
            a_restarted_group_begins_anew_in_order,
            a_group_fails_with_its_init_container_and_at_its_deadline,
            probes_decide_whether_a_container_is_ready,
            an_unhealthy_container_is_ended_and_started_again,
            failed_hooks_and_last_lines_are_told,
        },
        refresh::{
            changed_files_come_into_running_containers,
        },
        https::{
            a_server_with_a_certificate_of_its_own_is_probed,
        },
        update::{
            a_running_group_becomes_another_with_least_disruption,
        },
        resize::{
            a_running_group_grows_and_shrinks_and_nothing_of_it_is_restarted,
        },
        exec::{
            a_hundred_thousand_lines_arrive_complete_and_in_order,
            exit_codes_come_back_exactly,
            input_ends_where_the_caller_ends_it,
            what_cannot_be_run_is_named,
        },
        cni::{
            groups_get_their_network_from_plugins,
        },
        ipv6::{
            groups_speak_ipv6_as_they_are_allowed,
        },
        network::{
            groups_are_reached_as_they_are_allowed,
        },
        allowed::{
            what_is_allowed_is_the_guests_and_never_the_hosts,
        },
        processes::{
            containers_share_processes_with_each_other_and_clones_do,
        },
        recovery::{
            a_killed_agent_finds_its_groups_as_they_were,
        },
        refusals::{
            an_unknown_image_is_named,
            content_with_another_digest_is_not_taken,
            an_unreachable_registry_is_named,
            more_than_twenty_containers_are_too_many,
            reserved_ports_are_refused,
            a_container_without_memory_is_refused,
            a_malformed_manifest_is_refused_with_line_and_field,
            a_host_without_usable_kvm_says_so,
            a_full_disk_ends_a_pull_and_nothing_else,
        },
        death::{
            a_container_out_of_memory_dies_alone,
            a_killed_vmm_ends_one_group,
            a_killed_shim_ends_one_group,
        },
        fork::{
            a_fork_of_five_busy_containers_keeps_all_they_have,
            a_snapshot_outlives_its_group_and_is_refused_when_it_was_touched,
            no_two_clones_have_a_secret_in_common,
        },
        full::{
            twenty_containers_and_volumes_bear_each_others_excesses,
        },
        standby::{
            a_group_takes_over_what_stands_by,
        },
        volumes::{
            files_of_a_manifest_arrive_and_secrets_stay_secret,
            volumes_belong_to_the_group_of_the_pod,
            a_link_does_not_lead_out_of_a_volume,
            a_full_volume_is_an_error_of_its_writer,
            a_disk_outlives_its_group_and_grows,
            a_kept_disk_is_listed_deleted_and_never_made_anew,
            a_disk_as_a_device_keeps_what_is_written_to_it,
        },
        nfs::{
            groups_share_a_servers_files_and_bear_its_silence,
        },
        doors::{
            the_official_sdk_drives_a_live_group,
        },
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    let stage = shared.lock().unwrap_or_else(PoisonError::into_inner).take();
    let ended = stage.map_or(Ok(()), Stage::take_down);
    if let Err(error) = &ended {
        eprintln!("the host did not end well: {error:#}");
    }
    if conclusion.has_failed() || ended.is_err() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}
