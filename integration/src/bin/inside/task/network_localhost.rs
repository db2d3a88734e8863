//! Localhost of a container, from its network namespace: that is how ports are forwarded to a pod.

use anyhow::{Result, ensure};
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Test};

use super::network::{Cable, Cabled, enter, plug};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-localhost",
        "who listens on localhost of a container answers whoever connects to localhost of its namespace, v4 and v6, as with \
         runc; the container does not reach localhost of its namespace, nor of the host",
        localhost,
    )]
}

/// Serves a page on localhost alone, and prints what those say who are asked for a page, by each line of input.
const SCRIPT: &str = "mkdir /www; head -c 1000000 /dev/zero | tr '\\0' x >/www/page
    httpd -p 127.0.0.1:8000 -h /www; httpd -p '[::1]:8000' -h /www; echo ready
    while read url; do wget -qO- -T 10 $url >/dev/null 2>&1; echo \"$url: $?\"; done";

fn localhost(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let cabled = Cabled::new(ctx)?;
        let _cable = plug(ctx, &cabled.path, &Cable { number: 0, mac: "02:77:00:00:00:01", mtu: 1500 })?;
        let edit = |spec: &mut serde_json::Value| enter(spec, &cabled.path);
        let mut task = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", SCRIPT], edit)?;
        task.container.start()?;
        task.stdout.read_until("ready\n", A_WHILE)?;
        let get = |url: &str| cabled.inside(&format!("busybox wget -qO- -T 20 {url}"));
        for url in ["http://127.0.0.1:8000/page", "http://[::1]:8000/page"] {
            // It may have been a moment ago that the task was started.
            let page = until(&format!("{runtime}: {url}"), A_WHILE, || match get(url) {
                Ok(page) => Attempt::Done(page),
                Err(error) => Attempt::Pending(format!("{error:#}")),
            })?;
            ensure!(page.len() == 1_000_000, "{runtime}: {url} has {} bytes", page.len());
        }
        let nobody = get("http://127.0.0.1:8001/page");
        ensure!(nobody.is_err(), "{runtime}: on port 8001 is {nobody:?}");
        if runtime == OURS {
            let enter = format!("--net={}", cabled.path);
            let serve = |address: &str| {
                ["busybox", "httpd", "-f", "-p", address, "-h", "/usr/lib"].map(str::to_owned)
            };
            let _there = ctx.cmd("nsenter").arg(enter).args(serve("127.0.0.2:8002")).start()?;
            let _here = ctx.cmd("busybox").args(&serve("127.0.0.1:8003")[1..]).start()?;
            let page = "os-release";
            let served = |what: &str, look: &dyn Fn() -> Result<String>| {
                until(what, A_WHILE, || match look() {
                    Ok(_) => Attempt::Done(()),
                    Err(error) => Attempt::Pending(format!("{error:#}")),
                })
            };
            served("the namespace's page", &|| get(&format!("http://127.0.0.2:8002/{page}")))?;
            let here = ["wget", "-qO-", "http://127.0.0.1:8003/os-release"];
            served("the host's page", &|| Ok(ctx.cmd("busybox").args(here).ok()?.out().into_owned()))?;
            for at in ["127.0.0.2:8002", "10.77.0.2:8002", "127.0.0.1:8003"] {
                let url = format!("http://{at}/{page}");
                task.stdin.write(format!("{url}\n").as_bytes())?;
                let said = task.stdout.read_until("\n", A_WHILE)?;
                let said = String::from_utf8_lossy(&said).into_owned();
                ensure!(said == format!("{url}: 1\n"), "the container reaches {said:?}");
            }
        }
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}
