//! Containers that are written down and go on elsewhere, again and again, while they are at work.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};
use serde_json::{Value, json};

use super::files::{add, bind};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    let long = |name, proves, run| Test {
        deadline: Duration::from_mins(90),
        rounds: Rounds::once_or(1),
        ..test(name, proves, run)
    };
    vec![
        long(
            "task.checkpoint-rounds",
            "a container on a terminal that forks, sleeps, has a removed file open and bytes on their way between sockets, \
             under load, goes on elsewhere twice (100 times in a soak), and each of its steps is right and comes once",
            |ctx| busy(ctx, ctx.either(2, 100)),
        ),
        long(
            "task.checkpoint-redis",
            "a redis-server goes on elsewhere (100 times in a soak), and each answer to its client is right",
            |ctx| redis(ctx, ctx.either(1, 100)),
        ),
        long(
            "task.checkpoint-python",
            "so does a web server in Python, with a client that stays connected",
            |ctx| python(ctx, ctx.either(1, 100)),
        ),
    ]
}

/// Steps that are seen in each place.
const STEPS: usize = 5;

/// What works, and says a line for each step, of which this is the first word.
struct Work<'a> {
    process: &'a [&'a str],
    word: &'a str,
    terminal: bool,
    mounts: Vec<Value>,
}

/// Has it go on elsewhere so often. Its lines are numbered.
fn goes_on(ctx: &mut Ctx<'_, Inside>, work: &Work<'_>, times: u32) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let edit = |spec: &mut Value| {
        spec["process"]["terminal"] = json!(work.terminal);
        add(spec, work.mounts.iter().cloned());
    };
    let mut task = Piped::new(ctx, &api, OURS, work.process, edit)?;
    task.container.start()?;
    let (mut said, mut steps) = (Vec::new(), 0);
    for time in 0..=times {
        let until = format!("{} {}", work.word, steps + STEPS);
        let seen = task.stdout.read_until(&until, A_WHILE);
        said.extend(seen.with_context(|| {
            let errors = task.stderr.read_until("\n", Duration::from_secs(1)).unwrap_or_default();
            format!("after {time} rounds: {}", String::from_utf8_lossy(&errors))
        })?);
        if time == times {
            break;
        }
        let checkpoint = task.container.checkpoint(true)?;
        said.extend(task.stdout.read_to_end(A_WHILE)?);
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 137, "round {time}: a container that is to end ended with {code}");
        let next = Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), work.process, edit)
            .with_context(|| format!("round {time}"))?;
        next.container.start()?;
        drop(checkpoint);
        std::mem::replace(&mut task, next).end(code)?;
        steps = numbered(work.word, &said).with_context(|| format!("round {time}"))?;
    }
    ctx.note(format!("{} steps in {} places", numbered(work.word, &said)?, times + 1));
    task.container.kill(9)?;
    let code = task.container.wait(A_WHILE)?;
    task.end(code)?;
    Ok(Outcome::Passed)
}

/// How many whole lines there are, if each is the one that was to come.
fn numbered(word: &str, said: &[u8]) -> Result<usize> {
    let text = String::from_utf8_lossy(said);
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut count = 0;
    for line in whole.lines() {
        count += 1;
        let line = line.trim_end();
        ensure!(line == format!("{word} {count}"), "line {count} is {line:?}");
    }
    Ok(count)
}

fn busy(ctx: &mut Ctx<'_, Inside>, times: u32) -> Result<Outcome> {
    let data = ctx.path("data");
    fs::create_dir(&data)?;
    let mounts =
        vec![bind(&ctx.world.guest_part, "/part", &["bind", "ro"]), bind(&data, "/data", &["rbind", "rw"])];
    let work =
        Work { process: &["sh", "-c", "/part busy /data; exit 1"], word: "step", terminal: true, mounts };
    goes_on(ctx, &work, times)
}

/// What the host has installed, for a container to run.
fn installed() -> Vec<Value> {
    let places = ["/usr", "/lib", "/lib64"].into_iter().filter(|place| fs::metadata(place).is_ok());
    places.map(|place| bind(place.as_ref(), place, &["rbind", "ro"])).collect()
}

/// Each answer is the number of the question.
const REDIS: &str = "export PATH=/usr/bin:$PATH
    redis-server --port 6379 --save '' --appendonly no --loglevel warning >/dev/null &
    until [ \"$(redis-cli ping 2>/dev/null)\" = PONG ]; do sleep 0.1; done
    while :; do n=$((n + 1)); echo answer $(redis-cli incr counter)
        [ $((n % 7)) != 0 ] || [ \"$(redis-cli get counter)\" = $n ] || exit 1
    done";

fn redis(ctx: &mut Ctx<'_, Inside>, times: u32) -> Result<Outcome> {
    let work = Work { process: &["sh", "-c", REDIS], word: "answer", terminal: false, mounts: installed() };
    goes_on(ctx, &work, times)
}

/// Asks for what only the server can know, over one connection.
const PYTHON: &str = "
import hashlib, http.client, http.server, threading
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    asked = 0
    def do_GET(self):
        Answers.asked += 1
        body = (self.path + ' ' + str(Answers.asked)).encode()
        body = hashlib.sha256(body).hexdigest().encode() * 100
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 8080), Answers)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = http.client.HTTPConnection('127.0.0.1', 8080)
number = 0
while True:
    number += 1
    path = '/' + 'x' * (number % 100)
    client.request('GET', path)
    got = client.getresponse().read()
    assert got == hashlib.sha256((path + ' ' + str(number)).encode()).hexdigest().encode() * 100, got
    print('answer', number, flush=True)
";

fn python(ctx: &mut Ctx<'_, Inside>, times: u32) -> Result<Outcome> {
    let process = ["/usr/bin/python3", "-S", "-c", PYTHON];
    let work = Work { process: &process, word: "answer", terminal: false, mounts: installed() };
    goes_on(ctx, &work, times)
}
