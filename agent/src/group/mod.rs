//! The container group: what is wanted ([`spec`]) and what is seen ([`status`]). Kubernetes Pods ([`pod`]) and ECI
//! requests ([`eci`]) both become a [`spec::GroupSpec`], checked once ([`validate`]).
//!
//! One task, the [`driver`], owns one group. It asks the pure [`plan`] what to do next and carries it out.

pub mod backoff;
pub mod conditions;
mod devices;
pub mod disk;
pub mod driver;
pub mod eci;
pub mod events;
pub mod files;
pub mod host_path;
pub mod images;
mod jobs;
pub mod lifecycle;
pub mod network;
pub mod nfs;
pub mod plan;
pub mod pod;
pub mod quantity;
pub mod resize;
pub mod rules;
pub mod size;
pub mod spec;
pub mod status;
pub(crate) mod sysctls;
pub mod update;
pub mod validate;
pub(crate) mod view;
pub mod violation;
