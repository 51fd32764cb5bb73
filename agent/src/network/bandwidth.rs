//! Limits of a group's bandwidth, on its tap.
//!
//! | traffic | held back by | what exceeds the limit |
//! |---|---|---|
//! | to the guest (ingress) | a token bucket, `tbf`, as the tap's queue | waits, up to [`QUEUE_MS`], then is dropped |
//! | from the guest (egress) | a policer where packets arrive, `matchall` with `police` | is dropped |
//!
//! What leaves the tap towards the guest waits in a queue of the host anyway, so there shaping costs nothing. What comes from the
//! guest is in no queue: shaping it would take a second device for each group (`ifb`) with a redirection to it, made, found
//! again and removed with the tap, and would hold the guest's packets in host memory. A policer is one filter, goes with
//! its tap, and TCP finds the rate by what is lost; its bucket is larger ([`POLICE_BURST_MS`]), so that segments of 64 KiB,
//! which a guest hands over whole, fit in. nftables could police too, but would need a chain for each group.
//!
//! Both are kept with the tap by the kernel, so they outlive the agent; they are made whenever a tap is given to a group,
//! and made sure of when an agent starts. Sizes of structures are those of linux/pkt_sched.h and linux/pkt_cls.h.

use rtnetlink::{
    packet_core::DefaultNla,
    packet_route::tc::{
        TcAction, TcActionAttribute, TcActionOption, TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption,
        TcHandle, TcHeader, TcMessage, TcOption,
    },
};

/// Most time that packets to a guest wait, milliseconds.
const QUEUE_MS: u64 = 100;
/// What a guest may be sent at once, as time at its rate, milliseconds.
const SHAPE_BURST_MS: u64 = 10;
/// What a guest may send at once, as time at its rate, milliseconds.
const POLICE_BURST_MS: u64 = 100;
/// Least bursts: some frames of the largest MTU; two segments of the largest size.
const LEAST_SHAPE_BURST: u64 = 20 << 10;
const LEAST_POLICE_BURST: u64 = 128 << 10;

/// linux/pkt_sched.h
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// Nanoseconds in a tick of the packet scheduler, as a shift (net/pkt_sched.h, `PSCHED_SHIFT`).
const TICK_SHIFT: u32 = 6;
/// linux/pkt_cls.h
const TCA_POLICE_TBF: u16 = 1;
const TCA_POLICE_RATE: u16 = 2;
const TCA_POLICE_RATE64: u16 = 8;
const TC_ACT_SHOT: i32 = 2;
/// linux/pkt_sched.h, `TC_RTAB_SIZE`: a table that the kernel asks for and does not use any more.
const RATE_TABLE_BYTES: usize = 1024;
/// Any that is not zero: it belongs to that table.
const CELL_LOG: u8 = 3;
/// linux/if_ether.h, in network byte order.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();

/// Limits of a group, bits a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// To the group.
    pub ingress_bits: Option<u64>,
    /// From it.
    pub egress_bits: Option<u64>,
}

/// Whole bytes a second within so many bits.
fn bytes(bits: u64) -> u64 {
    (bits / 8).max(1)
}

fn in_time(bytes_per_second: u64, ms: u64) -> u64 {
    u64::try_from(u128::from(bytes_per_second) * u128::from(ms) / 1000).unwrap_or(u64::MAX)
}

/// What fits into the kernel's field.
fn clamp(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// `struct tc_ratespec`
fn rate_spec(rate: u64, cell_log: u8) -> [u8; 12] {
    let mut spec = [0; 12];
    spec[0] = cell_log;
    spec[1] = TC_LINKLAYER_ETHERNET;
    spec[8..].copy_from_slice(&clamp(rate).to_ne_bytes());
    spec
}

/// `struct tc_tbf_qopt`: rate, peak rate, limit, buffer, MTU. The buffer is given in bytes beside it.
fn tbf_parameters(rate: u64, limit: u32) -> Vec<u8> {
    let mut parameters = rate_spec(rate, 0).to_vec();
    parameters.extend([0; 12]);
    parameters.extend(limit.to_ne_bytes());
    parameters.extend([0; 8]);
    parameters
}

/// `struct tc_police`: index, action, limit, burst in ticks, MTU, rate, peak rate, two counts, capabilities.
fn police_parameters(rate: u64, burst: u64) -> Vec<u8> {
    let ns = u128::from(burst) * 1_000_000_000 / u128::from(rate);
    let ticks = u32::try_from(ns >> TICK_SHIFT).unwrap_or(u32::MAX);
    let mut parameters = Vec::new();
    for field in [0, TC_ACT_SHOT.cast_unsigned(), 0, ticks, u32::MAX] {
        parameters.extend(field.to_ne_bytes());
    }
    parameters.extend(rate_spec(rate, CELL_LOG));
    parameters.extend([0; 12 + 4 + 4 + 4]);
    parameters
}

fn message(
    index: u32,
    handle: TcHandle,
    parent: TcHandle,
    info: u32,
    attributes: Vec<TcAttribute>,
) -> TcMessage {
    let header = TcHeader {
        index: index.cast_signed(),
        handle,
        parent,
        info,
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, attributes)
}

/// The queue of a tap that shapes what goes to the guest.
pub(super) fn shaper(index: u32, bits: u64) -> TcMessage {
    let rate = bytes(bits);
    let burst = clamp(in_time(rate, SHAPE_BURST_MS).max(LEAST_SHAPE_BURST));
    let limit = clamp(in_time(rate, QUEUE_MS).max(u64::from(burst) * 4));
    let option = |kind, value: Vec<u8>| TcOption::Other(DefaultNla::new(kind, value));
    let options = vec![
        option(TCA_TBF_PARMS, tbf_parameters(rate, limit)),
        option(TCA_TBF_RATE64, rate.to_ne_bytes().to_vec()),
        option(TCA_TBF_BURST, burst.to_ne_bytes().to_vec()),
    ];
    let attributes = vec![TcAttribute::Kind("tbf".to_owned()), TcAttribute::Options(options)];
    message(index, TcHandle::UNSPEC, TcHandle::ROOT, 0, attributes)
}

/// The place for filters on what a tap gets from the guest.
pub(super) fn ingress(index: u32) -> TcMessage {
    let handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    let attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    message(index, handle, TcHandle::INGRESS, 0, attributes)
}

/// The filter there that drops what is beyond the limit.
pub(super) fn policer(index: u32, bits: u64) -> TcMessage {
    let rate = bytes(bits);
    let burst = in_time(rate, POLICE_BURST_MS).max(LEAST_POLICE_BURST);
    let option = |kind, value: Vec<u8>| TcActionOption::Other(DefaultNla::new(kind, value));
    let options = vec![
        option(TCA_POLICE_TBF, police_parameters(rate, burst)),
        option(TCA_POLICE_RATE, vec![0; RATE_TABLE_BYTES]),
        option(TCA_POLICE_RATE64, rate.to_ne_bytes().to_vec()),
    ];
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("police".to_owned()),
        TcActionAttribute::Options(options),
    ];
    filter_all(index, action)
}

/// A filter on what an interface gets that does the same to everything.
pub(super) fn filter_all(index: u32, action: TcAction) -> TcMessage {
    let filter = TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![action]));
    let attributes = vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![filter]),
    ];
    let parent = TcHandle {
        major: 0xffff,
        minor: TcHandle::MIN_INGRESS,
    };
    // Priority 1, every protocol.
    let info = u32::from(TcHandle {
        major: 1,
        minor: ETH_P_ALL,
    });
    message(index, TcHandle { major: 0, minor: 1 }, parent, info, attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn structures_are_as_long_as_the_kernels() {
        assert_eq!(rate_spec(1, 0).len(), 12);
        assert_eq!(tbf_parameters(1, 1).len(), 36);
        assert_eq!(police_parameters(1, 1).len(), 56);
    }

    #[test]
    fn limits_are_bits_a_second() {
        let parameters = tbf_parameters(bytes(40_000_000), 7);
        assert_eq!((number(&parameters, 8), number(&parameters, 24)), (5_000_000, 7));
        let parameters = police_parameters(bytes(8_000_000), 131_072);
        // Dropped; 131072 bytes take 131.072 ms, in ticks of 64 ns; at 10^6 bytes a second.
        assert_eq!(number(&parameters, 4), 2);
        assert_eq!(number(&parameters, 12), 2_048_000);
        assert_eq!(number(&parameters, 28), 1_000_000);
        // Rounded down, never to nothing.
        assert_eq!((bytes(1007), bytes(1)), (125, 1));
    }

    #[test]
    fn extreme_limits_fit() {
        for bits in [1000, 10_u64.pow(15)] {
            let parameters = police_parameters(
                bytes(bits),
                in_time(bytes(bits), POLICE_BURST_MS).max(LEAST_POLICE_BURST),
            );
            assert!(
                number(&parameters, 12) > 0 && number(&parameters, 28) > 0,
                "{bits}"
            );
            shaper(1, bits);
        }
        assert_eq!(number(&rate_spec(u64::MAX, 0), 8), u32::MAX);
    }
}
