//! System calls that no library offers in a safe form. The only place in this crate where `unsafe` may live.
#![allow(unsafe_code)]

pub(crate) mod netns;
pub(crate) mod tap;
