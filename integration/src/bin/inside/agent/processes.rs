//! What processes do and what becomes of them: codes, words of failure, streams, terminals, signals.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::agent::{CALL, Container, Machine, Streams, config};
use integration::{Ctx, Outcome, Rounds, Test, pattern};
use serde_json::{Value, json};

use super::{expect_error, machine};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "agent.processes",
        proves: "processes beside a container's own have its namespaces, cgroup, user, capabilities and seccomp profile; \
                     what cannot be run is told in runc's words; input, output and terminals carry every byte",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

/// What the steps work in: a machine, and a container that sleeps.
struct At<'a> {
    machine: &'a Machine,
    container: &'a Container<'a>,
    length: usize,
}

type Step = fn(&At<'_>) -> Result<()>;

const STEPS: &[(&str, Step)] = &[
    ("exit codes", exit_codes),
    ("confinement", confinement),
    ("another user", another_user),
    ("what cannot be run", not_run),
    ("input and output", input),
    ("a burst and an exit", burst),
    ("a terminal", terminal),
    ("signals", signals),
    ("a process left behind", left_behind),
    ("orders that make no sense", nonsense),
];

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = machine(ctx)?;
    let mut sleeper = config("c1", &["sleep", "1000000"]);
    sleeper["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }]
    });
    let container = Container::create(&machine, "c1", &sleeper, Streams::default())?;
    let process = container.start(Streams::default())?;
    let at = At { machine: &machine, container: &container, length: ctx.either(8, 64) << 20 };
    for (name, step) in STEPS {
        let begun = std::time::Instant::now();
        step(&at).with_context(|| (*name).to_owned())?;
        ctx.note(format!("{name}: {:.2} s", begun.elapsed().as_secs_f64()));
    }
    machine.signal("c1", "", 9)?;
    ensure!(process.finish(CALL)?.status() == 137, "a killed container ended otherwise");
    container.delete()?;
    machine.ends_well()?;
    Ok(Outcome::Passed)
}

fn process(argv: &[&str]) -> Value {
    config("", argv)["process"].clone()
}

fn exit_codes(at: &At<'_>) -> Result<()> {
    for code in [0, 1, 42, 255] {
        let output =
            at.container.sh("e", &format!("echo out{code}; echo err{code} >&2; exit {code}"), CALL)?;
        ensure!(output.status() == code, "{code} became {}", output.status());
        ensure!(output.out() == format!("out{code}\n"), "{output:?}");
        ensure!(output.stderr == format!("err{code}\n").into_bytes(), "{output:?}");
    }
    Ok(())
}

fn confinement(at: &At<'_>) -> Result<()> {
    let script = "hostname; grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'; \
                  mkdir /tmp/x 2>&1; cat /proc/self/cgroup; for p in self 1; do readlink /proc/$p/ns/pid; done | uniq | wc -l; \
                  echo $HOME; ls /dev/pts | head -n 1; cat /proc/self/oom_score_adj; yes | head -n 1 2>&1; \
                  grep SigIgn /proc/self/status | tr -d '\\t'";
    let own = config("", &["sh", "-c", script])["process"].clone();
    let mut fewer = own.clone();
    let none: [&str; 0] = [];
    fewer["capabilities"] = json!({ "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
        "inheritable": none, "ambient": none });
    for (process, effective) in [(own, "00000000000000eb"), (fewer, "0000000000000020")] {
        let output = at.container.exec("e", &process, Streams::default())?.finish(CALL)?;
        at.machine.delete("c1", "e")?;
        let said = output.out();
        let expected = format!(
            "c1\nCapEff:{effective}\nCapBnd:{effective}\nNoNewPrivs:1\nSeccomp:2\n\
             mkdir: can't create directory '/tmp/x': Operation not permitted\n0::/\n1\n/root\nptmx\n0\ny\nSigIgn:0000000000000000\n"
        );
        ensure!(said == expected, "it is {said}\nand should be {expected}");
    }
    Ok(())
}

fn another_user(at: &At<'_>) -> Result<()> {
    let mut process = process(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; echo $HOME; umask; ulimit -n; pwd; echo x > /dev/stdout",
    ]);
    process["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 63 });
    process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 88 }]);
    process["cwd"] = json!("/tmp");
    let output = at.container.exec("e", &process, Streams::default())?.finish(CALL)?;
    at.machine.delete("c1", "e")?;
    ensure!(output.out() == "1000\n1001\n1001 7 8\n/home/user\n0077\n77\n/tmp\nx\n", "{output:?}");
    Ok(())
}

fn not_run(at: &At<'_>) -> Result<()> {
    for (argv, cwd, words) in [
        (["nothing"], "/", "exec: \"nothing\": executable file not found in $PATH"),
        (["/nothing"], "/", "exec: \"/nothing\": stat /nothing: no such file or directory"),
        (["/etc/plain"], "/", "exec: \"/etc/plain\": permission denied"),
        (["/etc"], "/", "exec: \"/etc\": is a directory"),
        (
            ["true"],
            "/nowhere",
            "chdir to cwd (\"/nowhere\") set in config.json failed: no such file or directory",
        ),
    ] {
        let mut process = process(&argv);
        process["cwd"] = json!(cwd);
        at.container.announce("e", &process, Streams::default())?;
        let _streams = [
            at.machine.attach("c1", "e", agent_api::stdio::Stream::Stdout)?,
            at.machine.attach("c1", "e", agent_api::stdio::Stream::Stderr)?,
        ];
        expect_error(at.machine.start("c1", "e"), "UNKNOWN", words)?;
        at.machine.delete("c1", "e")?;
    }
    for (id, argv) in [("c2", ["nothing"]), ("c3", ["/etc/plain"])] {
        let made = Container::create(at.machine, id, &config(id, &argv), Streams::default()).map(drop);
        expect_error(made, "UNKNOWN", "unable to start container process: exec: ")?;
    }
    Ok(())
}

fn input(at: &At<'_>) -> Result<()> {
    let streams = Streams { stdin: true, ..Streams::default() };
    let mut cat = at.container.exec("e", &process(&["cat"]), streams)?;
    let sent = pattern::bytes(9, at.length);
    for chunk in sent.chunks(1 << 20) {
        cat.feed(chunk)?;
    }
    cat.end_input()?;
    let output = cat.finish(CALL * 3)?;
    at.machine.delete("c1", "e")?;
    ensure!(
        output.status() == 0 && output.stdout == sent,
        "{} bytes came back of {}",
        output.stdout.len(),
        sent.len()
    );
    Ok(())
}

fn burst(at: &At<'_>) -> Result<()> {
    for (round, bytes) in (0..4).zip([300_000, 65_536, 1, 1_000_000]) {
        let script = format!("head -c {bytes} /dev/zero; exit 3");
        let output = at.container.sh(&format!("b{round}"), &script, CALL)?;
        ensure!(
            output.status() == 3 && output.stdout.len() == bytes,
            "{} of {bytes} bytes came",
            output.stdout.len()
        );
    }
    Ok(())
}

fn terminal(at: &At<'_>) -> Result<()> {
    let streams = Streams { terminal: true, stdin: true };
    let mut process =
        process(&["sh", "-c", "tty; stty size; read line; echo got $line; stty size; test -t 2 && exit 4"]);
    process["terminal"] = json!(true);
    at.container.announce("t", &process, streams)?;
    at.machine.resize("c1", "t", (91, 37))?;
    let mut shell = at.container.start_exec("t", streams)?;
    at.machine.resize("c1", "t", (100, 50))?;
    shell.feed(b"typed\n")?;
    let output = shell.finish(CALL)?;
    at.machine.delete("c1", "t")?;
    let said = output.out().replace('\r', "");
    let lines: Vec<_> = said.lines().collect();
    ensure!(output.status() == 4, "{output:?}");
    ensure!(
        lines.contains(&"/dev/pts/0") && lines.contains(&"got typed") && lines.last() == Some(&"50 100"),
        "{said}"
    );
    Ok(())
}

fn signals(at: &At<'_>) -> Result<()> {
    for signal in [1, 9, 15, 34] {
        let process = at.container.exec("s", &process(&["sleep", "1000"]), Streams::default())?;
        at.machine.signal("c1", "s", signal)?;
        let output = process.finish(CALL)?;
        ensure!(output.status() == 128 + signal, "signal {signal} became {}", output.status());
        expect_error(at.machine.signal("c1", "s", 9), "NOT_FOUND", "process already finished")?;
        at.machine.delete("c1", "s")?;
    }
    Ok(())
}

/// A process that lives on holds the output of one that is gone: its exit is told, and what was said is there.
fn left_behind(at: &At<'_>) -> Result<()> {
    let process = at.container.exec(
        "l",
        &process(&["sh", "-c", "echo said; sleep 1000 & exit 5"]),
        Streams::default(),
    )?;
    let exit = at.machine.wait("c1", "l", CALL)?;
    ensure!(exit.status == 5, "it is {exit:?}");
    at.machine.delete("c1", "l")?;
    let stdout = process.output()?;
    ensure!(stdout == b"said\n", "{stdout:?}");
    Ok(())
}

fn nonsense(at: &At<'_>) -> Result<()> {
    let sleeper = process(&["sleep", "1000"]);
    expect_error(at.machine.start("c1", "none"), "NOT_FOUND", "process does not exist")?;
    expect_error(at.machine.signal("none", "", 9), "NOT_FOUND", "no such container")?;
    expect_error(at.machine.start("c1", ""), "FAILED_PRECONDITION", "running")?;
    expect_error(at.machine.delete("c1", ""), "FAILED_PRECONDITION", "running")?;
    at.container.announce("n", &sleeper, Streams::default())?;
    expect_error(at.container.announce("n", &sleeper, Streams::default()), "ALREADY_EXISTS", "n")?;
    expect_error(at.machine.signal("c1", "n", 9), "FAILED_PRECONDITION", "process not created")?;
    at.machine.delete("c1", "n")?;
    let again = Container::create_again(at.machine, "c1", &config("c1", &["true"]), Streams::default());
    expect_error(again, "ALREADY_EXISTS", "c1")?;
    expect_error(at.container.announce("../x", &sleeper, Streams::default()), "INVALID_ARGUMENT", "id")?;
    Ok(())
}
