//! What readers may see of a sandbox, without asking its driver.

use std::time::SystemTime;

use super::{snapshot::Shape, state::SandboxState};
use crate::guest::ProcessEnd;

/// Exit status of what died with its VM.
pub const KILLED_EXIT_STATUS: u32 = 137;

/// A sandbox, seen from outside.
#[derive(Debug, Clone)]
pub struct SandboxStatus {
    /// Its state.
    pub state: SandboxState,
    /// When the shim began.
    pub created_at: SystemTime,
    /// The VMM's process, while there is one.
    pub vmm_pid: Option<u32>,
    /// Microseconds from guest kernel start to init ready.
    pub guest_ready_us: Option<u64>,
    /// Microseconds the start took, seen from here.
    pub start_us: Option<u64>,
    /// The phases of the start, as [`crate::phases::Phases::text`] has them.
    pub start_phases_us: Option<String>,
    /// How the guest came about: `boot`, `template` or `snapshot`.
    pub start_kind: Option<&'static str>,
    /// Why the template that was given was not used.
    pub template_refused: Option<String>,
    /// Microseconds that its containers stood still for the last snapshot.
    pub pause_us: Option<u64>,
    /// What it has, once it has started.
    pub shape: Option<Shape>,
    /// Its end.
    pub exit: Option<SandboxExit>,
    /// The shim is to end.
    pub shutdown: bool,
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxExit {
    /// Stable name of the reason.
    pub reason: &'static str,
    /// What is known beyond it.
    pub message: String,
    /// When.
    pub exited_at: SystemTime,
    /// 0 after an orderly stop.
    pub exit_status: u32,
}

/// A process, seen from outside.
#[derive(Debug, Clone)]
pub struct ProcessStatus {
    /// Its container's bundle.
    pub bundle: String,
    /// Created, running or ended.
    pub phase: ProcessPhase,
    /// The stdio strings of the request: stdin, stdout, stderr.
    pub stdio: crate::stdio::StdioSpec,
    /// The VMM's process id.
    pub pid: u32,
}

/// Coarse state of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessPhase {
    /// Not started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Ended(ProcessEnd),
}
