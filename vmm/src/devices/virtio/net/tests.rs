use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use virtio_bindings::virtio_net as net;
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::config::NetConfig;
use crate::devices::virtio::testing::{Driver, HEAP, readable, writable};
use crate::sys::tap::{self, Tap, VNET_HEADER_BYTES};

const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];
const BUFFER_BYTES: usize = 1600;

/// The device on one end of a packet socket pair; the other end is the network.
fn start(without: u64) -> (Driver, UnixDatagram) {
    let (ours, network) = UnixDatagram::pair().unwrap();
    network.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let tap = Tap::from_packet_socket(ours.into()).unwrap();
    let config = NetConfig {
        mac: MAC,
        mtu: 1450,
        vhost: false,
    };
    (
        Driver::start(Box::new(Net::on_tap(&config, tap, None)), without),
        network,
    )
}

fn frame(length: usize, seed: usize) -> Vec<u8> {
    let header = [0; VNET_HEADER_BYTES];
    let body = (0..length).map(|i| u8::try_from((i * 3 + i / 256 + seed) % 256).unwrap());
    header.into_iter().chain(body).collect()
}

fn address(number: u64) -> u64 {
    HEAP + number * 0x1_0000
}

#[test]
fn config_is_mac_and_mtu() {
    let (mut driver, _network) = start(0);
    assert_eq!(driver.config(0, 6), MAC);
    assert_eq!(driver.config(10, 2), 1450_u16.to_le_bytes());
    for bit in [
        net::VIRTIO_NET_F_MAC,
        net::VIRTIO_NET_F_MTU,
        net::VIRTIO_NET_F_MRG_RXBUF,
        net::VIRTIO_NET_F_HOST_TSO4,
    ] {
        assert_ne!(driver.device_features() & 1 << bit, 0, "{bit}");
    }
}

#[test]
fn frames_of_the_guest_reach_the_network_however_they_are_cut() {
    let (mut driver, network) = start(0);
    let mut seen = vec![0; 70_000];
    for (round, length) in [60, 1450, 9000, 60_000].into_iter().enumerate() {
        let sent = frame(length, round);
        driver.write_memory(address(0), &sent);
        let cut = 5 + round * 20;
        driver.add(
            TX_QUEUE,
            &[
                readable(address(0), cut),
                readable(address(0) + cut as u64, sent.len() - cut),
            ],
        );
        driver.kick(TX_QUEUE);
        driver.wait_used(TX_QUEUE);
        let n = network.recv(&mut seen).unwrap();
        assert!(seen[..n] == sent);
    }
    assert_eq!(driver.counter("net_tx_packets"), 4);
}

#[test]
fn frames_of_the_network_reach_the_guest_in_order_and_wait_for_buffers() {
    let (mut driver, network) = start(0);
    for round in 0..5 {
        network.send(&frame(100, round)).unwrap();
    }
    for round in 0..5_usize {
        driver.add(RX_QUEUE, &[writable(address(round as u64), BUFFER_BYTES)]);
        driver.kick(RX_QUEUE);
        let (_, length) = driver.wait_used(RX_QUEUE);
        let mut expected = frame(100, round);
        expected[10] = 1;
        assert_eq!(
            driver.read_memory(address(round as u64), length as usize),
            expected
        );
    }
    assert_eq!(driver.counter("net_rx_packets"), 5);
}

#[test]
fn long_frame_is_merged_over_buffers() {
    let (mut driver, network) = start(0);
    let sent = frame(4000, 7);
    network.send(&sent).unwrap();
    // Two are not enough; nothing may be used before the third is there.
    driver.add(RX_QUEUE, &[writable(address(0), BUFFER_BYTES)]);
    driver.add(RX_QUEUE, &[writable(address(1), 700), writable(address(2), 900)]);
    driver.kick(RX_QUEUE);
    driver.add(RX_QUEUE, &[writable(address(3), BUFFER_BYTES)]);
    driver.kick(RX_QUEUE);
    let lengths = [(); 3].map(|()| driver.wait_used(RX_QUEUE).1 as usize);
    assert_eq!(lengths, [1600, 1600, 4012 - 3200]);
    let mut expected = sent;
    expected[10] = 3;
    let seen = [
        driver.read_memory(address(0), 1600),
        driver.read_memory(address(1), 700),
        driver.read_memory(address(2), 900),
        driver.read_memory(address(3), 812),
    ]
    .concat();
    assert!(seen == expected);
}

#[test]
fn without_merging_a_long_frame_is_dropped_and_the_next_comes_through() {
    let (mut driver, network) = start(1 << net::VIRTIO_NET_F_MRG_RXBUF);
    network.send(&frame(4000, 7)).unwrap();
    network.send(&frame(60, 8)).unwrap();
    for number in 0..2 {
        driver.add(RX_QUEUE, &[writable(address(number), BUFFER_BYTES)]);
    }
    driver.kick(RX_QUEUE);
    assert_eq!(driver.wait_used(RX_QUEUE).1, 0);
    assert_eq!(driver.wait_used(RX_QUEUE).1, 72);
    assert_eq!(driver.counter("net_rx_dropped"), 1);
}

#[test]
fn many_frames_both_ways_with_and_without_event_index() {
    for without in [0, 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX] {
        let (mut driver, network) = start(without);
        for number in 0..16 {
            driver.add(RX_QUEUE, &[writable(address(number), BUFFER_BYTES)]);
        }
        driver.kick(RX_QUEUE);
        let mut seen = vec![0; 2000];
        let mut number_of_head: Vec<_> = (0..256).collect();
        for (head, number) in number_of_head.iter_mut().enumerate() {
            *number = head % 16;
        }
        for round in 0..400 {
            network.send(&frame(200, round)).unwrap();
            let (head, length) = driver.wait_used(RX_QUEUE);
            assert_eq!(length, 212);
            let number = number_of_head[usize::from(head)] as u64;
            assert_eq!(
                driver.read_memory(address(number), 212)[12..],
                frame(200, round)[12..]
            );
            let again = driver.add(RX_QUEUE, &[writable(address(number), BUFFER_BYTES)]);
            number_of_head[usize::from(again)] = usize::try_from(number).unwrap();
            driver.kick(RX_QUEUE);
            driver.write_memory(address(20), &frame(300, round));
            driver.add(TX_QUEUE, &[readable(address(20), 312)]);
            driver.kick(TX_QUEUE);
            driver.wait_used(TX_QUEUE);
            let n = network.recv(&mut seen).unwrap();
            assert_eq!(seen[..n], frame(300, round));
        }
    }
}

#[test]
fn hostile_chains_are_counted_and_the_device_lives_on() {
    let (mut driver, network) = start(0);
    for chain in [
        vec![readable(address(0), VNET_HEADER_BYTES)],
        vec![readable(address(0), 0)],
        vec![writable(address(0), 100)],
        vec![readable(1 << 44, 100)],
        vec![readable(address(0), 1 << 20)],
    ] {
        driver.add(TX_QUEUE, &chain);
        driver.kick(TX_QUEUE);
        assert_eq!(driver.wait_used(TX_QUEUE).1, 0);
    }
    driver.write_descriptor(TX_QUEUE, 200, Descriptor::new(address(0), 20, 1, 200));
    driver.publish(TX_QUEUE, 200);
    driver.kick(TX_QUEUE);
    assert_eq!(driver.wait_used(TX_QUEUE), (200, 0));
    assert_eq!(driver.counter("net_bad_packets"), 6);
    // Buffers nothing can be put into are returned, and the frame takes the good one.
    network.send(&frame(60, 1)).unwrap();
    driver.add(RX_QUEUE, &[readable(address(0), 1600)]);
    driver.add(RX_QUEUE, &[writable(address(0), 4)]);
    driver.add(RX_QUEUE, &[writable(1 << 44, 1600)]);
    driver.add(RX_QUEUE, &[writable(address(0), BUFFER_BYTES)]);
    driver.kick(RX_QUEUE);
    assert_eq!([(); 4].map(|()| driver.wait_used(RX_QUEUE).1), [0, 0, 0, 72]);
    driver.corrupt_avail_index(RX_QUEUE, 5000);
    driver.kick(RX_QUEUE);
    network.send(&frame(60, 2)).unwrap();
    driver.wait_needs_reset();
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set_status(15);
    driver.add(RX_QUEUE, &[writable(address(0), BUFFER_BYTES)]);
    driver.kick(RX_QUEUE);
    network.send(&frame(60, 3)).unwrap();
    assert_eq!(driver.wait_used(RX_QUEUE).1, 72);
}

/// Frames over a real tap, both ways, also after a reset.
fn check_real_tap(vhost: Option<OwnedFd>) {
    let (tap, mut network) = match tap::testing::open() {
        Ok(both) => both,
        Err(e) => return eprintln!("SKIPPED: this machine gives no tap: {e}"),
    };
    let in_kernel = vhost.is_some();
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
        vhost: in_kernel,
    };
    let device = Net::new(&config, tap, vhost).unwrap();
    let mut driver = Driver::start(Box::new(device), 0);
    let ether_type = tap::testing::ETHER_TYPE.to_be_bytes();
    let ethernet = |seed: usize| [&[0xff; 6][..], &MAC, &ether_type, &frame(500, seed)].concat();
    let mut heads = Vec::new();
    for round in 0..6 {
        if round == 3 {
            driver.negotiate(0);
            driver.set_up_queues();
            driver.set_status(15);
        }
        if round % 3 == 0 {
            // The interface itself may send frames (neighbour discovery): there are buffers for those too.
            let buffers = (0..32).map(|i| writable(address(i), BUFFER_BYTES));
            heads = buffers.map(|buffer| driver.add(RX_QUEUE, &[buffer])).collect();
            driver.kick(RX_QUEUE);
        }
        network.write_all(&ethernet(round)).unwrap();
        loop {
            let (head, length) = driver.wait_used(RX_QUEUE);
            let number = heads.iter().position(|&other| other == head).unwrap();
            let seen = driver.read_memory(address(number as u64), length as usize);
            if seen[VNET_HEADER_BYTES + 12..][..2] == ether_type {
                assert_eq!(seen[VNET_HEADER_BYTES..], ethernet(round));
                assert_eq!(seen[10..12], [1, 0], "one buffer");
                break;
            }
        }
        let sent = [&[0; VNET_HEADER_BYTES][..], &ethernet(round + 50)].concat();
        driver.write_memory(address(40), &sent);
        driver.add(
            TX_QUEUE,
            &[
                readable(address(40), 20),
                readable(address(40) + 20, sent.len() - 20),
            ],
        );
        driver.kick(TX_QUEUE);
        driver.wait_used(TX_QUEUE);
        let mut seen = vec![0; 2000];
        let n = network.read(&mut seen).unwrap();
        assert_eq!(seen[..n], ethernet(round + 50));
        assert_eq!(
            driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS) & 1,
            1
        );
    }
    assert_eq!(driver.counter("net_tx_packets"), if in_kernel { 0 } else { 6 });
}

#[test]
fn real_tap_without_vhost() {
    check_real_tap(None);
}

#[test]
fn real_tap_with_vhost() {
    match OpenOptions::new().read(true).write(true).open("/dev/vhost-net") {
        Ok(vhost) => check_real_tap(Some(vhost.into())),
        Err(e) => eprintln!("SKIPPED: this machine has no /dev/vhost-net: {e}"),
    }
}
