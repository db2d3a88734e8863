//! Network namespaces that a machine cannot have, and such that only look like it.

use std::fs;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Test};

use super::network::{Cable, Cabled, enter, hung, plug};
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::{Inside, RUNC};

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.network-wrong",
            "a namespace that is gone or none, has too many interfaces, one with too large an MTU, or another machine, and a kernel that cannot \
             join interfaces, are told of with what to do, and nothing is left in it",
            wrong,
        ),
        test(
            "task.network-odd",
            "interfaces with the same hardware address, and one that is turned off, are as with runc",
            odd,
        ),
    ]
}

/// The MTU of cables that nothing is the matter with.
const MTU: u32 = 1500;

fn cable(number: u8) -> Cable {
    Cable { number, mac: "02:77:00:00:00:01", mtu: MTU }
}

/// What the client is told of a container in the namespace at `path`.
fn refused(ctx: &Ctx<'_, Inside>, path: &str, runtime: &str) -> Result<String> {
    refused_with(ctx, path, runtime, |_| {})
}

fn refused_with(
    ctx: &Ctx<'_, Inside>,
    path: &str,
    runtime: &str,
    edit: impl FnOnce(&mut serde_json::Value),
) -> Result<String> {
    let api = ctx.world.api()?;
    let made = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["true"], |spec| {
        enter(spec, path);
        edit(spec);
    });
    match made {
        Err(error) => {
            let text = format!("{error:#}");
            ctx.note(&text);
            Ok(text)
        }
        Ok(task) => {
            task.container.start()?;
            let code = task.container.wait(A_WHILE)?;
            task.end(code)?;
            anyhow::bail!("{runtime}: a container ran in {path}")
        }
    }
}

/// A kernel that finds none of the modules that join interfaces, until this is dropped.
struct WithoutModules<'a> {
    ctx: &'a Ctx<'a, Inside>,
    loader: String,
}

const LOADER: &str = "/proc/sys/kernel/modprobe";
const MODULES: [&str; 3] = ["act_mirred", "cls_matchall", "cls_bpf"];

impl<'a> WithoutModules<'a> {
    fn new(ctx: &'a Ctx<'a, Inside>) -> Result<Self> {
        let loader = fs::read_to_string(LOADER).context("reading which program loads modules")?;
        fs::write(LOADER, "/bin/false").context("taking it away")?;
        let without = Self { ctx, loader };
        // Those that are not there are what is wanted.
        for module in MODULES {
            let _ = ctx.cmd("rmmod").arg(module).run()?;
        }
        let loaded = fs::read_to_string("/proc/modules")?;
        let is_loaded = |module: &str| loaded.lines().any(|line| line.starts_with(&format!("{module} ")));
        ensure!(!MODULES.into_iter().any(is_loaded), "a module is in use: {loaded}");
        Ok(without)
    }
}

impl Drop for WithoutModules<'_> {
    fn drop(&mut self) {
        let _ = fs::write(LOADER, self.loader.trim_end());
        let _ = self.ctx.cmd("modprobe").args(["-a"]).args(MODULES).run();
    }
}

fn wrong(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    let file = ctx.path("file").display().to_string();
    fs::write(&file, "")?;
    for (path, says) in [("/run/netns/no-such-namespace", "no-such-namespace"), (&file, "namespace")] {
        let with_runc = refused(ctx, path, RUNC)?;
        let told = refused(ctx, path, OURS)?;
        ensure!(told.contains(says), "of {path}: {told}; runc says {with_runc}");
    }

    let in_namespace = |cables: &[Cable], says: &[&str]| -> Result<()> {
        let cabled = Cabled::new(ctx)?;
        let _cables =
            cables.iter().map(|cable| plug(ctx, &cabled.path, cable)).collect::<Result<Vec<_>>>()?;
        let before = hung(&cabled)?;
        let told = refused(ctx, &cabled.path, OURS)?;
        for part in says {
            ensure!(told.contains(part), "it does not say {part:?}: {told}");
        }
        let after = hung(&cabled)?;
        ensure!(after == before, "the namespace was {before}, and is {after}");
        Ok(())
    };
    let six: Vec<_> = (0..6).map(cable).collect();
    in_namespace(&six, &["more interfaces than the 5", "take some out"])?;
    in_namespace(&[Cable { mtu: 65535, ..cable(0) }], &["eth0", "an MTU of 65535"])?;
    taken(ctx)?;
    if !ctx.world.owns_host() {
        ctx.note("the modules of a host that others use stay");
        return Ok(Outcome::Passed);
    }
    let without = WithoutModules::new(ctx)?;
    in_namespace(&[cable(0)], &["eth0", "load its module cls_bpf"])?;
    drop(without);
    Ok(Outcome::Passed)
}

/// A namespace that another machine has.
fn taken(ctx: &Ctx<'_, Inside>) -> Result<()> {
    let cabled = Cabled::new(ctx)?;
    let _cable = plug(ctx, &cabled.path, &cable(0))?;
    let api = ctx.world.api()?;
    let process = ["sh", "-c", "echo ready; read line; ping -c 1 -W 20 10.77.0.1 >/dev/null; exit $?"];
    let edit = |spec: &mut serde_json::Value| {
        super::network::with_rights(spec);
        enter(spec, &cabled.path);
    };
    let mut first = Piped::named(ctx, &api, OURS, new_id(ctx, OURS), &process, edit)?;
    first.container.start()?;
    first.stdout.read_until("ready\n", A_WHILE)?;
    let before = hung(&cabled)?;
    // A pod has a machine of its own in any case.
    let told = refused_with(ctx, &cabled.path, OURS, |spec| {
        spec["annotations"] = serde_json::json!({ "io.kubernetes.cri.container-type": "sandbox" });
    })?;
    ensure!(told.contains("eth0") && told.contains("another machine has it"), "{told}");
    let after = hung(&cabled)?;
    ensure!(after == before, "the first machine's namespace was {before}, and is {after}");
    first.stdin.write(b"\n")?;
    let code = first.container.wait(A_WHILE)?;
    first.end(code)?;
    ensure!(code == 0, "the first container has lost its network");
    Ok(())
}

/// What a container sees of two interfaces with one hardware address, of which the second is off.
const SEEN: &str = "for i in eth0 eth1; do
        echo $i $(cat /sys/class/net/$i/address) $(ip link show dev $i | grep -o '[<,]UP[,>]')
        ip -o -4 address show dev $i | grep -o 'inet [^ ]*'
    done
    ip -4 route | sed 's/ *$//' | sort; ping -c 1 -W 20 10.77.0.1 >/dev/null; echo $?";

fn odd(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let mut said = Vec::new();
    for runtime in [RUNC, OURS] {
        let cabled = Cabled::new(ctx)?;
        let _cables = [plug(ctx, &cabled.path, &cable(0))?, plug(ctx, &cabled.path, &cable(1))?];
        cabled.inside("ip link set eth1 down")?;
        let edit = |spec: &mut serde_json::Value| {
            super::network::with_rights(spec);
            enter(spec, &cabled.path);
        };
        let mut task = Piped::named(ctx, &api, runtime, new_id(ctx, runtime), &["sh", "-c", SEEN], edit)?;
        task.container.start()?;
        let code = task.container.wait(A_WHILE)?;
        said.push(String::from_utf8_lossy(&task.stdout.read_to_end(A_WHILE)?).into_owned());
        task.end(code)?;
    }
    ensure!(said[0] == said[1], "a container sees {:?}, with runc {:?}", said[1], said[0]);
    ensure!(said[0].ends_with("0\n"), "even with runc nobody answers: {:?}", said[0]);
    Ok(Outcome::Passed)
}
