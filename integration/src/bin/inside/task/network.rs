//! Containers in a network namespace that somebody has set up, as CNI, docker and nerdctl do.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::containerd::shim_of;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test, pattern};
use serde_json::{Value, json};

use super::ended::{kill_hard, monitor_of};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.network",
            "a container in a namespace with interfaces has them, with their addresses and routes, and speaks by them, v4 \
             and v6, as with runc; the namespace is as it was afterwards",
            in_a_namespace,
        ),
        test(
            "task.network-late",
            "what is put into a container's namespace between Create and Start is there when it starts, as with runc",
            late,
        ),
        test(
            "task.network-killed",
            "a namespace is as it was, too, when the shim or the monitor of the container in it was killed, and where others \
             have filters",
            killed,
        ),
        test(
            "task.network-follows",
            "an interface, an address, routes, by several gateways or to nowhere, and rules that come and go while a container \
             runs do so in it, and an interface that is turned off and on is in it, as with runc",
            follows,
        ),
    ]
}

/// Bytes that go each way.
const AMOUNT: u64 = 4 << 20;
/// On which containers listen.
pub const PORT: u16 = 7000;

/// What a container sees of its network, but for what differs from one machine to the next.
const SEEN: &str = "ls /sys/class/net
    for i in $(ls /sys/class/net | grep eth); do
        echo $i $(cat /sys/class/net/$i/address) $(cat /sys/class/net/$i/mtu) $(cat /sys/class/net/$i/operstate)
        ip -o addr show dev $i | grep -v fe80: | grep -o 'inet.*' | cut -d' ' -f1,2 | sort
        ip -6 -o addr show dev $i | grep -o 'inet6 fe80[^ ]*'
    done
    ip -4 route | sed 's/ *$//' | sort
    ip -6 route | grep -v -e ^fe80 -e ^ff00 -e ^multicast | grep -v '^unreachable' | sed 's/ pref medium//;s/ *$//' | sort";

/// A network namespace with one end of a cable whose other end is this host's.
pub struct Cabled<'a> {
    ctx: &'a Ctx<'a, Inside>,
    /// Where it is mounted.
    pub path: String,
}

/// The two ends of a cable: their addresses, and the name of the one that is inside.
pub struct Cable {
    /// By which addresses and names differ.
    pub number: u8,
    /// The hardware address inside.
    pub mac: &'static str,
    /// Of both ends.
    pub mtu: u32,
}

impl Cable {
    /// The addresses of this host.
    pub fn outside(&self) -> [IpAddr; 2] {
        self.end(1)
    }

    /// The addresses inside.
    pub fn inside(&self) -> [IpAddr; 2] {
        self.end(2)
    }

    fn end(&self, end: u8) -> [IpAddr; 2] {
        let v6 = Ipv6Addr::new(0xfd77, self.number.into(), 0, 0, 0, 0, 0, end.into());
        [Ipv4Addr::new(10, 77, self.number, end).into(), v6.into()]
    }
}

const FIRST: Cable = Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1400 };
const SECOND: Cable = Cable { number: 1, mac: "02:77:00:00:00:02", mtu: 1500 };

fn ip(ctx: &Ctx<'_, Inside>, words: &str) -> Result<String> {
    let done = ctx.cmd("ip").args(words.split_whitespace()).ok()?;
    Ok(done.out().into_owned())
}

impl<'a> Cabled<'a> {
    /// One with nothing in it.
    pub fn new(ctx: &'a Ctx<'_, Inside>) -> Result<Self> {
        let path = ctx.path("netns").display().to_string();
        std::fs::write(&path, "")?;
        let cabled = Self { ctx, path };
        ctx.cmd("unshare").args([&format!("--net={}", cabled.path), "true"]).ok()?;
        Ok(cabled)
    }

    /// What a command says there.
    pub fn inside(&self, words: &str) -> Result<String> {
        let enter = format!("--net={}", self.path);
        let done = self.ctx.cmd("nsenter").arg(enter).args(words.split_whitespace()).ok()?;
        Ok(done.out().into_owned())
    }
}

/// A cable that is in. It goes with this value: the kernel takes its time to take one out of a namespace that is gone.
pub struct Plugged<'a> {
    ctx: &'a Ctx<'a, Inside>,
    outside: String,
}

impl Drop for Plugged<'_> {
    fn drop(&mut self) {
        // The kernel may have been faster.
        let _ = ip(self.ctx, &format!("link del {}", self.outside));
    }
}

/// Puts one end of a cable into the namespace at `path`, in the way of CNI's plugins.
pub fn plug<'a>(ctx: &'a Ctx<'_, Inside>, path: &str, cable: &Cable) -> Result<Plugged<'a>> {
    let Cable { number, mac, mtu } = cable;
    let (out, name) = (format!("it-out{number}"), format!("eth{number}"));
    ip(ctx, &format!("link add {out} mtu {mtu} type veth peer name it-in{number} address {mac} mtu {mtu}"))?;
    let plugged = Plugged { ctx, outside: out.clone() };
    let [v4, v6] = cable.outside();
    ip(ctx, &format!("address add {v4}/24 dev {out}"))?;
    ip(ctx, &format!("address add {v6}/64 dev {out} nodad"))?;
    ip(ctx, &format!("link set {out} up"))?;
    let inside = |words: &str| -> Result<()> {
        let enter = format!("--net={path}");
        ctx.cmd("nsenter").args([enter.as_str(), "ip"]).args(words.split_whitespace()).ok()?;
        Ok(())
    };
    ip(ctx, &format!("link set it-in{number} netns {path} name {name}"))?;
    let [own4, own6] = cable.inside();
    inside("link set lo up")?;
    inside(&format!("address add {own4}/24 dev {name}"))?;
    inside(&format!("address add {own6}/64 dev {name} nodad"))?;
    inside(&format!("link set {name} up"))?;
    if *number == 0 {
        inside(&format!("route add default via {v4} dev {name}"))?;
        inside(&format!("route add 10.99.0.0/16 via {v4} dev {name} metric 77"))?;
        inside(&format!("route add 10.98.0.0/24 dev {name} scope link"))?;
        inside(&format!("-6 route add default via {v6} dev {name}"))?;
    }
    Ok(plugged)
}

impl Drop for Cabled<'_> {
    fn drop(&mut self) {
        let _ = self.ctx.cmd("umount").arg(&self.path).run();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Has a container be in the namespace at `path`.
pub fn enter(spec: &mut Value, path: &str) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        for namespace in namespaces.iter_mut().filter(|namespace| namespace["type"] == "network") {
            *namespace = json!({ "type": "network", "path": path });
        }
    }
}

/// May `ping`, and set up interfaces.
pub fn with_rights(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        if let Some(set) = spec["process"]["capabilities"][set].as_array_mut() {
            set.extend([json!("CAP_NET_RAW"), json!("CAP_NET_ADMIN")]);
        }
    }
}

/// All that is hung into the interfaces of a namespace.
pub fn hung(cabled: &Cabled<'_>) -> Result<String> {
    let qdiscs = cabled.inside("tc qdisc show")?;
    let filters = cabled.inside("tc filter show dev eth0 ingress").unwrap_or_default();
    let links = cabled.inside("ip -o link")?;
    let links: Vec<_> = links.lines().filter_map(|line| line.split(':').nth(1)).collect();
    Ok(format!("{qdiscs}{filters}{links:?}"))
}

fn in_a_namespace(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let mut said = Vec::new();
    for runtime in [RUNC, OURS] {
        let cabled = Cabled::new(ctx)?;
        let _cable = plug(ctx, &cabled.path, &FIRST)?;
        let before = hung(&cabled)?;
        let script = format!("{SEEN}; nc -ll -p {PORT} -e cat & echo ready; read line; kill $!; exit 7");
        let path = cabled.path.clone();
        let mut task =
            Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", &script], |spec| {
                enter(spec, &path);
            })?;
        task.container.start()?;
        let seen = task.stdout.read_until("ready\n", A_WHILE)?;
        said.push(String::from_utf8_lossy(&seen).into_owned());
        for address in FIRST.inside() {
            through(address).with_context(|| format!("{runtime}: to {address}"))?;
        }
        for address in FIRST.outside() {
            out(ctx, &task, address)
                .with_context(|| format!("{runtime}: from the container to {address}"))?;
        }
        task.stdin.write(b"\n")?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 7, "{runtime}: exit code {code}");
        task.end(code)?;
        let after = hung(&cabled)?;
        ensure!(after == before, "{runtime}: the namespace was {before}, and is {after}");
    }
    ensure!(said[0] == said[1], "a container sees {:?}, with runc {:?}", said[1], said[0]);
    Ok(Outcome::Passed)
}

fn killed(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for who in ["monitor", "shim"] {
        let cabled = Cabled::new(ctx)?;
        let _cable = plug(ctx, &cabled.path, &FIRST)?;
        if who == "monitor" {
            cabled.inside("tc qdisc add dev eth0 clsact")?;
            cabled.inside("tc filter add dev eth0 ingress protocol ip prio 5 matchall action pass")?;
        }
        let (before, path) = (hung(&cabled)?, cabled.path.clone());
        let enter = |spec: &mut Value| enter(spec, &path);
        let mut task = Piped::new(ctx, &api, OURS, &["sh", "-c", "echo ready; exec sleep 1000"], enter)?;
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
        let between = hung(&cabled)?;
        let joined = between.contains("ffff:fff1") && between.contains("smtap");
        ensure!(joined, "of a machine is to be seen {between}");
        if who == "shim" {
            kill_hard(&shim_of(&task.id)?)?;
            let name = format!("task {}/{}", ctx.world.namespace, task.id);
            until("containerd to forget the task", A_WHILE, || match api.objects() {
                Ok(objects) if !objects.contains(&name) => Attempt::Done(()),
                other => Attempt::Pending(format!("{other:?}")),
            })?;
            task.container.delete()?;
        } else {
            kill_hard(&monitor_of(&task.id)?)?;
            let code = task.container.wait(A_WHILE)?;
            ensure!(code == 137, "exit code {code}");
            task.end(code)?;
        }
        // containerd has a shim that is gone tidied up after, in its own time.
        until(&format!("the namespace to be as before its {who} was killed"), A_WHILE, || {
            match hung(&cabled) {
                Ok(after) if after == before => Attempt::Done(()),
                other => Attempt::Pending(format!("it was {before}, and is {other:?}")),
            }
        })?;
    }
    Ok(Outcome::Passed)
}

/// Sends to a container that sends all back.
pub fn through(address: IpAddr) -> Result<()> {
    echoed(address, true)
}

/// Likewise, by way of a proxy that ends both directions when one has ended.
pub fn through_proxy(address: IpAddr) -> Result<()> {
    echoed(address, false)
}

fn echoed(address: IpAddr, by_halves: bool) -> Result<()> {
    let mut stream = connect(address)?;
    let mut writing = stream.try_clone()?;
    let sending = thread::spawn(move || -> std::io::Result<()> {
        pattern::send(&mut writing, 5, AMOUNT)?;
        if by_halves { writing.shutdown(std::net::Shutdown::Write) } else { Ok(()) }
    });
    let mut back = Vec::new();
    if by_halves {
        stream.read_to_end(&mut back)?;
    } else {
        stream.take(AMOUNT).read_to_end(&mut back)?;
    }
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
    ensure!(back.len() as u64 == AMOUNT, "of {AMOUNT} bytes {} came back", back.len());
    ensure!(pattern::wrong(5, 0, &back).is_none(), "other bytes came back");
    Ok(())
}

/// As soon as somebody listens.
fn connect(address: IpAddr) -> Result<TcpStream> {
    let mut last = None;
    for _ in 0..50 {
        match TcpStream::connect_timeout(&(address, PORT).into(), Duration::from_secs(10)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(A_WHILE))?;
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
        thread::sleep(Duration::from_millis(100));
    }
    Err(last.map_or_else(|| anyhow::anyhow!("never tried"), Into::into))
}

/// Has a container send to this host.
pub fn out(ctx: &Ctx<'_, Inside>, task: &Piped<'_>, address: IpAddr) -> Result<()> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    let receiving = thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(A_WHILE))?;
        stream.write_all(b"go\n")?;
        std::io::copy(&mut stream, &mut std::io::sink())
    });
    let script = format!("head -c {AMOUNT} /dev/zero | nc {address} {port} | head -n 1");
    let exec = if address.is_ipv4() { "sends4" } else { "sends6" };
    let words = ctx.world.ctr().words(&["task", "exec", "--exec-id", exec, &task.id, "sh", "-c", &script]);
    let said = ctx.cmd(&words[0]).args(&words[1..]).ok()?;
    ensure!(said.out().trim() == "go", "the container heard {:?}", said.out());
    let got = receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(got == AMOUNT, "of {AMOUNT} bytes {got} came");
    Ok(())
}

fn late(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let mut said = Vec::new();
    for runtime in [RUNC, OURS] {
        let script = format!(
            "{SEEN}; ping -c 1 -W 20 10.77.0.1 >/dev/null && ping -c 1 -W 20 fd77:1::1 >/dev/null; exit $?"
        );
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", &script], with_rights)?;
        let path = format!("/proc/{}/ns/net", task.pid);
        let _cables = [plug(ctx, &path, &FIRST)?, plug(ctx, &path, &SECOND)?];
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        let seen = task.stdout.read_to_end(A_WHILE)?;
        said.push(String::from_utf8_lossy(&seen).into_owned());
        let errors = String::from_utf8_lossy(&task.stderr.read_to_end(A_WHILE)?).into_owned();
        task.end(code)?;
        ensure!(code == 0, "{runtime}: exit code {code}, {errors:?}, after {:?}", said.last());
    }
    ensure!(said[0] == said[1], "a container sees {:?}, with runc {:?}", said[1], said[0]);
    Ok(Outcome::Passed)
}

fn follows(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", "echo ready; read line"], with_rights)?;
        task.container.start()?;
        task.stdout.read_until("ready\n", A_WHILE)?;
        let path = format!("/proc/{}/ns/net", task.pid);
        let inside = |words: &str| -> Result<()> {
            let enter = format!("--net={path}");
            ctx.cmd("nsenter").args([enter.as_str(), "ip"]).args(words.split_whitespace()).ok()?;
            Ok(())
        };
        let shows = |script: &str, wanted: bool| {
            until(&format!("{runtime}: {script} to be {wanted}"), A_WHILE, || {
                let words = ctx.world.ctr().words(&[
                    "task",
                    "exec",
                    "--exec-id",
                    "looks",
                    &task.id,
                    "sh",
                    "-c",
                    script,
                ]);
                match ctx.cmd(&words[0]).args(&words[1..]).run() {
                    Ok(done) if (done.code() == Some(0)) == wanted => Attempt::Done(()),
                    Ok(done) => {
                        Attempt::Pending(format!("{:?} {:?} {:?}", done.code(), done.out(), done.err()))
                    }
                    Err(error) => Attempt::Pending(error.to_string()),
                }
            })
        };
        shows("test -e /sys/class/net/eth0", false)?;
        let first = plug(ctx, &path, &FIRST)?;
        shows("ping -c 1 -W 5 10.77.0.1 && ping -c 1 -W 5 fd77::1", true)?;
        // What a container has added itself stays whatever changes.
        shows("ip address add 10.80.0.9/32 dev eth0 && ip route add 10.81.0.0/16 dev eth0", true)?;
        inside("address add 10.78.0.9/24 dev eth0")?;
        inside("route add 10.79.0.0/16 via 10.78.0.1 dev eth0")?;
        shows("ip route get 10.79.0.1 | grep 10.78.0.1", true)?;
        inside("address del 10.78.0.9/24 dev eth0")?;
        shows("ip address show dev eth0 | grep 10.78.0.9", false)?;
        inside("route add 10.82.0.0/16 via 10.77.0.1 dev eth0 table 1000")?;
        inside("rule add from 10.77.0.2 to 10.82.0.0/16 priority 100 table 1000")?;
        shows("ip rule | grep '^100:.*from 10.77.0.2 to 10.82.0.0/16 lookup 1000'", true)?;
        shows("ip route get 10.82.0.1 from 10.77.0.2 | grep 'via 10.77.0.1'", true)?;
        inside("rule del priority 100")?;
        shows("ip rule | grep '^100:'", false)?;
        shows("ping -c 1 -W 5 10.77.0.1", true)?;
        // Each of several gateways has a part of the destinations, until one is taken away; and some lead nowhere.
        let by = |gateways: &str| {
            format!(
                "for i in $(seq 60); do ip route get 10.83.0.$i; done | grep -o 'via [0-9.]*' | sort -u | tr -d '\\n' | \
                grep -x '{gateways}'"
            )
        };
        inside(
            "route add 10.83.0.0/16 nexthop via 10.77.0.1 dev eth0 nexthop via 10.77.0.3 dev eth0 weight 2",
        )?;
        shows(&by("via 10.77.0.1via 10.77.0.3"), true)?;
        inside("route replace 10.83.0.0/16 via 10.77.0.3 dev eth0")?;
        shows(&by("via 10.77.0.3"), true)?;
        inside("-6 route add fd83::/64 nexthop via fd77::1 dev eth0 nexthop via fd77::3 dev eth0")?;
        shows("ip -6 route get fd83::1 | grep 'via fd77::[13]'", true)?;
        for (family, network, within) in [("", "10.84.0.0/16", "10.84.0.1"), ("-6 ", "fd84::/64", "fd84::1")]
        {
            shows(&format!("ip {family}route get {within}"), true)?;
            inside(&format!("{family}route add unreachable {network}"))?;
            shows(&format!("ip {family}route get {within}"), false)?;
            inside(&format!("{family}route del unreachable {network}"))?;
            shows(&format!("ip {family}route get {within}"), true)?;
        }
        // What rules say beyond a table, each as long as it is there.
        let nearby = "ip route get 10.77.0.3 && ! ip route get 10.86.0.1";
        for (rules, seen) in [
            (&["to 10.85.0.0/16 priority 90 unreachable"][..], "! ip route get 10.85.0.1"),
            (&["not to 10.77.0.0/16 priority 90 blackhole"], nearby),
            (&["priority 90 table main suppress_prefixlength 0", "priority 91 prohibit"], nearby),
            (
                &["to 10.77.0.0/16 priority 90 goto 92", "priority 91 unreachable", "priority 92 table main"],
                nearby,
            ),
            (
                &["ipproto tcp dport 9 priority 90 unreachable"],
                "wget -T 5 -O- http://10.77.0.1:9/ 2>&1 | grep -i unreachable && ip route get 10.77.0.1",
            ),
        ] {
            rules.iter().try_for_each(|rule| inside(&format!("rule add {rule}")))?;
            shows(seen, true).with_context(|| format!("with {rules:?}"))?;
            rules.iter().try_for_each(|rule| inside(&format!("rule del {rule}")))?;
            shows(seen, false).with_context(|| format!("without {rules:?}"))?;
        }
        shows("ip address show dev eth0 | grep 10.80.0.9 && ip route | grep 10.81.0.0/16", true)?;
        inside("link set eth0 down")?;
        shows("ip link show dev eth0 | grep '[<,]UP[,>]'", false)?;
        inside("link set eth0 up")?;
        shows("ping -c 1 -W 5 10.77.0.1", true)?;
        drop(first);
        shows("test -e /sys/class/net/eth0", false)?;
        let _second = plug(ctx, &path, &SECOND)?;
        shows("ping -c 1 -W 5 10.77.1.1", true)?;
        task.stdin.write(b"\n")?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}
