//! Programs that go wrong, and configurations that cannot be: the client is told what it is told with runc.

use anyhow::{Result, ensure};
use integration::containerd::Api;
use integration::{Ctx, Outcome, Rounds, Test};
use serde_json::{Value, json};

use super::{A_WHILE, OURS, Piped, head, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test("task.wrong", "what a container may not do or cannot be is told as with runc", wrong),
        Test {
            rounds: Rounds::once_or(1),
            ..test("task.codes", "every exit code and every signal comes out as with runc", codes)
        },
        test("task.stubborn", "a process that ignores SIGTERM goes on, and is killed", stubborn),
    ]
}

type Edit = fn(&mut Value);

struct Case {
    name: &'static str,
    process: &'static [&'static str],
    edit: Edit,
    /// What both say if they refuse it, or what both have in their output; the rest of it is compared.
    says: &'static str,
}

fn user(spec: &mut Value) {
    spec["process"]["user"] = json!({ "uid": 1234, "gid": 5678, "additionalGids": [5678, 90] });
}

fn limited(spec: &mut Value) {
    spec["linux"]["resources"] = json!({ "pids": { "limit": 20 } });
}

const CASES: &[Case] = &[
    Case {
        name: "a file that is no program",
        process: &["/proc/self/status"],
        edit: |_| {},
        says: "permission denied",
    },
    Case {
        name: "a user that nobody knows",
        process: &["sh", "-c", "id; echo x >/file; grep -E '^(Cap|Groups)' /proc/self/status"],
        edit: user,
        says: "uid=1234 gid=5678",
    },
    Case {
        name: "a directory that is not there",
        process: &["pwd"],
        edit: |spec| spec["process"]["cwd"] = json!("/no/where"),
        says: "/no/where\n",
    },
    Case {
        name: "a directory that is none",
        process: &["pwd"],
        edit: |spec| spec["process"]["cwd"] = json!("/bin/sh"),
        says: "not a directory",
    },
    Case {
        name: "a root that is only read",
        process: &["sh", "-c", "echo x >/file; mkdir /bin/x; rm /bin/sh; echo y >/run/y && cat /run/y"],
        edit: |spec| spec["root"]["readonly"] = json!(true),
        says: "Read-only file system",
    },
    Case {
        name: "more processes than it may have",
        process: &["sh", "-c", "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done; echo all"],
        edit: limited,
        says: "can't fork",
    },
    Case {
        name: "children that nobody waits for",
        process: &[
            "sh",
            "-c",
            "for i in $(seq 50); do sh -c 'sleep 0.1 & exec true'; done; sleep 1; echo done",
        ],
        edit: |_| {},
        says: "done\n",
    },
    Case {
        name: "paths that are hidden, or only read",
        process: &[
            "sh",
            "-c",
            "cat /proc/version; ls /proc/scsi; echo 1 >/proc/sys/kernel/printk; cat /proc/sys/kernel/domainname",
        ],
        edit: |spec| {
            spec["linux"]["maskedPaths"] = json!(["/proc/version", "/proc/scsi", "/proc/is-not-there"]);
            spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/is-not-there"]);
            spec["linux"]["sysctl"] = json!({ "kernel.domainname": "example" });
        },
        says: "example\n",
    },
    Case {
        name: "limits of a process",
        process: &["sh", "-c", "ulimit -n; ulimit -c; ulimit -Hn; cat /proc/self/oom_score_adj; umask"],
        edit: |spec| {
            spec["process"]["rlimits"] = json!([
                { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }
            ]);
            spec["process"]["oomScoreAdj"] = json!(500);
            spec["process"]["user"]["umask"] = json!(0o27);
        },
        says: "100\n0\n200\n500\n0027\n",
    },
    Case {
        name: "system calls that are forbidden",
        process: &["sh", "-c", "mkdir /tmp/x; uname; grep Seccomp: /proc/self/status"],
        edit: |spec| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 },
                    { "names": ["no_such_call"], "action": "SCMP_ACT_ERRNO" }
                ]
            });
        },
        says: "No space left on device",
    },
    Case {
        name: "a device of its own",
        process: &[
            "sh",
            "-c",
            "ls -l /dev/mine | awk '{ print $1, $3, $4, $5, $6 }'; head -c 3 /dev/mine | wc -c; mknod /dev/loop c 1 5",
        ],
        edit: |spec| {
            spec["linux"]["devices"] = json!([
                { "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4 }
            ]);
        },
        says: "crw-r----- 3 4 1, 5\n3\n",
    },
];

/// What it says or, if there is to be none, why.
fn tried(ctx: &Ctx<'_, Inside>, api: &Api, runtime: &str, case: &Case) -> Result<Result<String, String>> {
    let mut task = match Piped::new(ctx, api, runtime, case.process, case.edit) {
        Ok(task) => task,
        Err(error) => return Ok(Err(format!("Create: {error:#}"))),
    };
    if let Err(error) = task.container.start() {
        return Ok(Err(format!("Start: {error:#}")));
    }
    let code = task.container.wait(A_WHILE)?;
    let (output, errors) = (task.stdout.read_to_end(A_WHILE)?, task.stderr.read_to_end(A_WHILE)?);
    task.end(code)?;
    Ok(Ok(format!(
        "{}{}exit code {code}\n",
        String::from_utf8_lossy(&output),
        String::from_utf8_lossy(&errors)
    )))
}

fn wrong(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let mut differ = Vec::new();
    for case in CASES {
        let theirs = tried(ctx, &api, RUNC, case)?;
        let ours = tried(ctx, &api, OURS, case)?;
        let alike = match (&theirs, &ours) {
            (Ok(theirs), Ok(ours)) => theirs == ours && ours.contains(case.says),
            // Where, and the words that clients look for.
            (Err(theirs), Err(ours)) => {
                let stage = |text: &str| text.split(':').next().map(str::to_owned);
                stage(theirs) == stage(ours) && theirs.contains(case.says) && ours.contains(case.says)
            }
            _ => false,
        };
        ctx.note(format!("{}: {}: {ours:?}", case.name, if alike { "alike" } else { "DIFFERENT" }));
        if !alike {
            differ.push(format!(
                "{}: ours {:?}, runc {:?}",
                case.name,
                ours.as_ref().map(|text| head(text)),
                theirs.as_ref().map(|text| head(text))
            ));
        }
    }
    ensure!(differ.is_empty(), "{}", differ.join("\n"));
    Ok(Outcome::Passed)
}

/// What is put before a signal's number for its exit code.
const SIGNALLED: u32 = 128;

fn codes(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let codes = ctx.either(vec![1, 2, 77, 126, 127, 128, 137, 255], (0..=255).collect());
    let signals = ctx.either(vec![1, 6, 9, 15, 34], (1..=64).collect());
    for runtime in ctx.either(vec![OURS], vec![RUNC, OURS]) {
        let task = Piped::new(ctx, &api, runtime, &["sleep", "100000"], |_| {})?;
        task.container.start()?;
        let ends = |name: &str, script: &str, expected: u32| -> Result<()> {
            let arguments = ["task", "exec", "--exec-id", name, &task.id, "sh", "-c", script];
            let done = ctx.world.ctr().with(ctx.cmd("ctr"), arguments).run()?;
            let code = done.code().and_then(|code| u32::try_from(code).ok());
            ensure!(code == Some(expected), "{runtime}: {script:?} ended with {code:?}: {}", done.err());
            Ok(())
        };
        for code in &codes {
            ends(&format!("code-{code}"), &format!("exit {code}"), *code)?;
        }
        for signal in &signals {
            // What does not end a process: SIGCHLD, SIGCONT, SIGURG, SIGWINCH, and those that stop it.
            if [17, 18, 19, 20, 21, 22, 23, 28].contains(signal) {
                continue;
            }
            ends(&format!("signal-{signal}"), &format!("kill -{signal} $$; sleep 1"), SIGNALLED + signal)?;
        }
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}

fn stubborn(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    for runtime in [RUNC, OURS] {
        let script = "trap 'echo no' TERM; echo ready; while :; do sleep 0.1; done";
        let mut task = Piped::new(ctx, &api, runtime, &["sh", "-c", script], |_| {})?;
        task.container.start()?;
        task.stdout.read_until("ready", A_WHILE)?;
        for _ in 0..2 {
            task.container.kill(15)?;
            task.stdout.read_until("no", A_WHILE)?;
        }
        task.container.kill(9)?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 137, "{runtime}: exit code {code}");
        task.end(code)?;
    }
    Ok(Outcome::Passed)
}
