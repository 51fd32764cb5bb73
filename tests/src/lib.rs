//! Whole-system tests live in this crate.
