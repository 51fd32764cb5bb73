//! Flow control of one connection (virtio 1.2, 5.10.6.3). Counts wrap at 2^32. No I/O.

use super::BUFFER_BYTES;

/// The host's bytes that wait here make an update due at this many.
const UPDATE_BYTES: u32 = BUFFER_BYTES / 4;

/// What each side may still send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Credit {
    /// Came from the guest, in all.
    received: u32,
    /// Of that, went on to the host.
    forwarded: u32,
    /// The last `forwarded` that the guest was told.
    announced: u32,
    /// Went to the guest, in all.
    sent: u32,
    /// The guest's buffer.
    peer_alloc: u32,
    /// What the guest says it took from its buffer.
    peer_forwarded: u32,
}

impl Credit {
    /// Nothing sent, and nothing known of the guest's buffer.
    pub(super) fn new() -> Self {
        Credit {
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
        }
    }

    /// Takes in what a packet of the guest says about its buffer.
    pub(super) fn peer_says(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        self.peer_forwarded = fwd_cnt;
    }

    /// Bytes the guest takes now.
    pub(super) fn available(&self) -> u32 {
        // A guest that claims to have taken more than it was sent has no room.
        self.peer_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Data went to the guest.
    pub(super) fn sent(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    /// Data came from the guest; `false` when it had no credit for so much.
    pub(super) fn receive(&mut self, n: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = held.checked_add(n).is_some_and(|held| held <= BUFFER_BYTES);
        if fits {
            self.received = self.received.wrapping_add(n);
        }
        fits
    }

    /// Data of the guest went on to the host.
    pub(super) fn forward(&mut self, n: u32) {
        self.forwarded = self.forwarded.wrapping_add(n);
    }

    /// The guest should hear of the room made.
    pub(super) fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= UPDATE_BYTES
    }

    /// `fwd_cnt` for a packet that goes to the guest now.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A guest that keeps to what it was told is never refused and never stuck, also across 2^32.
        #[test]
        fn obedient_guest_is_never_refused_nor_stuck(
            start: u32,
            steps in proptest::collection::vec((1_u32..100_000, 0_u32..100_000), 1..200),
        ) {
            let mut credit = Credit { received: start, forwarded: start, announced: start, ..Credit::new() };
            let (mut told, mut sent) = (start, start);
            for (wanted, host_takes) in steps {
                let room = BUFFER_BYTES - sent.wrapping_sub(told);
                let n = wanted.min(room);
                prop_assert!(credit.receive(n));
                sent = sent.wrapping_add(n);
                let held = credit.received.wrapping_sub(credit.forwarded);
                prop_assert!(held <= BUFFER_BYTES);
                credit.forward(host_takes.min(held));
                if credit.update_due() {
                    told = credit.announce();
                }
                if credit.received == credit.forwarded {
                    prop_assert!(sent.wrapping_sub(told) < BUFFER_BYTES, "all taken and yet no room announced");
                }
            }
            let too_much = BUFFER_BYTES - credit.received.wrapping_sub(credit.forwarded) + 1;
            prop_assert!(!credit.receive(too_much));
        }

        /// Whatever the guest claims, it is sent no more than its buffer.
        #[test]
        fn available_is_bounded(alloc: u32, forwarded: u32, sent: u32) {
            let mut credit = Credit::new();
            credit.sent(sent);
            credit.peer_says(alloc, forwarded);
            let available = credit.available();
            prop_assert!(available <= alloc);
            credit.sent(available);
            if available != 0 {
                prop_assert_eq!(credit.available(), 0);
            }
        }
    }
}
