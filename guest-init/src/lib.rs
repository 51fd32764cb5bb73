//! The guest init, as a library so that it can be tested.
