//! Containers whose network is behind a unix socket, as passt has it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use integration::command::Running;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::network::{Cable, Cabled, PORT, enter, out, plug, through};
use super::network_loads::{UDP, datagrams};
use super::template::{Configured, annotate};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.network-socket",
            "a container whose network is behind passt gets its address by DHCP, a v6 one by itself, and speaks TCP and UDP with a \
             host, both ways, unharmed; its network namespace on the host is empty; a machine from a checkpoint is connected anew",
            leased,
        ),
        test(
            "task.network-socket-ended",
            "one with addresses of its configuration speaks by them; when passt is killed its link is down and it lives on, and when \
             another passt is there it is connected again",
            given_and_ended,
        ),
        test(
            "task.network-socket-wrong",
            "a socket that is not there, none, of another kind, or that nobody listens on, one behind which there is no DHCP, and one \
             beside a network namespace are told of with what to do, and nothing stays",
            wrong,
        ),
    ]
}

/// What passt takes addresses and routes of.
pub const CABLE: Cable = Cable { number: 3, mac: "02:77:00:00:00:03", mtu: 1500 };
/// Who is at its other end.
const HOST: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 77, 3, 1)), IpAddr::V6(Ipv6Addr::new(0xfd77, 3, 0, 0, 0, 0, 0, 1))];
/// What lets containers say where their network is.
pub const ALLOW: &str = "[annotations]\nallow = [\"boot\", \"network\"]\n";

/// passt in a network namespace, which it shows to who connects to its socket.
struct Passt {
    running: Running,
    socket: PathBuf,
}

/// A directory for everybody, which goes with this: passt, started by root, goes on as nobody, who can make the socket here.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Result<Self> {
        let path = PathBuf::from(format!("/run/it-{name}-{}", std::process::id()));
        fs::create_dir(&path)?;
        let place = Self(path);
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o777))?;
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Passt {
    fn start(ctx: &Ctx<'_, Inside>, cabled: &Cabled<'_>, place: &Place) -> Result<Self> {
        let socket = place.0.join("socket");
        let (enter, tcp, udp) = (format!("--net={}", cabled.path), PORT.to_string(), UDP.to_string());
        let path = socket.display().to_string();
        let words = [&enter, "passt", "-f", "--socket", &path, "--no-map-gw", "-t", &tcp, "-u", &udp];
        let running = ctx.cmd("nsenter").args(words).start()?;
        until("passt to listen", A_WHILE, || {
            if socket.exists() {
                return Attempt::Done(());
            }
            Attempt::Pending(String::from_utf8_lossy(&running.stderr_so_far()).into_owned())
        })?;
        Ok(Self { running, socket })
    }

    fn address(&self) -> String {
        format!("stream:{}", self.socket.display())
    }

    fn kill(self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait()?;
        // What is left of it, so that the next one's is told from it.
        fs::remove_file(&self.socket)?;
        Ok(())
    }
}

/// Edits a spec so that the container's network is behind `socket`.
pub fn behind(ctx: &Ctx<'_, Inside>, socket: &str) -> impl Fn(&mut Value) + use<> {
    let (socket, source) = (socket.to_owned(), ctx.world.guest_part.clone());
    move |spec| {
        annotate(spec, "network", &socket);
        // The passt of Debian 13 breaks where its socket is full, which it is not with so little on its way.
        spec["linux"]["sysctl"] = json!({ "net.ipv4.tcp_rmem": "4096 32768 32768" });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": "/part", "type": "bind", "source": source, "options": ["bind", "ro"] }));
        }
    }
}

/// Answers by TCP and UDP.
fn serves() -> String {
    format!("/part serve-udp {UDP} & nc -ll -p {PORT} -e cat & wait")
}

/// What a command in a container says, when that is as wanted.
pub fn says(ctx: &Ctx<'_, Inside>, task: &Piped<'_>, script: &str, wanted: &str) -> Result<String> {
    until(&format!("{script} to say {wanted:?}"), A_WHILE, || {
        let words =
            ctx.world.ctr().words(&["task", "exec", "--exec-id", "looks", &task.id, "sh", "-c", script]);
        match ctx.cmd(&words[0]).args(&words[1..]).run() {
            Ok(done) if done.out().contains(wanted) => Attempt::Done(done.out().into_owned()),
            Ok(done) => Attempt::Pending(format!("{:?} {:?}", done.out(), done.err())),
            Err(error) => Attempt::Pending(error.to_string()),
        }
    })
    .map_err(Into::into)
}

/// Nothing of the machine's is in its namespace on the host.
fn is_empty_outside(ctx: &Ctx<'_, Inside>, task: &Piped<'_>) -> Result<()> {
    let enter = format!("--net=/proc/{}/ns/net", task.pid);
    let links = ctx.cmd("nsenter").args([&enter, "ip", "-o", "link"]).ok()?;
    ensure!(links.out().lines().count() == 1, "in its namespace on the host are {}", links.out());
    Ok(())
}

/// Faults of passt's own that the kernel knows of: that of Debian 13 has had one in the midst of a stream, and then this test has
/// shown nothing.
fn faults(ctx: &Ctx<'_, Inside>) -> Result<usize> {
    let said = ctx.cmd("dmesg").run()?;
    Ok(said.out().lines().filter(|line| line.contains("passt") && line.contains("segfault")).count())
}

/// Once more where passt has broken, but not for ever.
fn despite_passt(ctx: &Ctx<'_, Inside>, body: impl Fn(&Ctx<'_, Inside>) -> Result<()>) -> Result<Outcome> {
    for _ in 0..3 {
        let before = faults(ctx)?;
        match body(ctx) {
            Err(error) if faults(ctx)? > before => ctx.note(format!("passt has broken: {error:#}")),
            other => return other.map(|()| Outcome::Passed),
        }
    }
    anyhow::bail!("passt has broken three times")
}

fn leased(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    despite_passt(ctx, lease)
}

fn lease(ctx: &Ctx<'_, Inside>) -> Result<()> {
    let api = ctx.world.api()?;
    let _allowed = Configured::with(ALLOW)?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    cabled.inside(&format!("ip route add default via {} dev eth3", HOST[0]))?;
    cabled.inside(&format!("ip -6 route add default via {} dev eth3", HOST[1]))?;
    let (one, other) = (Place::new("passt")?, Place::new("passt-again")?);
    let passt = Passt::start(ctx, &cabled, &one)?;
    let (edit, process) = (behind(ctx, &passt.address()), serves());
    let mut task = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &["sh", "-c", &process], &edit)?;
    is_empty_outside(ctx, &task)?;
    task.container.start()?;
    task.stdout.read_until("listening\n", A_WHILE)?;
    let [own, _] = CABLE.inside();
    let all = |ctx: &Ctx<'_, Inside>, task: &Piped<'_>| -> Result<()> {
        says(ctx, task, "ip -o -4 address show dev eth0", &format!("inet {own}/24"))?;
        says(ctx, task, "ip -4 route", &format!("default via {}", HOST[0]))?;
        through(own)?;
        datagrams(own, &[1, 1400, 9000])?;
        out(ctx, task, HOST[0])?;
        Ok(())
    };
    all(ctx, &task)?;
    // passt's own answer to who solicits for a router.
    let v6 =
        says(ctx, &task, "ip -o -6 address show dev eth0 scope global | grep -v tentative", "inet6 fd77:3:")?;
    ctx.note(v6);
    says(ctx, &task, "ip -6 route", "default via fe80:")?;
    out(ctx, &task, HOST[1])?;

    // Whoever goes on from there is behind another, as this one has one client.
    let checkpoint = task.container.checkpoint(true)?;
    let code = task.container.wait(A_WHILE)?;
    drop(passt);
    let passt = Passt::start(ctx, &cabled, &other)?;
    let edit = behind(ctx, &passt.address());
    let again = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &["sh", "-c", &process], &edit)?;
    again.container.start()?;
    all(ctx, &again)?;
    finish(again)?;
    drop(checkpoint);
    task.end(code)
}

/// Ends it, and deletes it.
pub fn finish(task: Piped<'_>) -> Result<()> {
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)
}

fn given_and_ended(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    despite_passt(ctx, given_and_killed)
}

fn given_and_killed(ctx: &Ctx<'_, Inside>) -> Result<()> {
    let api = ctx.world.api()?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    cabled.inside(&format!("ip route add default via {} dev eth3", HOST[0]))?;
    cabled.inside(&format!("ip -6 route add default via {} dev eth3", HOST[1]))?;
    let place = Place::new("passt")?;
    let passt = Passt::start(ctx, &cabled, &place)?;
    let ([own4, own6], [host4, host6]) = (CABLE.inside(), HOST);
    let text = format!(
        "{ALLOW}[network]\nsocket = \"{}\"\naddress = \"{own4}/24,{own6}/64\"\ngateway = \"{host4},{host6}\"\n",
        passt.address()
    );
    let _configured = Configured::with(&text)?;
    let mut task = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &["sh", "-c", &serves()], |spec| {
        behind(ctx, &passt.address())(spec);
    })?;
    task.container.start()?;
    task.stdout.read_until("listening\n", A_WHILE)?;
    says(ctx, &task, "ip -o -4 address show dev eth0", &format!("inet {own4}/24"))?;
    says(ctx, &task, "ip -4 route", &format!("default via {host4}"))?;
    through(own4)?;
    // passt takes no pieces of larger ones, and nobody has said another MTU here.
    datagrams(own4, &[1, 1400])?;
    for host in HOST {
        out(ctx, &task, host)?;
    }
    says(ctx, &task, "cat /sys/class/net/eth0/carrier", "1")?;
    passt.kill()?;
    says(ctx, &task, "cat /sys/class/net/eth0/carrier", "0")?;
    let _passt = Passt::start(ctx, &cabled, &place)?;
    says(ctx, &task, "cat /sys/class/net/eth0/carrier", "1")?;
    through(own4)?;
    finish(task)
}

/// What the client is told of a container with this network.
fn refused(ctx: &Ctx<'_, Inside>, socket: &str, edit: impl Fn(&mut Value)) -> Result<String> {
    let api = ctx.world.api()?;
    let made = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &["true"], |spec| {
        annotate(spec, "network", socket);
        edit(spec);
    });
    match made {
        Err(error) => {
            let text = format!("{error:#}");
            ctx.note(&text);
            Ok(text)
        }
        Ok(task) => {
            finish(task)?;
            anyhow::bail!("a container was made behind {socket}")
        }
    }
}

fn wrong(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let path = |name: &str| ctx.path(name).display().to_string();
    let told = refused(ctx, "stream:/run/nothing", |_| {})?;
    ensure!(told.contains("annotations.allow"), "{told}");
    let _allowed = Configured::with(ALLOW)?;
    fs::write(ctx.path("file"), "")?;
    drop(UnixListener::bind(ctx.path("left"))?);
    let _datagram = UnixDatagram::bind(ctx.path("datagram"))?;
    for (socket, says) in [
        (format!("stream:{}", path("gone")), "there is no such path; start who listens on it"),
        (format!("datagram:{}", path("gone")), "gvproxy"),
        (format!("stream:{}", path("file")), "it is no socket"),
        (format!("stream:{}", path("left")), "nobody listens on it"),
        (format!("stream:{}", path("datagram")), "write datagram:"),
        (path("gone"), "it is `stream:/path` or `datagram:/path`"),
    ] {
        let told = refused(ctx, &socket, |_| {})?;
        ensure!(told.contains(says) && told.contains(&socket), "of {socket}: {told}");
    }
    // Who takes frames and answers none.
    for socket in [format!("datagram:{}", path("datagram")), silent(&ctx.path("stream"))?] {
        let told = refused(ctx, &socket, |_| {})?;
        ensure!(told.contains("no DHCP server") && told.contains("network.address"), "of {socket}: {told}");
    }
    let cabled = Cabled::new(ctx)?;
    let told = refused(ctx, "stream:/run/any", |spec| enter(spec, &cabled.path))?;
    ensure!(told.contains("network.socket") && told.contains(&cabled.path), "{told}");
    Ok(Outcome::Passed)
}

/// A stream on which somebody reads what one client says, and says nothing.
fn silent(path: &Path) -> Result<String> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            drop(listener);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
    Ok(format!("stream:{}", path.display()))
}
