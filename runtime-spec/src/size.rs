//! How large a machine is: what its containers are limited to, within what the configuration allows.
//!
//! A limit is a ceiling, so a machine that cannot be as large as the sum of the limits is as large as it
//! may be. A size in an annotation is a wish for exactly that, and too much is an error. Memory that a guest
//! does not touch costs the host nothing, so sizes are rounded up, which lets more machines come from the
//! same snapshot.

use std::collections::HashMap;

use crate::annotations;
use crate::config::{Bytes, Config, Settings};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::kind::Kind;
use crate::plan::{Demand, Machine, Note, Plan, Shape, Size};
use crate::planner::Context;
use crate::resources::processors;

/// Sizes are multiples of this, unless an annotation says otherwise.
pub const MEMORY_STEP: u64 = 128 << 20;
/// No guest boots with less.
pub const LEAST_MEMORY: u64 = 64 << 20;
/// The grain of memory.
const GRAIN: u64 = 2 << 20;
/// What the most memory is rounded up to in a template, as hosts of one kind differ by a little.
const MOST_STEP: u64 = 1 << 30;
/// No machine has more.
const MOST_MEMORY: u64 = 512 << 30;
/// Memory that is given later holds nothing of the kernel's own. So large a part is there from the boot.
const BOOTED_PART: u64 = 8;
/// Machines of up to so many processors come from one template. Each processor costs a restore a little.
const COMMON_CPUS: u32 = 4;

const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

pub(crate) fn transform(context: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let request = context.request;
    if context.kind == Kind::Sandbox {
        let annotations = request.spec.annotations().as_ref();
        plan.demand = pod_demand(annotations);
        if let Some(shares) = number(annotations, CPU_SHARES).and_then(|shares| shares.try_into().ok()) {
            let mut cpu = plan.cgroup.resources.cpu().clone().unwrap_or_default();
            cpu.set_shares(Some(shares));
            plan.cgroup.resources.set_cpu(Some(cpu));
        }
    }
    if request.pod.is_some() {
        if context.shares {
            plan.room = Some(size(&context.settings, plan.demand, false, request.host)?);
        }
        let ours = request.spec.annotations().iter().flatten();
        let ours = ours.filter_map(|(key, _)| Some((key, key.strip_prefix(annotations::PREFIX)?)));
        for (key, _) in ours.filter(|(_, name)| plan.room.is_none() || !["cpus", "memory"].contains(name)) {
            plan.notes.push(Note::new(format!("annotations.{key}"), "its machine runs already; ignored"));
        }
        return Ok(());
    }
    let pod = context.kind == Kind::Sandbox;
    plan.machine = Some(of(&context.settings, plan.demand, pod, request.host)?);
    Ok(())
}

/// The machine of a pod that is made before any of its containers, by the sandbox API. Annotations are those
/// of the pod.
pub fn sandbox(
    annotations: impl IntoIterator<Item = (String, String)>,
    demand: Demand,
    config: &Config,
    host: Host<'_>,
) -> Result<Machine> {
    let annotations: HashMap<_, _> = annotations.into_iter().collect();
    let settings = annotations::settings(config, Some(&annotations))?;
    let theirs = pod_demand(Some(&annotations));
    let demand = Demand { cpus: demand.cpus.or(theirs.cpus), memory: demand.memory.or(theirs.memory) };
    of(&settings, demand, true, host)
}

fn of(settings: &Settings, demand: Demand, pod: bool, host: Host<'_>) -> Result<Machine> {
    let vm = &settings.config.vm;
    let size = size(settings, demand, pod, host)?;
    Ok(Machine {
        size,
        shape: shape(&settings.config, size, host),
        boot: vm.boot,
        warm: settings.warm.clone(),
        spoofing: settings.config.policy.spoofing,
        vhost: settings.config.network.vhost,
        kernel: vm.kernel.clone(),
        initrd: vm.initrd.clone(),
    })
}

fn size(settings: &Settings, demand: Demand, pod: bool, host: Host<'_>) -> Result<Size> {
    Ok(Size { cpus: cpus(settings, demand, pod, host)?, memory: memory(settings, demand, pod, host)? })
}

/// The machine without limits, which `template build` makes a template for.
pub fn unlimited(config: &Config, host: Host<'_>) -> Result<Machine> {
    sandbox([], Demand::default(), config, host)
}

/// Few shapes for many sizes: a machine of a usual size runs as it was saved; others have processors brought up or
/// down, and memory plugged in. Nothing can be taken away from what a machine has booted with, so one that asks for
/// less has that.
fn shape(config: &Config, size: Size, host: Host<'_>) -> Shape {
    let most = most_cpus(config, host).max(size.cpus);
    let cpus = size.cpus.next_power_of_two().max(COMMON_CPUS).min(most);
    let mut memory = default_memory(config, host);
    while memory < size.memory / BOOTED_PART {
        memory *= 2;
    }
    let most = most_memory(config, host).min(MOST_MEMORY).max(size.memory).max(memory);
    let memory_max = most.checked_next_multiple_of(MOST_STEP).unwrap_or(memory);
    Shape { cpus, online: config.vm.cpus.min(host.cpus).clamp(1, cpus), memory, memory_max }
}

fn most_cpus(config: &Config, host: Host<'_>) -> u32 {
    if config.vm.max_cpus == 0 { host.cpus.max(1) } else { config.vm.max_cpus }
}

fn most_memory(config: &Config, host: Host<'_>) -> u64 {
    if config.vm.max_memory.0 == 0 { host.memory } else { config.vm.max_memory.0 }
}

/// Of a machine whose containers have no limit.
fn default_memory(config: &Config, host: Host<'_>) -> u64 {
    rounded(config.vm.memory.0.min(host.memory / 2), most_memory(config, host))
}

fn rounded(memory: u64, most: u64) -> u64 {
    let rounded = memory.checked_next_multiple_of(MEMORY_STEP).unwrap_or(memory);
    rounded.max(MEMORY_STEP).min((most - most % GRAIN).max(LEAST_MEMORY))
}

fn cpus(settings: &Settings, demand: Demand, pod: bool, host: Host<'_>) -> Result<u32> {
    let vm = &settings.config.vm;
    let most = most_cpus(&settings.config, host);
    if let Some(cpus) = settings.cpus {
        return if cpus <= most { Ok(cpus) } else { Err(too_much("cpus", &cpus, most)) };
    }
    let default = vm.cpus.min(host.cpus);
    let cpus = match demand.cpus {
        // The sum of a pod's limits says nothing of its containers without limits.
        Some(cpus) if pod => cpus.max(default),
        Some(cpus) => cpus,
        None => default,
    };
    Ok(cpus.clamp(1, most))
}

fn memory(settings: &Settings, demand: Demand, pod: bool, host: Host<'_>) -> Result<u64> {
    let vm = &settings.config.vm;
    let most = most_memory(&settings.config, host);
    if let Some(Bytes(memory)) = settings.memory {
        return match memory {
            _ if memory > most => Err(too_much("memory", &Bytes(memory), Bytes(most))),
            _ if memory < LEAST_MEMORY => Err(Error::Annotation {
                key: format!("{}memory", annotations::PREFIX),
                value: Bytes(memory).to_string(),
                problem: format!("a guest takes at least {}", Bytes(LEAST_MEMORY)),
            }),
            _ => Ok(memory.next_multiple_of(GRAIN)),
        };
    }
    let default = default_memory(&settings.config, host);
    let memory = match demand.memory.map(|memory| memory.saturating_add(vm.overhead.0)) {
        Some(memory) if pod => memory.max(default),
        Some(memory) => memory,
        None => default,
    };
    Ok(rounded(memory, most))
}

fn too_much(name: &str, asked: &impl ToString, most: impl std::fmt::Display) -> Error {
    Error::Annotation {
        key: format!("{}{name}", annotations::PREFIX),
        value: asked.to_string(),
        problem: format!("the host gives a machine at most {most}; ask for less, or raise vm.max_{name}"),
    }
}

fn number(annotations: Option<&HashMap<String, String>>, key: &str) -> Option<i64> {
    annotations?.get(key)?.parse().ok()
}

/// What CRI says that all containers of a pod are limited to.
fn pod_demand(annotations: Option<&HashMap<String, String>>) -> Demand {
    let quota = number(annotations, CPU_QUOTA);
    let period = number(annotations, CPU_PERIOD).and_then(|period| period.try_into().ok());
    let memory = number(annotations, MEMORY).filter(|memory| *memory > 0);
    Demand { cpus: processors(quota, period), memory: memory.and_then(|memory| memory.try_into().ok()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::Case;

    const MIB: u64 = 1 << 20;

    fn size(case: &Case) -> (u32, u64) {
        let size = case.plan().machine.unwrap().size;
        (size.cpus, size.memory / MIB)
    }

    #[test]
    fn sizes_of_limits() {
        // The host has 4 processors and 8 GiB.
        for (resources, expected) in [
            (json!({}), (2, 1024)),
            (json!({ "cpu": { "shares": 1024 } }), (2, 1024)),
            (json!({ "cpu": { "quota": 150_000, "period": 100_000 } }), (2, 1024)),
            (json!({ "cpu": { "quota": 10_000, "period": 100_000 } }), (1, 1024)),
            (json!({ "cpu": { "quota": 300_000 } }), (3, 1024)),
            (json!({ "cpu": { "quota": -1, "period": 100_000 } }), (2, 1024)),
            (json!({ "cpu": { "quota": 6_400_000, "period": 100_000 } }), (4, 1024)),
            (json!({ "cpu": { "cpus": "0-2" } }), (3, 1024)),
            (json!({ "cpu": { "cpus": "0,3", "quota": 400_000, "period": 100_000 } }), (2, 1024)),
            (json!({ "memory": { "limit": 6 * MIB } }), (2, 128)),
            (json!({ "memory": { "limit": 512 * MIB } }), (2, 640)),
            (json!({ "memory": { "limit": i64::MAX } }), (2, 8192)),
            (json!({ "memory": { "limit": -1 } }), (2, 1024)),
            (json!({ "unified": { "memory.max": "536870912", "cpu.max": "300000 100000" } }), (3, 640)),
            (json!({ "unified": { "memory.max": "max" } }), (2, 1024)),
        ] {
            let case = Case::with(&json!({ "linux": { "resources": resources } }));
            assert_eq!(size(&case), expected, "{resources}");
        }
    }

    #[test]
    fn many_sizes_have_few_shapes() {
        // The host has 4 processors and 8 GiB.
        let all = |case: &Case| {
            let Shape { cpus, online, memory, memory_max } = case.plan().machine.unwrap().shape;
            (cpus, online, memory / MIB, memory_max / MIB)
        };
        for resources in [
            json!({}),
            json!({ "cpu": { "quota": 100_000, "period": 100_000 }, "memory": { "limit": 6 * MIB } }),
            json!({ "cpu": { "quota": 400_000, "period": 100_000 }, "memory": { "limit": 7000 * MIB } }),
        ] {
            let case = Case::with(&json!({ "linux": { "resources": resources } }));
            assert_eq!(all(&case), (4, 2, 1024, 8192), "{resources}");
        }
        let mut case = Case::with(&json!({ "linux": { "resources": {
            "cpu": { "quota": 900_000, "period": 100_000 }, "memory": { "limit": 100_000 * MIB } } } }));
        (case.config.vm.max_cpus, case.config.vm.max_memory) = (12, Bytes(200_000 * MIB));
        assert_eq!(all(&case), (12, 2, 16384, 200_704), "9 of 12 processors, and memory to boot with");
        let mut small = Case::new();
        (small.config.vm.max_cpus, small.config.vm.cpus) = (1, 8);
        (small.config.vm.memory, small.config.vm.max_memory) = (Bytes(1), Bytes(100 * MIB));
        assert_eq!(all(&small), (1, 1, 100, 1024));
        let wanted = small.plan().machine.unwrap();
        let host = Host { cpus: 4, memory: 8192 * MIB, hostname: "h", files: &small.files };
        assert_eq!(unlimited(&small.config, host).unwrap().shape, wanted.shape);
    }

    #[test]
    fn sizes_of_configurations() {
        let mut case = Case::with(&json!({ "linux": { "resources": {
            "cpu": { "quota": 800_000, "period": 100_000 }, "memory": { "limit": 4096 * MIB } } } }));
        case.config.vm.max_cpus = 3;
        case.config.vm.max_memory = Bytes(2048 * MIB);
        assert_eq!(size(&case), (3, 2048));
        case.config.vm.max_cpus = 16;
        assert_eq!(size(&case).0, 8);
        let mut case = Case::new();
        case.config.vm.cpus = 64;
        case.config.vm.memory = Bytes(64 << 30);
        assert_eq!(size(&case), (4, 4096));
        case.config.vm.max_memory = Bytes(1);
        assert_eq!(size(&case).1, 64);
    }

    #[test]
    fn annotations_are_exact_and_bounded() {
        let case = |name: &str, value: &str| {
            Case::with(&json!({ "annotations": { format!("dev.supermachine.{name}"): value },
                "linux": { "resources": { "memory": { "limit": 1 << 30 } } } }))
        };
        assert_eq!(size(&case("memory", "100MiB")).1, 100);
        assert_eq!(size(&case("memory", "67108865")).1, 66);
        assert_eq!(size(&case("cpus", "4")).0, 4);
        for (name, value) in [("cpus", "5"), ("memory", "9GiB"), ("memory", "1MiB")] {
            assert_eq!(case(name, value).error().path(), format!("dev.supermachine.{name}"), "{value}");
        }
    }

    #[test]
    fn pods() {
        let pod = |memory: &str, quota: &str| {
            json!({
                "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-cpu-quota": quota, "io.kubernetes.cri.sandbox-cpu-shares": "512",
                "io.kubernetes.cri.sandbox-memory": memory,
            })
        };
        for (memory, quota, expected) in [
            ("0", "0", (2, 1024)),
            ("1073741824", "350000", (4, 1152)),
            ("67108864", "10000", (2, 1024)),
            ("x", "", (2, 1024)),
        ] {
            let case = Case::with(&json!({ "annotations": pod(memory, quota) }));
            assert_eq!(size(&case), expected, "{memory} {quota}");
            let plan = case.plan();
            assert_eq!(plan.cgroup.resources.cpu().as_ref().unwrap().shares(), Some(512));
            let annotations: HashMap<_, _> = serde_json::from_value(pod(memory, quota)).unwrap();
            let files = crate::testing::Table(std::collections::BTreeMap::new());
            let host = Host { cpus: 4, memory: 8 << 30, hostname: "", files: &files };
            let machine = sandbox(annotations, Demand::default(), &Config::default(), host).unwrap();
            assert_eq!(Some(machine), plan.machine);
        }
    }

    #[test]
    fn members_make_no_machine() {
        let annotations = json!({ "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "p1", "dev.supermachine.cpus": "3" });
        let mut case = Case::with(&json!({ "annotations": annotations }));
        case.pod = Some(crate::host::Pod {
            id: "p1".to_owned(),
            netns: Some("/run/netns/a".into()),
            ..Default::default()
        });
        case.spec["linux"]["namespaces"][4]["path"] = json!("/run/netns/a");
        let plan = case.plan();
        assert_eq!((plan.machine, plan.room), (None, None));
        let ignored =
            |notes: &[Note], key: &str| notes.iter().any(|note| note.path == format!("annotations.{key}"));
        assert!(ignored(&plan.notes, "dev.supermachine.cpus"));

        // One that is no pod's needs the room that a machine of its own would have.
        case.spec["annotations"] = json!({ "dev.supermachine.cpus": "3", "dev.supermachine.boot": "cold" });
        case.spec["linux"]["resources"] = json!({ "memory": { "limit": 512 * MIB } });
        let plan = case.plan();
        assert_eq!(plan.kind, Kind::Member { pod: "p1".to_owned() });
        assert_eq!((plan.machine, plan.room), (None, Some(Size { cpus: 3, memory: 640 * MIB })));
        assert!(
            !ignored(&plan.notes, "dev.supermachine.cpus") && ignored(&plan.notes, "dev.supermachine.boot")
        );
    }
}
