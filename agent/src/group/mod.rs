//! The container group: what is wanted ([`spec`]) and what is seen ([`status`]). Kubernetes Pods ([`pod`]) and ECI
//! requests ([`eci`]) both become a [`spec::GroupSpec`], checked once ([`validate`]).

pub mod eci;
pub mod pod;
pub mod quantity;
pub mod size;
pub mod spec;
pub mod status;
pub mod validate;
pub mod violation;
