//! The agent, as a library so that it can be tested.
