//! The guest API (`protos/guest.proto`) and the sandbox options (`protos/sandbox.proto`), generated, and the vsock
//! ports and names both ends agree on. Nothing else belongs here.

/// Messages of the guest API.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
pub mod guest {
    include!(concat!(env!("OUT_DIR"), "/guest.rs"));
}

/// Client and server of the guest API.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
pub mod guest_ttrpc {
    use super::guest;
    include!(concat!(env!("OUT_DIR"), "/guest_ttrpc.rs"));
}

/// Messages the agent adds to containerd's Sandbox API.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, clippy::nursery)]
pub mod sandbox {
    include!(concat!(env!("OUT_DIR"), "/sandbox.rs"));
}

/// Guest vsock port of the guest API.
pub const GUEST_API_PORT: u32 = 1024;
/// Guest vsock port of the stdio streams.
pub const STDIO_PORT: u32 = 1025;
/// Host vsock port the guest init connects to once it serves the guest API.
pub const READY_PORT: u32 = 1024;
/// Longest first line of a stdio connection, newline included.
pub const STDIO_HEADER_MAX_BYTES: usize = 512;
/// What the guest init answers to that line once the stream is attached.
pub const STDIO_ACK: u8 = 0x06;
/// `type_url` of a [`guest::SandboxStatsResponse`] in `SandboxMetricsResponse.metrics.data`.
pub const SANDBOX_STATS_TYPE_URL: &str = "eci.guest.v1.SandboxStatsResponse";
/// `type_url` of a [`sandbox::SandboxOptions`] in `CreateSandboxRequest.options`.
pub const SANDBOX_OPTIONS_TYPE_URL: &str = "eci.sandbox.v1.SandboxOptions";
/// `type_url` of a [`guest::ContainerLifecycle`] in `CreateTaskRequest.options`.
pub const CONTAINER_LIFECYCLE_TYPE_URL: &str = "eci.guest.v1.ContainerLifecycle";
/// Longest message a container leaves at its end, bytes.
pub const TERMINATION_MESSAGE_MAX_BYTES: usize = 4096;
/// Longest message of an event, bytes.
pub const EVENT_MESSAGE_MAX_BYTES: usize = 1024;
/// Mount type of an image slice in `CreateTaskRequest.rootfs`.
pub const ROOTFS_MOUNT_TYPE: &str = "erofs";
/// Mount type of a shared volume in an OCI spec handed to the guest.
pub const EMPTYDIR_MOUNT_TYPE: &str = "emptydir";
/// Mount type of a volume of files in an OCI spec handed to the guest.
pub const FILES_MOUNT_TYPE: &str = "files";
/// Mount type of a volume that has a slice of its own, in an OCI spec handed to the guest.
pub const VOLUME_MOUNT_TYPE: &str = "volume";
/// Mount type of a volume that has a slice of its own and is a device, in an OCI spec handed to the guest.
pub const DEVICE_MOUNT_TYPE: &str = "device";
/// Mount type of a volume on an NFS server, in an OCI spec handed to the guest.
pub const NFS_MOUNT_TYPE: &str = "nfs";
/// Mount type of a path of the guest's own.
pub const HOST_PATH_MOUNT_TYPE: &str = "hostpath";
/// `type_url` of a [`sandbox::AttachVolume`] in `UpdateTaskRequest.resources`.
pub const ATTACH_VOLUME_TYPE_URL: &str = "eci.sandbox.v1.AttachVolume";
/// Most volumes of a sandbox that have slices of their own, and most on NFS servers.
pub const MAX_ATTACHED_VOLUMES: usize = 20;
/// `type_url` of a [`guest::PutFilesRequest`] in `UpdateTaskRequest.resources`.
pub const PUT_FILES_TYPE_URL: &str = "eci.guest.v1.PutFilesRequest";
/// `type_url` of a [`sandbox::ResizeSandbox`] in `UpdateTaskRequest.resources`.
pub const RESIZE_SANDBOX_TYPE_URL: &str = "eci.sandbox.v1.ResizeSandbox";
/// `type_url` of OCI `LinuxResources` as JSON in `UpdateTaskRequest.resources`, as containerd packs them.
pub const LINUX_RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// Longest time that a guest is given for a [`sandbox::ResizeSandbox`], milliseconds.
pub const RESIZE_MAX_DEADLINE_MS: u64 = 600_000;
/// Scheme of a stdio URI that makes the shim write CRI log lines itself.
pub const CRI_LOG_SCHEME: &str = "cri://";
/// Files in an image slice begin at multiples of this.
pub const SLICE_ALIGN_BYTES: u64 = 4096;
