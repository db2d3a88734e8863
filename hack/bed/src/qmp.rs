//! The control socket of QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// QEMU answers within this, or it hangs.
const ANSWER: Duration = Duration::from_secs(60);

pub struct Qmp {
    from: BufReader<UnixStream>,
    to: UnixStream,
}

impl Qmp {
    /// Connects to a QEMU that was just started; its socket appears a moment later.
    pub fn connect(socket: &Path, deadline: Instant, mut alive: impl FnMut() -> Result<()>) -> Result<Self> {
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("QEMU's control socket did not appear");
                }
                Err(_) => {
                    alive()?;
                    sleep(Duration::from_millis(2));
                }
            }
        };
        stream.set_read_timeout(Some(ANSWER))?;
        let mut qmp = Self { from: BufReader::new(stream.try_clone()?), to: stream };
        qmp.read()?;
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Calls a command and returns what it returned.
    pub fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.to.write_all(line.as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("without a reason"));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// A command of the human monitor; the text it printed.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let text = self.call("human-monitor-command", &json!({ "command-line": line }))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// Writes the state of the devices of a stopped machine; its memory is in a file of its own.
    pub fn save_devices(&mut self, to: &Path, deadline: Instant) -> Result<()> {
        self.leave_memory_out()?;
        self.call("migrate", &json!({ "uri": format!("file:{}", to.display()) }))?;
        self.wait_for_migration(deadline)
    }

    /// Reads it back into a machine that waits for it, and lets the machine run on.
    pub fn load_devices(&mut self, from: &Path, deadline: Instant) -> Result<()> {
        self.leave_memory_out()?;
        self.call("migrate-incoming", &json!({ "uri": format!("file:{}", from.display()) }))?;
        self.wait_for_migration(deadline)?;
        self.call("cont", &json!({})).map(drop)
    }

    fn leave_memory_out(&mut self) -> Result<()> {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.call("migrate-set-capabilities", &json!({ "capabilities": [capability] })).map(drop)
    }

    fn wait_for_migration(&mut self, deadline: Instant) -> Result<()> {
        loop {
            let status = self.call("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU could not move the state: {status}"),
                _ if Instant::now() > deadline => {
                    bail!("QEMU is still moving the state at the deadline: {status}")
                }
                _ => sleep(Duration::from_millis(3)),
            }
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line).context("waiting for QEMU's answer")? == 0 {
            bail!("QEMU closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
