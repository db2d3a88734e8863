//! Leases of a DHCP server's, and a network by datagrams.

use std::fs;

use anyhow::{Result, ensure};
use integration::command::Running;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::Signal;

use super::network::with_rights;
use super::network_socket::{ALLOW, finish, says};
use super::template::{Configured, annotate};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-leases",
        "behind a datagram socket a container greets, gets a lease by DHCP although half of its questions are lost, and reaches \
         who is there; the lease is renewed, and is given up when it has ended or its server says no, and asked for again; when \
         another network is at the same path, it greets that one",
        leases,
    )]
}

/// A network of one host, 10.9.0.1, that answers ARP, ping and DHCP by the frames of datagrams. What it reads in the file
/// decides: `short` leases of 20 seconds, `no` to whoever wants one longer, `silent` to all of them.
const NETWORK: &str = r#"
import socket, struct, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(sys.argv[1])
HERE, MAC = bytes([10, 9, 0, 1]), bytes([2, 9, 0, 0, 0, 1])
asked, last = 0, 1
def total(b):
    b += b"\0" * (len(b) % 2)
    n = sum(struct.unpack("!%dH" % (len(b) // 2), b))
    while n >> 16:
        n = (n & 0xffff) + (n >> 16)
    return n ^ 0xffff
def ip(proto, to, body):
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, proto, 0) + HERE + to
    return head[:10] + struct.pack("!H", total(head)) + head[12:] + body
def options(b):
    found, at = {}, 0
    while b[at] != 255:
        if b[at] == 0:
            at += 1
            continue
        found[b[at]] = b[at + 2:at + 2 + b[at + 1]]
        at += 2 + b[at + 1]
    return found
def dhcp(frame, udp):
    global asked, last
    mode = open(sys.argv[2]).read().strip()
    message = udp[8:]
    kind, own = options(message[240:])[53][0], message[12:16]
    asked += 1
    say = {1: "discover", 3: "renew" if any(own) else "request"}[kind]
    print(say, mode, ".".join(map(str, own)), flush=True)
    if mode == "silent" or mode == "short" and asked % 2 and not any(own):
        return
    no = mode == "no" and any(own)
    if kind == 1:
        last += 1
    mine = bytes([10, 9, 0, last])
    yours = bytes(4) if no else mine
    reply = bytearray(message[:240])
    reply[0], reply[12:16], reply[16:20] = 2, bytes(4), yours
    reply += bytes([53, 1, 2 if kind == 1 else 6 if no else 5, 54, 4]) + HERE
    reply += bytes([51, 4, 0, 0, 0, 20, 1, 4, 255, 255, 255, 0, 3, 4]) + HERE + bytes([26, 2, 5, 120, 255])
    datagram = struct.pack("!HHHH", 67, 68, 8 + len(reply), 0) + bytes(reply)
    # To the address itself, which nobody has yet.
    return frame[6:12] + MAC + b"\x08\0" + ip(17, mine, datagram)
while True:
    frame, who = sock.recvfrom(70000)
    answer = None
    if frame == b"VFKT":
        print("greeted", flush=True)
    elif frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == HERE:
        answer = frame[6:12] + MAC + frame[12:20] + b"\0\2" + MAC + HERE + frame[22:32]
    elif frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[30:34] == HERE and frame[34] == 8:
        echo = b"\0\0\0\0" + frame[38:14 + struct.unpack("!H", frame[16:18])[0]]
        echo = echo[:2] + struct.pack("!H", total(echo)) + echo[4:]
        answer = frame[6:12] + MAC + b"\x08\0" + ip(1, frame[26:30], echo)
    elif frame[12:14] == b"\x08\0" and frame[23] == 17 and frame[36:38] == b"\0\x43":
        answer = dhcp(frame, frame[34:])
    if answer:
        sock.sendto(answer, who)
"#;

const ADDRESS: &str = "ip -o -4 address show dev eth0; ip -4 route; echo all";

fn leases(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    let _allowed = Configured::with(ALLOW)?;
    let (socket, mode) = (ctx.path("net.sock"), ctx.path("mode"));
    fs::write(&mode, "short")?;
    let there_is = || -> Result<Running> {
        let words = [socket.as_os_str(), mode.as_os_str()];
        let network = ctx.cmd("python3").args(["-c", NETWORK]).args(words).start()?;
        until("the network to be there", A_WHILE, || {
            if socket.exists() {
                return Attempt::Done(());
            }
            Attempt::Pending(String::from_utf8_lossy(&network.stderr_so_far()).into_owned())
        })?;
        Ok(network)
    };
    let mut network = there_is()?;
    let process = ["sh", "-c", "sleep 1000"];
    let task = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &process, |spec| {
        with_rights(spec);
        annotate(spec, "network", &format!("datagram:{}", socket.display()));
    })?;
    task.container.start()?;
    let has = |last: u8| -> Result<()> {
        says(ctx, &task, ADDRESS, &format!("inet 10.9.0.{last}/24"))?;
        says(ctx, &task, ADDRESS, "default via 10.9.0.1 dev eth0")?;
        says(ctx, &task, "cat /sys/class/net/eth0/mtu", "1400")?;
        says(ctx, &task, "ping -c 1 -W 5 10.9.0.1 >/dev/null && echo reached", "reached")?;
        Ok(())
    };
    let said = String::from_utf8_lossy(&network.stdout_so_far()).into_owned();
    ensure!(said.starts_with("greeted\n"), "the network heard {said}");
    // Of each kind of question the first is lost; each discovery that is not has another address offered.
    has(2)?;
    network.until_stdout_has("renew short 10.9.0.2\n", A_WHILE)?;
    has(2)?;
    fs::write(&mode, "silent")?;
    let gone = |script| says(ctx, &task, script, "none");
    gone("ip -o -4 address show dev eth0 | grep -q inet || ip -4 route | grep -q default || echo none")?;
    fs::write(&mode, "short")?;
    has(3)?;
    fs::write(&mode, "no")?;
    network.until_stdout_has("renew no 10.9.0.3\n", A_WHILE)?;
    fs::write(&mode, "short")?;
    has(4)?;
    network.signal(Signal::SIGKILL)?;
    network.wait()?;
    fs::remove_file(&socket)?;
    let mut network = there_is()?;
    network.until_stdout_has("greeted\n", A_WHILE)?;
    // It knows nothing of the other's leases.
    has(2)?;
    finish(task)?;
    Ok(Outcome::Passed)
}
