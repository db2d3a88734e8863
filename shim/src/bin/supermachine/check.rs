//! `supermachine check`: what the monitor needs, by the monitor's own word, and what the shim needs beyond that.

use std::path::Path;
use std::process::{Command, ExitCode};

use runtime_spec::config::Boot;
use shim::config::{self, Options};
use shim::machine;
use shim::template::{self, Found, Store};

use crate::print;

/// What was looked at, and what to do if that is wrong.
struct Finding {
    name: &'static str,
    outcome: Result<String, (String, String)>,
}

/// Prints all findings; fails if one is wrong.
pub fn look() -> ExitCode {
    let monitor = machine::monitor_path();
    let able = match Command::new(&monitor).arg("check").output() {
        Ok(output) => {
            print(&String::from_utf8_lossy(&output.stdout));
            output.status.success()
        }
        Err(error) => {
            print(&format!("wrong    monitor       {}: {error}\n", monitor.display()));
            print("                       mend: install it beside this program, or in /usr/bin\n");
            false
        }
    };
    let findings = [configuration(), containerd(), cgroups()].into_iter().chain(guest());
    // Of a monitor that cannot say what it is there is nothing to find.
    let findings = findings.chain(able.then(template).flatten());
    let mut fine = able;
    for finding in findings {
        fine &= finding.outcome.is_ok();
        print(&line(&finding));
    }
    print(if fine {
        "containers can run here\n"
    } else {
        "containers cannot run here until that is mended\n"
    });
    if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn line(finding: &Finding) -> String {
    match &finding.outcome {
        Ok(detail) => format!("{:<8} {:<13} {detail}\n", "ok", finding.name),
        Err((detail, mend)) => {
            let name = finding.name;
            format!("{:<8} {name:<13} {detail}\n{:<8} {:<13} mend: {mend}\n", "wrong", "", "")
        }
    }
}

fn configuration() -> Finding {
    let outcome = match config::of(&Options::default()) {
        Ok(_) => Ok(format!("{} and its drop-ins, as far as they are there", runtime_spec::config::FILE)),
        Err(error) => Err((error.to_string(), "correct or remove what is named".to_owned())),
    };
    Finding { name: "configuration", outcome }
}

/// Kernel and initrd, as far as the configuration is known.
fn guest() -> Vec<Finding> {
    let Ok(config) = config::of(&Options::default()) else { return Vec::new() };
    machine::guest_files(config.vm.kernel.as_ref(), config.vm.initrd.as_ref())
        .into_iter()
        .map(|(name, path)| {
            let outcome = match path {
                Ok(path) => Ok(path.display().to_string()),
                Err(error) => Err((error.to_string(), "make install puts them there".to_owned())),
            };
            Finding { name, outcome }
        })
        .collect()
}

/// Whether the template is there that containers without limits need. None is no fault: it is made when it is needed.
fn template() -> Option<Finding> {
    let config = config::of(&Options::default()).ok()?;
    let name = "template";
    if config.vm.boot == Boot::Cold {
        return Some(Finding { name, outcome: Ok("none is used, since vm.boot is \"cold\"".to_owned()) });
    }
    let store = Store::new(&config.template);
    let place = store.directory().display().to_string();
    let looked = crate::template::machine(&config).and_then(|machine| {
        let key = template::wanted(&store, &machine)?.key()?;
        Ok(match store.open(&key)? {
            Found::Template(_) => format!("{place}/{key}"),
            Found::Nothing => {
                "none yet; the first container makes it, or supermachine template build".to_owned()
            }
            Found::Spoilt(why) => format!("{place}/{key} is made again when it is needed: {why}"),
        })
    });
    let mend = "machines boot until that is mended".to_owned();
    Some(Finding { name, outcome: looked.map_err(|error| (error.to_string(), mend)) })
}

/// Which containerd would start the shim, if any: none is no fault of this host's.
fn containerd() -> Finding {
    let version = Command::new("containerd").arg("--version").output();
    let text = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let outcome = match text {
        Ok(text) if !text.is_empty() => Ok(text),
        _ => Err(("there is none in PATH".to_owned(), "install containerd 1.7 or newer".to_owned())),
    };
    Finding { name: "containerd", outcome }
}

fn cgroups() -> Finding {
    let outcome = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Ok("version 2".to_owned())
    } else {
        Err((
            "/sys/fs/cgroup is not version 2".to_owned(),
            "boot with systemd.unified_cgroup_hierarchy=1".to_owned(),
        ))
    };
    Finding { name: "cgroups", outcome }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_has_its_mend() {
        let fine = Finding { name: "cgroups", outcome: Ok("version 2".into()) };
        assert_eq!(line(&fine), "ok       cgroups       version 2\n");
        let wrong = Finding { name: "kernel", outcome: Err(("none".into(), "install it".into())) };
        assert_eq!(line(&wrong), "wrong    kernel        none\n                       mend: install it\n");
    }
}
