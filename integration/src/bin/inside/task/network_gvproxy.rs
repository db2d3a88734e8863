//! Containers whose network is gvproxy's, which desktops have.

use std::fs;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use integration::command::Running;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};
use nix::sys::signal::Signal;
use serde_json::json;

use super::network::{Cabled, PORT, out, plug, through_proxy};
use super::network_socket::{ALLOW, CABLE, behind, finish, says};
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-gvproxy",
        "a container whose network is gvproxy's gets an address of its, reaches a host through it, and is reached by a port that \
         gvproxy was told to expose, also after gvproxy was killed and another has taken its place",
        proxied,
    )]
}

/// gvproxy in a network namespace.
struct Gvproxy {
    running: Running,
    socket: PathBuf,
    services: PathBuf,
}

impl Gvproxy {
    fn start(ctx: &Ctx<'_, Inside>, cabled: &Cabled<'_>) -> Result<Self> {
        let (socket, services, resolv) = (ctx.path("gvproxy"), ctx.path("services"), ctx.path("resolv.conf"));
        for left in [&socket, &services] {
            let _ = fs::remove_file(left);
        }
        // It wants to know of a resolver, and asks it nothing here.
        fs::write(&resolv, format!("nameserver {}\n", CABLE.outside()[0]))?;
        let script = "mount --bind \"$1\" /etc/resolv.conf && exec gvproxy -listen-qemu \"unix://$2\" -listen \"unix://$3\"";
        let running = ctx
            .cmd("nsenter")
            .args([&format!("--net={}", cabled.path), "unshare", "--mount", "sh", "-c", script, "sh"])
            .args([&resolv, &socket, &services])
            .start()?;
        until("gvproxy to listen", A_WHILE, || {
            if socket.exists() && services.exists() {
                return Attempt::Done(());
            }
            Attempt::Pending(String::from_utf8_lossy(&running.stderr_so_far()).into_owned())
        })?;
        Ok(Self { running, socket, services })
    }

    /// Has it send on what comes to the port at `local`.
    fn expose(&self, local: IpAddr, remote: &str) -> Result<()> {
        let body =
            json!({ "local": format!("{local}:{PORT}"), "remote": format!("{remote}:{PORT}") }).to_string();
        let mut services = UnixStream::connect(&self.services).context("connecting to gvproxy's services")?;
        services.set_read_timeout(Some(A_WHILE))?;
        write!(
            services,
            "POST /services/forwarder/expose HTTP/1.1\r\nHost: gvproxy\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        services.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "gvproxy said {answer}");
        Ok(())
    }

    fn kill(self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait()?;
        Ok(())
    }
}

fn proxied(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    let _allowed = Configured::with(ALLOW)?;
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &CABLE)?;
    let ([own, _], [host, _]) = (CABLE.inside(), CABLE.outside());
    let gvproxy = Gvproxy::start(ctx, &cabled)?;
    let edit = behind(ctx, &format!("stream:{}", gvproxy.socket.display()));
    let process = format!("nc -ll -p {PORT} -e cat");
    let task = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &["sh", "-c", &process], &edit)?;
    task.container.start()?;
    // A network that goes takes what was exposed, and the leases, with it.
    let goes = |gvproxy: &Gvproxy| -> Result<()> {
        let said = says(ctx, &task, "ip -o -4 address show dev eth0", "inet 192.168.127.")?;
        let mut words = said.split_whitespace().skip_while(|word| *word != "inet").skip(1);
        let address = words.next().and_then(|word| word.split('/').next()).context("an address")?;
        says(ctx, &task, "ip -4 route", "default via 192.168.127.1")?;
        gvproxy.expose(own, address)?;
        through_proxy(own)?;
        out(ctx, &task, host)
    };
    goes(&gvproxy)?;
    gvproxy.kill()?;
    says(ctx, &task, "cat /sys/class/net/eth0/carrier", "0")?;
    let gvproxy = Gvproxy::start(ctx, &cabled)?;
    says(ctx, &task, "cat /sys/class/net/eth0/carrier", "1")?;
    goes(&gvproxy)?;
    finish(task)?;
    gvproxy.kill()?;
    Ok(Outcome::Passed)
}
