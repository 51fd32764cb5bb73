//! Guest RAM. The only maker of host addresses of guest memory.

use vm_memory::GuestMemoryMmap;

/// All RAM of the guest. Cloning is cheap: the regions are shared.
pub type GuestMemory = GuestMemoryMmap;
