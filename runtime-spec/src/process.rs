//! The process of a container, and those that are started beside it.

use oci_spec::runtime::{Process, Spec};

use crate::error::{Result, invalid, unsupported};
use crate::plan::{Note, Plan};
use crate::planner::Context;

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(process) = plan.guest.spec.process_mut() else {
        return Err(invalid("process", "missing", "a container runs a process"));
    };
    check(process, "process")?;
    process.set_terminal(Some(context.request.terminal));
    plan.monitor.oom_score_adj = process.oom_score_adj();
    Ok(())
}

/// The process of an `Exec`, as the guest is told of it.
///
/// `container` is the container's spec, of which a process that names no capabilities has those of the
/// container's own. Labels go the way of the container's: the machine confines it.
pub fn exec(process: &Process, container: &Spec, terminal: bool) -> Result<(Process, Vec<Note>)> {
    check(process, "process")?;
    let mut process = process.clone();
    let mut notes = Vec::new();
    for (path, label) in [
        ("process.apparmorProfile", process.apparmor_profile()),
        ("process.selinuxLabel", process.selinux_label()),
    ] {
        if let Some(label) = label.as_ref().filter(|label| !label.is_empty() && *label != "unconfined") {
            notes.push(Note::new(
                path,
                format!("{label} is not laid on the process, which its machine confines"),
            ));
        }
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process.set_terminal(Some(terminal));
    if process.capabilities().is_none() {
        let own = container.process().as_ref().and_then(|process| process.capabilities().clone());
        process.set_capabilities(own);
    }
    Ok((process, notes))
}

fn check(process: &Process, at: &str) -> Result<()> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(invalid(format!("{at}.args"), "missing", "a process has a name to be found by"));
    }
    if !process.cwd().is_absolute() {
        let cwd = process.cwd().display();
        return Err(invalid(format!("{at}.cwd"), format!("\"{cwd}\""), "a working directory is absolute"));
    }
    let strings = args.iter().chain(process.env().iter().flatten());
    if strings.into_iter().any(|text| text.contains('\0')) {
        return Err(invalid(at, "args or env", "a NUL ends a string"));
    }
    if process.command_line().as_ref().is_some_and(|line| !line.is_empty()) {
        return Err(unsupported(format!("{at}.commandLine"), "", "the guest is a Linux", "use args"));
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        let asked = affinity.initial().as_deref().or(affinity.cpu_affinity_final().as_deref()).unwrap_or("");
        let why = "it numbers the host's processors, and the guest has its own";
        return Err(unsupported(format!("{at}.execCPUAffinity"), asked, why, "leave it out"));
    }
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        if limit.soft() > limit.hard() {
            let asked = format!("{}: {} of {}", limit.typ(), limit.soft(), limit.hard());
            return Err(invalid(
                format!("{at}.rlimits[{index}]"),
                asked,
                "the soft limit is within the hard one",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Case;

    const BAD: &[(&str, &str, &str)] = &[
        ("args", "[]", "process.args"),
        ("args", "null", "process.args"),
        ("args", "[\"\"]", "process.args"),
        ("args", "[\"a\\u0000\"]", "process"),
        ("cwd", "\"\"", "process.cwd"),
        ("cwd", "\"tmp\"", "process.cwd"),
        ("commandLine", "\"dir\"", "process.commandLine"),
        ("execCPUAffinity", "{\"initial\":\"0-3\"}", "process.execCPUAffinity"),
        ("rlimits", "[{\"type\":\"RLIMIT_NOFILE\",\"soft\":2,\"hard\":1}]", "process.rlimits[0]"),
    ];

    #[test]
    fn processes_that_make_no_sense() {
        for (key, value, path) in BAD {
            let value: Value = serde_json::from_str(value).unwrap();
            let mut json = json!({ "user": {}, "cwd": "/", "args": ["sh"] });
            assert_eq!(Case::with(&json!({ "process": { *key: value } })).error().path(), *path, "{key}");
            json[key] = value;
            let process: Process = serde_json::from_value(json).unwrap();
            assert_eq!(exec(&process, &Spec::default(), false).unwrap_err().path(), *path, "{key}");
        }
        assert_eq!(Case::with(&json!({ "process": null })).error().path(), "process");
    }

    #[test]
    fn what_is_passed_on() {
        let process = json!({
            "user": { "uid": 1, "gid": 2, "umask": 18, "additionalGids": [3] }, "cwd": "/w", "args": ["a", "b"],
            "env": ["A=b"], "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 9, "soft": 8 }],
            "noNewPrivileges": true, "oomScoreAdj": -500, "terminal": true,
            "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 4 },
            "scheduler": { "policy": "SCHED_BATCH", "nice": 5 },
            "capabilities": { "bounding": ["CAP_KILL"] }, "consoleSize": { "height": 25, "width": 80 },
        });
        let mut case = Case::with(&json!({ "process": process.clone() }));
        case.terminal = true;
        let plan = case.plan();
        assert_eq!(serde_json::to_value(plan.guest.spec.process()).unwrap(), process);
        assert_eq!(plan.monitor.oom_score_adj, Some(-500));
        case.terminal = false;
        assert_eq!(case.plan().guest.spec.process().as_ref().unwrap().terminal(), Some(false));
    }

    #[test]
    fn processes_beside_have_the_containers_capabilities_unless_they_name_their_own() {
        let container =
            Case::with(&json!({ "process": { "capabilities": { "bounding": ["CAP_KILL"] } } })).plan();
        let run = |capabilities: Value| {
            let json = json!({ "user": {}, "cwd": "/", "args": ["sh"], "apparmorProfile": "p",
                "capabilities": capabilities });
            let process = serde_json::from_value(json).unwrap();
            let (process, notes) = exec(&process, &container.guest.spec, true).unwrap();
            assert_eq!((process.terminal(), notes.len()), (Some(true), 1));
            serde_json::to_value(process).unwrap()
        };
        assert_eq!(run(json!(null))["capabilities"]["bounding"], json!(["CAP_KILL"]));
        let own = run(json!({ "bounding": ["CAP_CHOWN"] }));
        assert_eq!(own["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert_eq!(own["apparmorProfile"], json!(null));
    }
}
