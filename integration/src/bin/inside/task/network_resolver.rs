//! A resolver on a loopback address of a container's network namespace, as docker has one for its networks.

use std::fs;

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::network::{Cabled, enter};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![test(
        "task.network-resolver",
        "a resolver on a loopback address of the namespace, which resolv.conf names, answers questions by UDP and by TCP, \
         several at once, as with runc; port 53 is the container's own; what resolv.conf does not name is not asked",
        resolver,
    )]
}

/// Answers every question for a v4 address with 10.9.8.7, and whoever comes by TCP with what he says.
const RESOLVER: &str = r#"
import socket, sys, threading
def tcp(listener):
    while True:
        s, _ = listener.accept()
        s.sendall(b"by TCP: " + s.recv(99))
        s.close()
listener = socket.create_server((sys.argv[1], 53))
threading.Thread(target=tcp, args=(listener,), daemon=True).start()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((sys.argv[1], 53))
print("serves", flush=True)
while True:
    q, a = udp.recvfrom(9999)
    end = q.index(0, 12) + 5
    one = q[end - 4:end - 2] == b"\0\1"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\7\0\4\x0a\x09\x08\x07" if one else b""
    udp.sendto(q[:2] + b"\x81\x80\0\1" + (b"\0\1" if one else b"\0\0") + bytes(4) + q[12:end] + answer, a)
"#;

/// Which it asks, of what its file names.
const NAMED: &str = "127.0.0.53";
const OTHER: &str = "127.0.0.54";

const SCRIPT: &str =
    "for i in 1 2 3 4 5 6 7 8; do nslookup -type=a name$i.test 2>&1 | grep 10.9.8.7 & done; wait
    echo question | nc 127.0.0.53 53";
/// Asks a resolver that its file does not name, and serves on port 53 itself.
const OWN: &str = "nslookup -type=a name.test 127.0.0.54 >/dev/null 2>&1; echo other $?
    mkdir /www; echo page >/www/page; httpd -p 53 -h /www; wget -qO- http://127.0.0.1:53/page
    echo question | nc 127.0.0.53 53";

fn resolver(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let api = ctx.world.api()?;
    let file = ctx.path("resolv.conf");
    fs::write(&file, format!("search test\nnameserver {NAMED}\n"))?;
    let said = |runtime: &str, script: &str| -> Result<String> {
        let cabled = Cabled::new(ctx)?;
        cabled.inside("ip link set lo up")?;
        let mut serving = Vec::new();
        for address in [NAMED, OTHER] {
            let enter = format!("--net={}", cabled.path);
            let words = [&enter, "python3", "-c", RESOLVER, address];
            let mut one = ctx.cmd("nsenter").args(words).start()?;
            one.until_stdout_has("serves", A_WHILE)?;
            serving.push(one);
        }
        let edit = |spec: &mut Value| {
            enter(spec, &cabled.path);
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(json!({
                    "destination": "/etc/resolv.conf", "type": "bind", "source": file, "options": ["bind", "ro"],
                }));
            }
        };
        let mut task = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", script], edit)?;
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        let said = String::from_utf8_lossy(&task.stdout.read_to_end(A_WHILE)?).into_owned();
        task.end(code)?;
        Ok(said)
    };
    let (runc, ours) = (said(RUNC, SCRIPT)?, said(OURS, SCRIPT)?);
    ensure!(runc == ours, "a container is told {ours:?}, with runc {runc:?}");
    ensure!(runc.matches("10.9.8.7").count() == 8 && runc.ends_with("by TCP: question\n"), "{runc:?}");
    let own = said(OURS, OWN)?;
    ensure!(own == "other 1\npage\nby TCP: question\n", "{own:?}");
    Ok(Outcome::Passed)
}
