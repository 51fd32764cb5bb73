//! The only callers of KVM ioctls.
#![allow(unsafe_code)]

mod state;
mod vcpu;
mod vm;

pub use state::{Tsc, VcpuState, VmState};
pub use vcpu::{ImmediateExit, Vcpu};
pub use vm::{Host, Vm};

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("KVM failed to {operation}")]
pub struct KvmError {
    /// What was asked, as verb and object.
    pub operation: String,
    /// The cause.
    #[source]
    pub source: std::io::Error,
}

/// For `map_err`: names what was asked.
fn failed(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    let operation = operation.into();
    move |errno| KvmError {
        operation,
        source: errno.into(),
    }
}
