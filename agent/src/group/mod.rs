//! The container group: what is wanted ([`spec`]) and what is seen ([`status`]). Kubernetes Pods and ECI requests both
//! become a [`spec::GroupSpec`].

pub mod spec;
pub mod status;
