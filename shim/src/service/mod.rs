//! The ttrpc services: requests in, calls of the sandbox out. No state of their own.

pub mod convert;
mod lifecycle;
mod sandbox;
pub mod status;
mod task;

use std::{collections::HashMap, sync::Arc};

use containerd_shim_protos::{sandbox_async, shim_async};
use protocol::guest_ttrpc;
use ttrpc::r#async::Service;

use crate::sandbox::SandboxHandle;

/// containerd 2's name of the Task service.
const TASK_V3: &str = "containerd.task.v3.Task";
/// containerd 1.7's name. Its messages are the same on the wire.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Every service of the shim for the sandbox `id`.
pub fn services(id: &str, handle: &SandboxHandle) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in [TASK_V2, TASK_V3] {
        let task = shim_async::create_task(Arc::new(task::TaskService::new(id.to_owned(), handle.clone())));
        services.extend(task.into_values().map(|service| (name.to_owned(), service)));
    }
    let sandbox = sandbox::SandboxService::new(id.to_owned(), handle.clone());
    services.extend(sandbox_async::create_sandbox(Arc::new(sandbox)));
    let lifecycle = lifecycle::LifecycleService::new(handle.clone());
    services.extend(guest_ttrpc::create_lifecycle(Arc::new(lifecycle)));
    services
}
