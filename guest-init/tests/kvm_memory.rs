//! Memory goes back to the host when a guest has used it, and comes and goes by order: with the guest's own kernel, in a
//! virtual machine. Needs KVM and `make build`; what is missing is said.

#![allow(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "shared with tests that need more of it")]
mod framework;
mod machine;

use std::time::{Duration, Instant};

use framework::{Guest, Stream, run_case, spec};
use machine::{Machine, Size};
use serde_json::{Value, json};
use vmm::control::{Command, Event};

const MIB: u64 = 1 << 20;
/// Nothing here takes longer, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(180);

/// A container that fills `mib` of memory, waits for a line of input, frees it all, and then tells the guest's uptime ten
/// times a second.
fn burst(mib: u64) -> Value {
    let script = format!(
        "dd if=/dev/zero of=/burst/file bs=1M count={mib} 2>/dev/null; echo filled; read -r line; rm /burst/file
        echo \"freed $(cut -d' ' -f1 /proc/uptime)\"
        while sleep 0.1; do echo \"up $(cut -d' ' -f1 /proc/uptime)\"; done"
    );
    let mut spec = spec(&["sh", "-c", &script]);
    let options = ["medium=memory".to_owned(), format!("size={}", (mib + 1) * MIB)];
    spec["mounts"] =
        json!([{"destination": "/burst", "type": "emptydir", "source": "burst", "options": options}]);
    spec
}

/// Starts [`burst`] and waits until it has filled memory.
async fn fill(guest: &Guest, mib: u64) -> (Stream, Stream) {
    guest.create_status("c1", &burst(mib)).await.unwrap();
    let input = guest.stream("c1", "", "stdin").await;
    let mut output = guest.stream("c1", "", "stdout").await;
    guest.start("c1", "").await.unwrap();
    output.expect("filled\n").await;
    (input, output)
}

/// The next line that begins with `word`, and the seconds on it.
async fn next_time(output: &mut Stream, word: &str) -> f64 {
    loop {
        let line = output.line().await;
        if let Some(time) = line.strip_prefix(word) {
            return time.trim().parse().unwrap();
        }
    }
}

/// Looks again and again until `reached`, while the guest goes on.
async fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < PATIENCE, "{what} in {PATIENCE:?}");
        // The guest's streams are served by this thread too.
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_burst_is_back_on_the_host_within_five_seconds() {
    let size = Size {
        memory_mib: 1536,
        hotplug_mib: 0,
    };
    machine::run_sized(size, async |machine, guest| {
        run_case(guest, async |guest| {
            let before = machine.host_memory_bytes();
            let (mut input, mut output) = fill(guest, 1024).await;
            let full = machine.host_memory_bytes();
            assert!(full - before > 1000 * MIB, "{} MiB of 1024 were used", (full - before) / MIB);
            input.send(b"\n").await;
            let freed = next_time(&mut output, "freed ").await;
            // The guest serves all the while: each line is an answer of its container, and must come soon after the last.
            let (mut last, mut longest_gap) = (freed, 0.0_f64);
            let goal = full - 1024 * MIB * 95 / 100;
            let held = loop {
                let now = next_time(&mut output, "up ").await;
                longest_gap = longest_gap.max(now - last);
                last = now;
                let held = machine.host_memory_bytes();
                if held <= goal || now - freed > 5.0 {
                    break held;
                }
            };
            let back = 100 * (full - held) / (1024 * MIB);
            eprintln!(
                "{} MiB before, {} full, {} after {:.1} s of guest time ({back} % back); longest silence {longest_gap:.1} s; \
                 {} MiB reported",
                before / MIB, full / MIB, held / MIB, last - freed, machine.counter("balloon_reported_bytes") / MIB
            );
            assert!(held <= goal, "{back} % are back after {:.1} s", last - freed);
            assert!(longest_gap < 2.0, "the guest was silent for {longest_gap:.1} s");
        })
        .await;
        no_complaint(machine);
    });
}

#[test]
fn a_guest_grows_and_shrinks() {
    let size = Size {
        memory_mib: 256,
        hotplug_mib: 1024,
    };
    machine::run_sized(size, async |machine, guest| {
        let resize = |plugged_mib| machine.order(|id| Command::ResizeMemory { id, plugged_mib });
        let plugged = || machine.counter("mem_plugged_bytes");
        let before = machine.host_memory_bytes();
        assert!(matches!(resize(768), Event::Done { .. }));
        wait_until("768 MiB are plugged", || plugged() == 768 * MIB).await;
        run_case(guest, async |guest| {
            let total = total_mib(guest).await;
            assert!(total > 900, "the guest sees {total} MiB");
            // More than it had before.
            let (mut input, mut output) = fill(guest, 600).await;
            let full = machine.host_memory_bytes();
            assert!(
                full - before > 590 * MIB,
                "{} MiB of 600 were used",
                (full - before) / MIB
            );
            input.send(b"\n").await;
            next_time(&mut output, "freed ").await;
            assert!(matches!(resize(0), Event::Done { .. }));
            wait_until("all is unplugged", || plugged() == 0).await;
            next_time(&mut output, "up ").await;
        })
        .await;
        let total = total_mib(guest).await;
        assert!(total < 256, "the guest sees {total} MiB");
        let after = machine.host_memory_bytes();
        eprintln!(
            "{} MiB before, {} after growing and shrinking",
            before / MIB,
            after / MIB
        );
        assert!(after <= 256 * MIB, "{} MiB are held", after / MIB);
        // What it cannot have is refused, and it goes on.
        for wrong in [1025, 1152, 3, u64::MAX] {
            assert!(matches!(resize(wrong), Event::Failed { .. }), "{wrong}");
        }
        assert!(matches!(resize(128), Event::Done { .. }));
        wait_until("128 MiB are plugged", || plugged() == 128 * MIB).await;
        no_complaint(machine);
    });
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back() {
    let size = Size {
        memory_mib: 512,
        hotplug_mib: 0,
    };
    machine::run_sized(size, async |machine, guest| {
        let set = |target_mib| machine.order(|id| Command::SetBalloon { id, target_mib });
        let actual = || machine.counter("balloon_actual_bytes");
        assert!(matches!(set(200), Event::Done { .. }));
        wait_until("200 MiB are given up", || actual() == 200 * MIB).await;
        let available = available_mib(guest).await;
        assert!(available < 312, "{available} MiB are available");
        // A container that needs more gets it out of the balloon, and nothing is killed.
        run_case(guest, async |guest| {
            fill(guest, 350).await;
        })
        .await;
        assert_eq!(guest.last_event().await, 0);
        assert!(matches!(set(0), Event::Done { .. }));
        wait_until("all is back", || actual() == 0).await;
        assert!(matches!(set(500), Event::Failed { .. }));
        wait_until("statistics arrive", || {
            machine.counter("balloon_guest_total_bytes") > 400 * MIB
        })
        .await;
        no_complaint(machine);
    });
}

/// The devices saw nothing wrong with what a sane driver does.
fn no_complaint(machine: &Machine) {
    for name in [
        "balloon_bad_requests",
        "balloon_bad_ranges",
        "balloon_discard_failures",
        "virtio_protocol_errors",
        "virtio_activation_failures",
    ] {
        assert_eq!(machine.counter(name), 0, "{name}");
    }
}

async fn total_mib(guest: &Guest) -> u64 {
    meminfo_mib(guest, "MemTotal").await
}

async fn available_mib(guest: &Guest) -> u64 {
    meminfo_mib(guest, "MemAvailable").await
}

async fn meminfo_mib(guest: &Guest, name: &str) -> u64 {
    let script = format!("awk '/^{name}:/ {{print int($2/1024)}}' /proc/meminfo");
    let (status, out, err) = guest.run_to_end("c2", &spec(&["sh", "-c", &script])).await;
    assert_eq!(status, 0, "{err}");
    out.trim().parse().unwrap()
}
