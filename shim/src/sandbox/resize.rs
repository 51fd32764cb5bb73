//! A running sandbox that becomes larger or smaller.
//!
//! vCPUs are made in the VM and brought online by the guest; those that are too many the guest takes offline, and they sleep in
//! the VM. Memory beyond what the guest began with is plugged. A sandbox that is to have less than that keeps its memory, and
//! all its containers together are limited.
//!
//! The guest may be hostile, or unable: each wait ends with the deadline, and what the VM has by then is looked up, not assumed.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    driver::{Driver, Reply, complete},
    snapshot::Shape,
};
use crate::{
    error::{Error, ErrorKind, Result},
    guest::Guest,
    vmm::VmmClient,
};

/// Between two looks at how far the guest is.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// The kernel of a guest can use memory in whole pieces of this only (its page blocks, two of them).
const PLUG_STEP_MIB: u64 = 4;

/// What a sandbox is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// vCPUs.
    pub n_vcpus: u32,
    /// Memory in all.
    pub memory_mib: u64,
    /// What its containers may use together.
    pub containers_memory_bytes: u64,
    /// How long the guest may take.
    pub deadline: Duration,
}

/// How a sandbox comes to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    plugged_mib: u64,
    /// What stays a limit of all containers together.
    limit_bytes: Option<u64>,
}

/// What a target means for a sandbox of this shape.
fn way(shape: &Shape, target: &Target) -> Result<Way> {
    let invalid = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
    if !(1..=shape.n_possible_vcpus).contains(&target.n_vcpus) {
        return invalid(format!(
            "n_vcpus is {}: this sandbox can have 1 to {}",
            target.n_vcpus, shape.n_possible_vcpus
        ));
    }
    let most = shape.memory_mib + shape.hotplug_mib;
    if target.memory_mib > most {
        return invalid(format!(
            "memory_mib is {}: this sandbox can have up to {most}",
            target.memory_mib
        ));
    }
    let limits = target.memory_mib < shape.memory_mib;
    if limits && target.containers_memory_bytes == 0 {
        return invalid(format!(
            "containers_memory_bytes is 0: a sandbox that began with {} MiB can have {} only as a limit",
            shape.memory_mib, target.memory_mib
        ));
    }
    let plugged_mib = target
        .memory_mib
        .saturating_sub(shape.memory_mib)
        .next_multiple_of(PLUG_STEP_MIB);
    Ok(Way {
        plugged_mib: plugged_mib.min(shape.hotplug_mib),
        limit_bytes: limits.then_some(target.containers_memory_bytes),
    })
}

impl Driver {
    /// Begins to resize the sandbox.
    pub(super) fn resize(&mut self, target: Target, reply: Reply<()>) {
        let begun = self.open_vm().and_then(|open| {
            if self.is_resizing {
                let text = "the sandbox is being resized";
                return Err(Error::new(ErrorKind::Unavailable, text));
            }
            let shape = self.ready_vm()?.shape.clone();
            Ok((open, way(&shape, &target)?, shape))
        });
        let ((guest, vmm), way, shape) = match begun {
            Ok(begun) => begun,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.is_resizing = true;
        self.begin(async move {
            let result = resize(&target, way, &guest, &vmm).await;
            let now = look(shape, &target, way, &vmm, result.is_ok()).await;
            complete(move |driver: &mut Self| {
                driver.is_resizing = false;
                if let (Some(vm), Some(shape)) = (&mut driver.vm, now) {
                    tracing::info!(?shape, is_done = result.is_ok(), "sandbox resized");
                    vm.shape = shape.clone();
                    driver.status.send_modify(|status| status.shape = Some(shape));
                }
                drop(reply.send(result.map_err(|error| error.context("resize the sandbox"))));
            })
        });
    }

    /// Begins to give a container other limits.
    pub(super) fn update_container(&mut self, id: String, resources: Vec<u8>, reply: Reply<()>) {
        let begun = self.open_vm().and_then(|(guest, _)| {
            if self.containers.contains_key(&id) {
                return Ok(guest);
            }
            Err(Error::new(ErrorKind::NotFound, format!("no container {id:?}")))
        });
        let guest = match begun {
            Ok(guest) => guest,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.begin(async move {
            let updated = guest.update_container(&id, resources).await;
            complete(move |_| drop(reply.send(updated)))
        });
    }
}

/// The shape of a sandbox after an attempt to resize it; `None` when its VM does not tell any more.
async fn look(shape: Shape, target: &Target, way: Way, vmm: &VmmClient, is_done: bool) -> Option<Shape> {
    let counters = vmm.counters().await.ok()?;
    let of = |name: &str| counters.get(name).copied().unwrap_or(0);
    let found = Shape {
        n_vcpus: u32::try_from(of("vcpus")).unwrap_or(shape.n_vcpus),
        plugged_mib: of("mem_plugged_bytes") >> 20,
        ..shape
    };
    Some(if is_done {
        Shape {
            n_online: target.n_vcpus,
            size_mib: target.memory_mib,
            containers_memory_bytes: way.limit_bytes.unwrap_or(0),
            ..found
        }
    } else {
        found
    })
}

async fn resize(target: &Target, way: Way, guest: &Guest, vmm: &VmmClient) -> Result<()> {
    let deadline = Instant::now() + target.deadline;
    let total_before = guest.sandbox_stats().await?.memory_total_bytes;
    let plugged_before = plugged_mib(vmm).await?;
    vmm.add_vcpus(target.n_vcpus).await?;
    if way.plugged_mib < plugged_before {
        // What can't be done is found out before anything is taken away, and nobody needs more while it is.
        guest
            .resize(target.n_vcpus, Some(target.containers_memory_bytes))
            .await?;
    }
    if way.plugged_mib != plugged_before {
        vmm.resize_memory(way.plugged_mib).await?;
        loop {
            let plugged = plugged_mib(vmm).await?;
            if plugged == way.plugged_mib {
                break;
            }
            let what = format!("the guest has {plugged} MiB plugged of {}", way.plugged_mib);
            wait_a_little(deadline, target, &what).await?;
        }
    }
    let mut resized = guest.resize(target.n_vcpus, way.limit_bytes).await?;
    // The guest was given the memory, and may be about to make use of it.
    let grown_mib = way.plugged_mib.saturating_sub(plugged_before);
    while grown_mib != 0 && resized.memory_total_bytes < total_before.saturating_add(grown_mib << 20) {
        let what = format!("the guest sees {} bytes of memory", resized.memory_total_bytes);
        wait_a_little(deadline, target, &what).await?;
        resized = guest.resize(target.n_vcpus, way.limit_bytes).await?;
    }
    Ok(())
}

async fn plugged_mib(vmm: &VmmClient) -> Result<u64> {
    let counters = vmm.counters().await?;
    Ok(counters.get("mem_plugged_bytes").copied().unwrap_or(0) >> 20)
}

async fn wait_a_little(deadline: Instant, target: &Target, what: &str) -> Result<()> {
    if Instant::now() >= deadline {
        let seconds = target.deadline.as_secs_f64();
        return Err(Error::new(
            ErrorKind::DeadlineExceeded,
            format!("{what} after {seconds} s"),
        ));
    }
    sleep(LOOK_INTERVAL).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        n_vcpus: 1,
        n_online: 1,
        n_possible_vcpus: 2,
        memory_mib: 576,
        hotplug_mib: 1024,
        plugged_mib: 0,
        size_mib: 576,
        containers_memory_bytes: 0,
        has_interface: true,
    };

    fn to(n_vcpus: u32, memory_mib: u64, containers_memory_bytes: u64) -> Result<Way> {
        let target = Target {
            n_vcpus,
            memory_mib,
            containers_memory_bytes,
            deadline: Duration::from_secs(1),
        };
        way(&SHAPE, &target)
    }

    #[test]
    fn memory_is_plugged_above_what_the_guest_began_with_and_limited_below() {
        let plugged = |plugged_mib| Way {
            plugged_mib,
            limit_bytes: None,
        };
        assert_eq!(to(1, 576, 512 << 20).unwrap(), plugged(0));
        assert_eq!(to(2, 1088, 1024 << 20).unwrap(), plugged(512));
        assert_eq!(to(2, 1089, 1025 << 20).unwrap(), plugged(516));
        assert_eq!(to(2, 1600, 1).unwrap(), plugged(1024));
        let limited = Way {
            plugged_mib: 0,
            limit_bytes: Some(256 << 20),
        };
        assert_eq!(to(1, 320, 256 << 20).unwrap(), limited);
    }

    #[test]
    fn what_a_sandbox_cannot_have_is_refused_by_field() {
        for (target, field) in [
            (to(0, 576, 1), "n_vcpus is 0"),
            (to(3, 576, 1), "1 to 2"),
            (to(1, 1601, 1), "up to 1600"),
            (to(1, 575, 0), "containers_memory_bytes"),
        ] {
            let error = target.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.chain().contains(field), "{}", error.chain());
        }
    }
}
