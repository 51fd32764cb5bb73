//! Task events for containerd, in order, never in the sandbox's way: a bounded queue, and one task that sends. Without
//! containerd (no `TTRPC_ADDRESS`) events go nowhere.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::{
    events::task as api,
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    topics,
};
use protobuf::{MessageField, MessageFull, well_known_types::any::Any};
use tokio::{sync::mpsc, time::timeout};
use ttrpc::context;

use crate::{
    guest::{ProcessEnd, ProcessKey},
    sandbox::spec::ContainerSpec,
    service::convert,
};

/// Environment variable with the address of containerd's ttrpc server.
pub const ADDRESS_ENV: &str = "TTRPC_ADDRESS";
/// Events that wait while containerd is slow or away; later ones are dropped.
const MAX_WAITING_EVENTS: usize = 1024;
/// For one attempt to connect and send.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Attempts for one event.
const MAX_ATTEMPTS: u32 = 5;

/// What happened.
#[derive(Debug, Clone)]
pub enum TaskEvent {
    /// A container was prepared.
    Create {
        /// As asked for.
        spec: ContainerSpec,
        /// As tasks show it.
        pid: u32,
    },
    /// An exec was prepared.
    ExecAdded {
        /// Which.
        key: ProcessKey,
    },
    /// A process runs.
    Start {
        /// Which.
        key: ProcessKey,
        /// As tasks show it.
        pid: u32,
    },
    /// A process has ended.
    Exit {
        /// Which.
        key: ProcessKey,
        /// As tasks show it.
        pid: u32,
        /// How.
        end: ProcessEnd,
    },
    /// A process was removed.
    Delete {
        /// Which.
        key: ProcessKey,
        /// As tasks show it.
        pid: u32,
        /// How it had ended.
        end: ProcessEnd,
    },
    /// The guest's kernel killed a process of the container for memory.
    Oom {
        /// Which container.
        container_id: String,
    },
}

/// Takes events; cheap to clone.
#[derive(Debug, Clone)]
pub struct Publisher {
    queue: Option<mpsc::Sender<(SystemTime, TaskEvent)>>,
}

impl Publisher {
    /// Sends to containerd at `address` (a socket path, or `unix://` and one); nowhere for `None`.
    pub fn new(address: Option<String>, namespace: String) -> Self {
        let queue = address.filter(|address| !address.is_empty()).map(|address| {
            let (queue, waiting) = mpsc::channel(MAX_WAITING_EVENTS);
            let address = if address.starts_with("unix://") {
                address
            } else {
                format!("unix://{address}")
            };
            tokio::spawn(send_all(waiting, address, namespace));
            queue
        });
        Self { queue }
    }

    /// Queues an event.
    pub fn publish(&self, event: TaskEvent) {
        tracing::debug!(?event, "event");
        if let Some(queue) = &self.queue
            && queue.try_send((SystemTime::now(), event)).is_err()
        {
            tracing::warn!("containerd does not take events: one is dropped");
        }
    }
}

async fn send_all(mut waiting: mpsc::Receiver<(SystemTime, TaskEvent)>, address: String, namespace: String) {
    let mut client: Option<EventsClient> = None;
    while let Some((time, event)) = waiting.recv().await {
        let (topic, event) = convert_event(event);
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(convert::timestamp(time)),
                namespace: namespace.clone(),
                topic: topic.into(),
                event: MessageField::some(event),
                ..Default::default()
            }),
            ..Default::default()
        };
        for attempt in 1..=MAX_ATTEMPTS {
            let begun = tokio::time::Instant::now();
            match timeout(SEND_TIMEOUT, send(&mut client, &address, &request)).await {
                Ok(Ok(())) => break,
                failed => {
                    client = None;
                    tracing::warn!(topic, attempt, ?failed, "containerd did not take an event");
                }
            }
            // A restarting containerd refuses at once: spread the attempts.
            tokio::time::sleep_until(begun + SEND_TIMEOUT / (MAX_ATTEMPTS + 1 - attempt)).await;
        }
    }
}

async fn send(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => EventsClient::new(Client::connect(address).await?),
    };
    connected
        .forward(context::with_duration(SEND_TIMEOUT), request)
        .await?;
    *client = Some(connected);
    Ok(())
}

fn convert_event(event: TaskEvent) -> (&'static str, Any) {
    match event {
        TaskEvent::Create { spec, pid } => {
            let io = api::TaskIO {
                stdin: convert::stdin_text(&spec.stdio),
                stdout: convert::sink_text(spec.stdio.stdout.as_ref()),
                stderr: convert::sink_text(spec.stdio.stderr.as_ref()),
                terminal: spec.stdio.terminal,
                ..Default::default()
            };
            let message = api::TaskCreate {
                container_id: spec.id,
                bundle: spec.bundle.to_string_lossy().into_owned(),
                io: MessageField::some(io),
                pid,
                ..Default::default()
            };
            (topics::TASK_CREATE_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::ExecAdded { key } => {
            let message = api::TaskExecAdded {
                container_id: key.container_id,
                exec_id: key.exec_id,
                ..Default::default()
            };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::Start { key, pid } if key.is_init() => {
            let message = api::TaskStart {
                container_id: key.container_id,
                pid,
                ..Default::default()
            };
            (topics::TASK_START_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::Start { key, pid } => {
            let message = api::TaskExecStarted {
                container_id: key.container_id,
                exec_id: key.exec_id,
                pid,
                ..Default::default()
            };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::Exit { key, pid, end } => {
            let message = api::TaskExit {
                // containerd wants the container's id here for its init process.
                id: if key.is_init() {
                    key.container_id.clone()
                } else {
                    key.exec_id
                },
                container_id: key.container_id,
                pid,
                exit_status: end.exit_status,
                exited_at: MessageField::some(convert::timestamp(end.exited_at)),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::Delete { key, pid, end } => {
            let message = api::TaskDelete {
                container_id: key.container_id,
                id: key.exec_id,
                pid,
                exit_status: end.exit_status,
                exited_at: MessageField::some(convert::timestamp(end.exited_at)),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, pack(&message))
        }
        TaskEvent::Oom { container_id } => {
            let message = api::TaskOOM {
                container_id,
                ..Default::default()
            };
            (topics::TASK_OOM_EVENT_TOPIC, pack(&message))
        }
    }
}

fn pack<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message
            .write_to_bytes()
            .expect("messages without required fields can be written"),
        ..Default::default()
    }
}
