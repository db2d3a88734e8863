//! Packets between guest and host.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::command::Cmd;
use integration::guest::{Guest, Session};
use integration::streams::{Ask, PIECE, ask, taken};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test, pattern, process};

use super::{A_MOMENT, boot, initrd_with_part, up};
use crate::world::Inside;

const MIB: u64 = 1 << 20;
const PORT: u16 = 5000;
/// Ethernet's, which all taps begin with.
const MTU: u64 = 1500;
/// Without the segmentation of large packets by whoever sees them last, none is longer than the MTU.
const LARGE: u64 = 2 * MTU;
/// The host's, with the guest's devices.
const ETHTOOL: &str = "chroot /h /usr/sbin/ethtool";

pub fn tests() -> Vec<Test<Inside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        deadline: Duration::from_mins(40),
        rounds: Rounds::once_or(1),
        tags: &[],
    };
    vec![
        test(
            "vmm.net",
            "TCP carries 2 GiB (16 MiB for every change) each way unharmed through a tap, in large writes, \
             which travel in large packets, and in small ones; a tap of two queues uses both; one with limits \
             keeps them; a tap that goes is a cable that falls out",
            |ctx| run(ctx, By::Monitor),
        ),
        test(
            "vmm.net-vhost",
            "the same, but for limits, while the host's kernel moves the packets, and while the guest is paused and \
             goes on",
            |ctx| run(ctx, By::Kernel),
        ),
    ]
}

/// Who moves packets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Monitor,
    /// By vhost-net.
    Kernel,
}

/// A tap of this test's own. Host and guest have the addresses 1 and 2 of its network.
struct Tap {
    name: String,
    network: u8,
}

impl Tap {
    fn make(ctx: &Ctx<'_, Inside>, network: u8, queues: u32) -> Result<Self> {
        let tap = Self { name: format!("it{}-{network}", std::process::id()), network };
        let ip = |words: &[&str]| ctx.cmd("ip").args(words).ok();
        let queues: &[&str] = if queues > 1 { &["multi_queue"] } else { &[] };
        ip(&[&["tuntap", "add", "dev", &tap.name, "mode", "tap"], queues].concat())?;
        ip(&["address", "add", &format!("{}/24", tap.host()), "dev", &tap.name])?;
        ip(&["link", "set", "dev", &tap.name, "up"])?;
        Ok(tap)
    }

    fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, self.network, 1)
    }

    fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, self.network, 2)
    }

    /// Packets that went through, as bytes and their number. What the guest sends, the tap receives.
    fn counts(&self, from_guest: bool) -> Result<(u64, u64)> {
        let count = |what: &str| -> Result<u64> {
            let direction = if from_guest { "rx" } else { "tx" };
            let path = format!("/sys/class/net/{}/statistics/{direction}_{what}", self.name);
            Ok(fs::read_to_string(&path).with_context(|| format!("reading {path}"))?.trim().parse()?)
        };
        Ok((count("bytes")?, count("packets")?))
    }

    fn remove(&self) -> Result<()> {
        Cmd::new("ip", A_MOMENT).args(["link", "delete", "dev", &self.name]).ok()?;
        Ok(())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if Path::new("/sys/class/net").join(&self.name).exists()
            && let Err(error) = self.remove()
        {
            eprintln!("{error:#}");
        }
    }
}

fn run(ctx: &mut Ctx<'_, Inside>, by: By) -> Result<Outcome> {
    let vhost = if by == By::Kernel { ",vhost" } else { "" };
    let (plain, wide, slow) = (Tap::make(ctx, 201, 1)?, Tap::make(ctx, 202, 2)?, Tap::make(ctx, 203, 1)?);
    let machine = boot(ctx, "g")
        .controlled()
        .options(["--cpus", "2", "--tap", &format!("{}{vhost}", plain.name)])
        .options(["--tap", &format!("{}:2{vhost}", wide.name)])
        .options(["--tap", &format!("{},rx=1M,tx=1M", slow.name)])
        .share("host", Path::new("/"), true);
    let mut guest = up(ctx, machine, &initrd_with_part(ctx)?)?;
    guest.sh(
        "mkdir /h; mount -t virtiofs -o ro host /h; mount --rbind /dev /h/dev; mount -t proc proc /h/proc; \
         mount -t sysfs sysfs /h/sys",
        A_MOMENT,
    )?;
    for (device, tap) in [("eth0", &plain), ("eth1", &wide), ("eth2", &slow)] {
        // Its router's questions for neighbours would be packets that nobody here has sent.
        let script = format!(
            "echo 1 > /proc/sys/net/ipv6/conf/{device}/disable_ipv6; ip address add {}/24 dev {device}; \
             ip link set {device} up; ping -c 3 -i 0.2 -W 10 {}",
            tap.guest(),
            tap.host()
        );
        guest.sh(&script, A_MOMENT)?;
        ctx.cmd("ping").args(["-c", "3", "-i", "0.2", "-W", "10", &tap.guest().to_string()]).ok()?;
    }
    offloads(&guest)?;
    let _serving = serve(&guest, ctx.left(), PORT, "3")?;
    streams(ctx, &plain)?;
    queues(ctx, &guest, &wide, by)?;
    match by {
        By::Monitor => {
            limited(ctx, &slow)?;
            counted(&guest)?;
        }
        By::Kernel => handed_back(ctx, &guest, &plain)?,
    }
    removed(&mut guest, &plain, &wide)?;
    let done = guest.power_off()?.expect_code(0)?;
    ensure!(
        done.err().lines().all(|line| line.contains("tap")),
        "the monitor complained of more than a tap: {}",
        done.err()
    );
    Ok(Outcome::Passed)
}

/// Answers TCP in the guest on the processors of `mask`.
fn serve(guest: &Guest, within: Duration, port: u16, mask: &str) -> Result<Session> {
    let port = port.to_string();
    let mut serving = guest.begin(["taskset", mask, "guest-part", "serve-tcp", &port], within)?;
    serving.until_stdout_has("listening")?;
    Ok(serving)
}

/// What drivers leave to the device, and it to the tap.
fn offloads(guest: &Guest) -> Result<()> {
    let told = guest.sh(&format!("{ETHTOOL} -k eth0"), A_MOMENT)?;
    for feature in [
        "tx-checksumming",
        "rx-checksumming",
        "scatter-gather",
        "tx-tcp-segmentation",
        "tx-tcp6-segmentation",
        "tx-tcp-ecn-segmentation",
    ] {
        let on = told.lines().any(|line| line.trim().starts_with(&format!("{feature}: on")));
        ensure!(on, "{feature} is not on:\n{told}");
    }
    // The driver leaves it to the user, where the device has it.
    let datagrams = told.lines().any(|line| line.trim() == "tx-udp-segmentation: off");
    ensure!(datagrams, "datagrams cannot be segmented:\n{told}");
    Ok(())
}

fn connect(ctx: &Ctx<'_, Inside>, tap: &Tap, port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from((tap.guest(), port));
    let stream =
        TcpStream::connect_timeout(&address, A_MOMENT).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ctx.left()))?;
    stream.set_write_timeout(Some(ctx.left()))?;
    Ok(stream)
}

/// A pattern to the guest, in writes of sizes that `next` says.
fn give(stream: &TcpStream, seed: u64, length: u64, next: impl FnMut() -> usize) -> Result<()> {
    ask(stream, Ask::Take, seed, length)?;
    pattern::send_in_pieces(stream, seed, length, next)?;
    Ok(taken(stream)?)
}

/// A pattern from the guest, and nothing behind it.
fn take(mut stream: &TcpStream, what: Ask, seed: u64, length: u64) -> Result<()> {
    ask(stream, what, seed, length)?;
    pattern::receive(stream, seed, length)?;
    ensure!(stream.read(&mut [0])? == 0, "more came than was asked for");
    Ok(())
}

/// One piece at a time: neither kernel can put several into a packet.
fn echo(mut stream: &TcpStream, pieces: u64) -> Result<()> {
    ask(stream, Ask::Echo, 0, 0)?;
    let mut size = pattern::sizes(7, PIECE - 100);
    for seed in 0..pieces {
        let piece = pattern::bytes(seed, size());
        let mut back = vec![0; piece.len()];
        stream.write_all(&piece)?;
        stream.read_exact(&mut back).with_context(|| format!("piece {seed}, of {} bytes", piece.len()))?;
        ensure!(back == piece, "piece {seed}, of {} bytes, came back as another", piece.len());
    }
    Ok(())
}

fn streams(ctx: &Ctx<'_, Inside>, tap: &Tap) -> Result<()> {
    let length = ctx.either(16, 2048) * MIB;
    let small = ctx.either(1, 128) * MIB;
    let step = |name: &str, from_guest, length: u64, go: &dyn Fn(&TcpStream) -> Result<()>| {
        let (begun, before) = (Instant::now(), tap.counts(from_guest)?);
        connect(ctx, tap, PORT).and_then(|stream| go(&stream)).with_context(|| name.to_owned())?;
        let after = tap.counts(from_guest)?;
        let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
        ensure!(bytes >= length, "{name}: the tap saw {bytes} bytes of {length}");
        let mean = bytes / packets.max(1);
        let seconds = begun.elapsed().as_secs_f64();
        ctx.note(format!("{name}: {} KiB in {seconds:.2} s, {mean} bytes a packet", length >> 10));
        Ok(mean)
    };
    let mean = step("large writes to the guest", false, length, &|stream| {
        give(stream, 1, length, || pattern::CHUNK)
    })?;
    ensure!(mean > LARGE, "packets to the guest are cut up: {mean} bytes each");
    let mean =
        step("large writes from the guest", true, length, &|stream| take(stream, Ask::Give, 2, length))?;
    ensure!(mean > LARGE, "packets from the guest are cut up: {mean} bytes each");
    step("small writes to the guest", false, small, &|stream| {
        give(stream, 3, small, pattern::sizes(3, PIECE))
    })?;
    step("small writes from the guest", true, small, &|stream| take(stream, Ask::GivePieces, 4, small))?;
    let pieces = ctx.either(200, 20_000);
    let mean = step("small packets there and back", false, pieces, &|stream| echo(stream, pieces))?;
    ensure!(mean < MTU, "they travelled together: {mean} bytes each");
    Ok(())
}

/// What the monitor's threads called `name` have read and written so far, in bytes.
fn moved(pid: i32, name: &str) -> Result<[u64; 2]> {
    let mut moved = [0; 2];
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.trim() == name {
            let text = fs::read_to_string(task.join("io"))?;
            for (sum, key) in moved.iter_mut().zip(["rchar: ", "wchar: "]) {
                let line = text.lines().find_map(|line| line.strip_prefix(key));
                *sum += line.with_context(|| format!("no {key} in {text}"))?.parse::<u64>()?;
            }
        }
    }
    Ok(moved)
}

/// Each processor of the guest sends by a queue of its own, and is answered by it: each pair of queues is a
/// thread of the monitor's, which has nothing to do when the kernel moves the packets.
fn queues(ctx: &Ctx<'_, Inside>, guest: &Guest, tap: &Tap, by: By) -> Result<()> {
    const LENGTH: u64 = 2 * MIB;
    let _serving = [(PORT + 1, "1"), (PORT + 2, "2")]
        .map(|(port, mask)| serve(guest, ctx.left(), port, mask))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let pairs = ["net0", "net1"];
    let before = pairs.map(|name| moved(guest.pid(), name));
    for (seed, port) in [(5, PORT + 1), (6, PORT + 2)] {
        take(&connect(ctx, tap, port)?, Ask::Give, seed, LENGTH)?;
        give(&connect(ctx, tap, port)?, seed, LENGTH, || pattern::CHUNK)?;
    }
    for (name, before) in pairs.into_iter().zip(before) {
        let (before, after) = (before?, moved(guest.pid(), name)?);
        let moved = [after[0] - before[0], after[1] - before[1]];
        ctx.note(format!("{name}: {} bytes to the guest, {} from it", moved[0], moved[1]));
        // How the streams are spread is up to both kernels; that they are is not.
        let right = match by {
            By::Monitor => moved.iter().all(|bytes| *bytes > LENGTH / 256),
            By::Kernel => moved.iter().all(|bytes| *bytes < 4096),
        };
        ensure!(right, "{name} has moved {moved:?} bytes");
    }
    Ok(())
}

/// A stream survives that the queues go from the kernel to the monitor, and back, with whatever is in them.
fn handed_back(ctx: &Ctx<'_, Inside>, guest: &Guest, tap: &Tap) -> Result<()> {
    const LENGTH: u64 = 8 * MIB;
    let threads = || -> Result<usize> {
        let names = fs::read_dir(format!("/proc/{}/task", guest.pid()))?
            .map(|task| Ok(fs::read_to_string(task?.path().join("comm"))?))
            .collect::<Result<Vec<_>>>()?;
        Ok(names.iter().filter(|name| name.starts_with("vhost-")).count())
    };
    ensure!(threads()? == 3, "{} threads of the kernel's serve three pairs of queues", threads()?);
    let times = ctx.either(5, 100);
    std::thread::scope(|scope| -> Result<()> {
        let stream = scope.spawn(|| -> Result<u64> {
            let (mut carried, end) = (0, Instant::now() + Duration::from_secs(2));
            loop {
                take(&connect(ctx, tap, PORT)?, Ask::Give, 11, LENGTH)?;
                give(&connect(ctx, tap, PORT)?, 12, LENGTH, || pattern::CHUNK)?;
                carried += 2 * LENGTH;
                if Instant::now() > end {
                    return Ok(carried);
                }
            }
        });
        let mut done = 0;
        while done < times || !stream.is_finished() {
            guest.ctl(["pause"])?;
            guest.ctl(["resume"])?;
            std::thread::sleep(Duration::from_millis(30));
            done += 1;
        }
        let carried = stream.join().map_err(|_| anyhow::anyhow!("the stream panicked"))??;
        ctx.note(format!("{} KiB while the guest was paused {done} times", carried >> 10));
        Ok(())
    })
}

/// At a MiB a second, the first of which may come at once.
fn limited(ctx: &Ctx<'_, Inside>, tap: &Tap) -> Result<()> {
    const LENGTH: u64 = 4 * MIB;
    let timed = |name: &str, go: &dyn Fn(&TcpStream) -> Result<()>| -> Result<()> {
        let begun = Instant::now();
        connect(ctx, tap, PORT).and_then(|stream| go(&stream)).with_context(|| name.to_owned())?;
        let seconds = begun.elapsed().as_secs_f64();
        ctx.note(format!("{name}: {} KiB in {seconds:.2} s", LENGTH >> 10));
        ensure!((2.5..40.0).contains(&seconds), "{name}: 4 MiB took {seconds:.2} s at a MiB a second");
        Ok(())
    };
    timed("to the guest, limited", &|stream| give(stream, 8, LENGTH, || pattern::CHUNK))?;
    timed("from the guest, limited", &|stream| take(stream, Ask::Give, 9, LENGTH))
}

/// The monitor's own counters have seen it.
fn counted(guest: &Guest) -> Result<()> {
    let stats = guest.stats()?;
    let devices = stats["devices"].as_array().context("statistics without devices")?;
    for id in ["net.0", "net.1"] {
        let device = devices.iter().find(|device| device["id"] == id);
        let device = device.with_context(|| format!("{id} is not among {devices:?}"))?;
        let count = |what: &str| device[what].as_u64().unwrap_or(0);
        ensure!(
            device["kind"] == 1
                && count("requests") > 100
                && count("written") > MIB
                && count("interrupts") > 10,
            "{id} has counted {device}"
        );
    }
    Ok(())
}

fn removed(guest: &mut Guest, plain: &Tap, wide: &Tap) -> Result<()> {
    let carrier = |guest: &Guest, device: &str| {
        guest.sh(&format!("cat /sys/class/net/{device}/carrier"), A_MOMENT).map(|told| told.trim() == "1")
    };
    ensure!(carrier(guest, "eth0")?, "the cable of eth0 is out");
    plain.remove()?;
    until("the cable to fall out", A_MOMENT, || match carrier(guest, "eth0") {
        Ok(false) => Attempt::Done(()),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    // What the guest still sends goes nowhere, and stops nobody.
    guest.sh(&format!("ping -c 2 -i 0.2 -W 1 {} || true", plain.host()), A_MOMENT)?;
    guest.sh(&format!("ping -c 2 -i 0.2 -W 10 {}", wide.host()), A_MOMENT)?;
    ensure!(carrier(guest, "eth1")? && !guest.has_ended(), "the other tap has gone too");
    let spent = || -> Result<u64> { Ok(process::cpu_ticks(guest.pid())?) };
    let before = spent()?;
    std::thread::sleep(Duration::from_secs(2));
    let ticks = spent()? - before;
    ensure!(ticks < 100, "without its tap the monitor takes {ticks} of 200 ticks");
    Ok(())
}
