//! Whole-system tests: a real agent, its shims, VMMs and guests, a real registry, and what the cases in `tests/kvm_*.rs`
//! need to speak of them. Blocking code on the thread of its caller; nothing here links the product.

#![forbid(unsafe_code)]

pub mod host;
pub mod leftovers;
pub mod nfs;
pub mod pod;
pub mod process;
pub mod product;
pub mod registry;
pub mod stage;
