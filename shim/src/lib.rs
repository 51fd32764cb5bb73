//! The shim, as a library so that it can be tested.
