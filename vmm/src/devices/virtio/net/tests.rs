use virtio_queue::{Queue, QueueT};

use super::super::VirtQueue;
use super::*;
use crate::event::Event;
use crate::hypervisor::testing::Wire;
use crate::memory;
use crate::registers::Page;
use crate::standstill::Standstill;

#[test]
fn what_cannot_be_is_named() {
    let config = |pairs: usize, mac, mtu| Config {
        pairs,
        taps: (0..pairs).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect(),
        vhost: vec![],
        socket: None,
        mac,
        mtu,
        rx: Limits::default(),
        tx: Limits::default(),
    };
    let mac = [2, 0, 0, 0, 0, 1];
    for (config, word) in [
        (config(0, mac, None), "0 queue pairs"),
        (config(9, mac, None), "9 queue pairs"),
        (config(1, [0; 6], None), "00:00:00:00:00:00"),
        (config(1, [1, 2, 3, 4, 5, 0xff], None), "01:02:03:04:05:ff"),
        (config(1, mac, Some(67)), "MTU of 67"),
        (config(1, mac, Some(1500)), "not a tap"),
    ] {
        let error = Net::new(config).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

fn net(pairs: usize, mtu: Option<u16>) -> Net {
    let limits = Limits::default();
    let mac = [2, 0, 0, 0, 0, 1];
    Net::new(Config { pairs, taps: vec![], vhost: vec![], socket: None, mac, mtu, rx: limits, tx: limits })
        .unwrap()
}

#[test]
fn what_nobody_would_cut_up_is_not_offered_to_be_sent() {
    let large = F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_USO;
    let config = |pairs, socket| {
        let (limits, mac) = (Limits::default(), [2, 0, 0, 0, 0, 1]);
        Config { pairs, taps: vec![], vhost: vec![], socket, mac, mtu: None, rx: limits, tx: limits }
    };
    let socket = || Some(std::os::unix::net::UnixDatagram::pair().unwrap().0.into());
    let net = Net::new(config(1, socket())).unwrap();
    assert_eq!((net.features & large, net.features & F_CSUM, net.handle().link()), (0, F_CSUM, true));
    let later = Net::new(config(1, None)).unwrap();
    assert_ne!((later.features & large, later.handle().link()), (0, true));
    later.handle().connect(socket().unwrap()).unwrap();
    assert!(later.handle().link());
    let several = Net::new(config(3, socket())).unwrap();
    assert_eq!([1, 2, 3].map(|pairs| several.shared.has_room_for(pairs)), [true, false, false]);
}

/// Its driver is ready; whether it was told of a change.
fn activate(net: &mut Net, features: u64) -> bool {
    let ram = Arc::new(memory::anonymous(&[(0, 0x1000)]).unwrap());
    let standstill = Arc::new(Standstill::new().unwrap());
    let wire = Arc::new(Wire::default());
    let signals = Arc::new(Signals::new(wire.clone(), Page::alone()));
    let queues = net.queues().to_vec().into_iter().map(|size| {
        let mut queue = Queue::new(size).unwrap();
        queue.set_ready(true);
        VirtQueue::new(queue, ram.clone(), Arc::new(Event::new().unwrap()), Arc::default())
    });
    let queues = queues.collect();
    net.activate(Activation { ram, queues, signals, standstill, features }).unwrap();
    wire.0.load(Ordering::SeqCst) > 0
}

fn status(net: &Net) -> u16 {
    let configuration = net.configuration();
    assert_eq!(configuration[4..8], net.shared.second_word());
    u16::from_le_bytes(configuration[6..8].try_into().unwrap())
}

#[test]
fn a_driver_that_came_from_elsewhere_uses_the_pairs_that_it_did_and_announces_itself() {
    for (features, used, on) in [(F_MQ, 3, 3), (F_MQ, 1, 1), (F_MQ, 0, 1), (0, 1, 1)] {
        for announces in [0, F_GUEST_ANNOUNCE] {
            let mut first = net(4, None);
            assert!(!activate(&mut first, features | announces), "nothing is new to it");
            for (index, port) in first.shared.ports.iter().enumerate() {
                port.switch(index < used).unwrap();
            }
            let bytes = first.save().unwrap();
            let mut second = net(4, None);
            second.restore(&bytes).unwrap();
            assert_eq!(activate(&mut second, features | announces), announces != 0);
            let ports = second.shared.ports.iter();
            assert_eq!(ports.map(|port| port.is_on()).filter(|on| *on).count(), on);
            // As soon as there is somebody to hear it.
            assert_eq!(status(&second), 0);
            second.shared.set_link(true);
            assert_eq!(status(&second), if announces == 0 { 1 } else { 3 });
            second.reset();
            assert!(!activate(&mut second, features | announces), "it starts over");
            assert_eq!(status(&second), 1);
        }
    }
}

#[test]
fn a_pair_has_a_thread_once_the_cable_is_in_and_the_driver_uses_it() {
    let mut net = net(3, None);
    activate(&mut net, F_MQ);
    let running = |net: &Net| net.shared.movers().running();
    let uses = |net: &Net, pairs: usize| {
        for (index, port) in net.shared.ports.iter().enumerate() {
            port.switch(index < pairs).unwrap();
        }
        net.shared.wake().unwrap();
        running(net)
    };
    assert_eq!((running(&net), uses(&net, 2)), (0, 0), "there is no cable");
    net.shared.set_link(true);
    // Those that have begun stay.
    assert_eq!([1, 2, 3, 1].map(|pairs| uses(&net, pairs)), [1, 2, 3, 3]);
    net.reset();
    assert_eq!(uses(&net, 3), 0, "there is no driver");
    activate(&mut net, F_MQ);
    assert_eq!(running(&net), 1, "a driver begins with one");
    let bytes = net.save().unwrap();
    assert_eq!(decode::<State>(&bytes).unwrap(), State { mtu: None, link: true, pairs: 1 });
}

#[test]
fn a_link_that_is_another_is_told() {
    for (before, after, told) in [(false, false, false), (true, true, false), (false, true, true)] {
        let mut first = net(1, None);
        first.shared.set_link(before);
        activate(&mut first, 0);
        let mut second = net(1, None);
        second.restore(&first.save().unwrap()).unwrap();
        second.shared.set_link(after);
        assert_eq!(activate(&mut second, 0), told, "{before} {after}");
    }
}

#[test]
fn what_the_driver_could_not_go_on_with_is_named() {
    let bytes = |mtu| net(1, mtu).save().unwrap();
    for (saved, here, fits) in [
        (None, None, true),
        (None, Some(1400), true),
        (Some(1400), Some(1400), true),
        (Some(1400), Some(9000), true),
        (Some(1500), Some(1400), false),
    ] {
        let result = net(1, here).restore(&bytes(saved));
        assert_eq!(result.is_ok(), fits, "{saved:?} {here:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains("MTU was 1500 and is 1400"), "{error}");
        }
    }
    let state = State { mtu: None, link: true, pairs: 2 };
    let error = net(1, None).restore(&encode(&state).unwrap()).unwrap_err().to_string();
    assert!(error.contains("2 queue pairs"), "{error}");
    for bytes in [&[][..], &[1], &[0, 0, 0, 0]] {
        net(1, None).restore(bytes).unwrap_err();
    }
}

#[test]
fn the_tap_leaves_undone_what_the_driver_takes() {
    for (features, offload) in [
        (0, 0),
        (F_GUEST_TSO4 | F_GUEST_TSO6, 0),
        (F_GUEST_CSUM, libc::TUN_F_CSUM),
        (F_GUEST_CSUM | F_GUEST_TSO4, libc::TUN_F_CSUM | libc::TUN_F_TSO4),
        (F_GUEST_CSUM | F_GUEST_USO4, libc::TUN_F_CSUM),
        (F_GUEST_CSUM | F_GUEST_USO4 | F_GUEST_USO6, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        assert_eq!(tap_offload(features), offload, "{features:#x}");
    }
    assert_eq!(packet_max(F_GUEST_CSUM, None), 1530);
    assert_eq!(packet_max(F_GUEST_CSUM, Some(9000)), 9030);
    assert_eq!(packet_max(F_GUEST_CSUM | F_GUEST_TSO4, Some(1500)), 65565);
}
