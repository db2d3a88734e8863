//! Resources: what the guest's cgroup enforces, what the host's does, and what size of machine follows.
//!
//! | asked for | guest | host |
//! |---|---|---|
//! | memory, swap, pids | as asked | the size of the machine |
//! | cpu shares | as asked: within the pod | as asked: among machines |
//! | cpu quota, burst, idle | as asked | the quota, in whole processors |
//! | cpuset | no such processors there | as asked: the monitor runs on them |
//! | blockIO | no such disks there | as asked: the monitor does the I/O |
//! | unified | all but the next | `cpuset.*`, `io.*` |
//! | huge pages, RDMA, net_cls, real time, v1's memory knobs | an error, unless it is to have none | |
//!
//! Fields are those of cgroup v1, as the specification has them; both sides convert them to v2.

use std::collections::{BTreeSet, HashMap};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::devices;
use crate::error::{Result, invalid, unsupported};
use crate::plan::{Demand, Note, Plan};
use crate::planner::Context;

const DEFAULT_PERIOD: u64 = 100_000;
const LEAVE_OUT: &str = "leave it out";

/// What becomes of an `Update`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// For the agent.
    pub guest: LinuxResources,
    /// For the cgroup on the host.
    pub host: LinuxResources,
    /// What the container demands of its machine from now on, as far as the update says.
    pub demand: Demand,
    /// What was read differently from how it stands.
    pub notes: Vec<Note>,
}

/// Plans an `Update`.
pub fn update(resources: &LinuxResources) -> Result<Update> {
    let mut notes = Vec::new();
    let split = split("resources", resources)?;
    let mut guest = split.guest;
    let rules = guest.devices_mut().take().map(|rules| devices::rules("resources", rules, &mut notes));
    guest.set_devices(rules);
    Ok(Update { guest, host: split.host, demand: split.demand, notes })
}

pub(crate) fn transform(_: &Context<'_>, plan: &mut Plan) -> Result<()> {
    let Some(linux) = plan.guest.spec.linux_mut() else { return Ok(()) };
    let Some(asked) = linux.resources() else { return Ok(()) };
    let split = split("linux.resources", asked)?;
    linux.set_resources(Some(split.guest));
    plan.cgroup.resources = split.host;
    plan.demand = split.demand;
    Ok(())
}

struct Split {
    guest: LinuxResources,
    host: LinuxResources,
    demand: Demand,
}

fn split(at: &str, asked: &LinuxResources) -> Result<Split> {
    refuse(at, asked)?;
    let mut split =
        Split { guest: asked.clone(), host: LinuxResources::default(), demand: Demand::default() };
    split.guest.set_block_io(None).set_hugepage_limits(None).set_network(None).set_rdma(None);
    if let Some(memory) = asked.memory() {
        check_memory(&format!("{at}.memory"), memory)?;
        split.demand.memory =
            memory.limit().and_then(|limit| limit.try_into().ok()).filter(|limit| *limit > 0);
    }
    if let Some(cpu) = asked.cpu() {
        split_cpu(&format!("{at}.cpu"), cpu, &mut split)?;
    }
    if let Some(block_io) = asked.block_io() {
        if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
            let why = "cgroup v2 has none";
            return Err(unsupported(format!("{at}.blockIO.leafWeight"), "", why, "use weight"));
        }
        let mut host = block_io.clone();
        // Docker writes what nobody has set as 0.
        host.set_leaf_weight(None).set_weight(block_io.weight().filter(|weight| *weight != 0));
        split.host.set_block_io((host != LinuxBlockIo::default()).then_some(host));
    }
    if let Some(unified) = asked.unified() {
        split_unified(&format!("{at}.unified"), unified, &mut split)?;
    }
    Ok(split)
}

/// What no guest has.
fn refuse(at: &str, asked: &LinuxResources) -> Result<()> {
    for (index, limit) in asked.hugepage_limits().iter().flatten().enumerate() {
        // kubelet limits every size that the host knows to none, for every container.
        if limit.limit() != 0 {
            let path = format!("{at}.hugepageLimits[{index}]");
            let asked = format!("{} of {}", limit.limit(), limit.page_size());
            return Err(unsupported(path, asked, "the guest has no huge pages to give", LEAVE_OUT));
        }
    }
    if let Some(name) = asked.rdma().iter().flatten().map(|(name, _)| name).min() {
        let path = format!("{at}.rdma.{name}");
        return Err(unsupported(path, "", "RDMA devices are not passed to guests", LEAVE_OUT));
    }
    if let Some(network) = asked.network() {
        let priorities = network.priorities().as_ref().is_some_and(|list| !list.is_empty());
        if priorities || network.class_id().is_some_and(|id| id != 0) {
            let why = "cgroup v2, which guests have, does not class packets";
            return Err(unsupported(format!("{at}.network"), "", why, LEAVE_OUT));
        }
    }
    Ok(())
}

fn check_memory(at: &str, memory: &LinuxMemory) -> Result<()> {
    let why = "cgroup v2, which guests have, has no such knob";
    for (name, value) in [("kernel", memory.kernel()), ("kernelTCP", memory.kernel_tcp())] {
        if let Some(value) = value.filter(|value| *value > 0) {
            return Err(unsupported(format!("{at}.{name}"), value, why, "use limit"));
        }
    }
    if let Some(value) = memory.swappiness() {
        return Err(unsupported(format!("{at}.swappiness"), value, why, LEAVE_OUT));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(unsupported(format!("{at}.disableOOMKiller"), true, why, LEAVE_OUT));
    }
    for (name, value) in
        [("limit", memory.limit()), ("swap", memory.swap()), ("reservation", memory.reservation())]
    {
        if let Some(value) = value.filter(|value| *value < -1) {
            return Err(invalid(
                format!("{at}.{name}"),
                value,
                "it is a number of bytes, or -1 for no limit",
            ));
        }
    }
    Ok(())
}

fn split_cpu(at: &str, cpu: &LinuxCpu, split: &mut Split) -> Result<()> {
    for (name, set) in [
        ("realtimeRuntime", cpu.realtime_runtime().is_some_and(|value| value != 0)),
        ("realtimePeriod", cpu.realtime_period().is_some_and(|value| value != 0)),
    ] {
        if set {
            let why = "cgroup v2, which guests have, does not schedule in real time";
            return Err(unsupported(format!("{at}.{name}"), "", why, LEAVE_OUT));
        }
    }
    let count = |name: &str, list: &Option<String>| match list.as_deref().filter(|list| !list.is_empty()) {
        None => Ok(None),
        Some(list) => numbers(list).map(Some).ok_or_else(|| {
            invalid(format!("{at}.{name}"), format!("{list:?}"), "it is a list of numbers, like 0-3,7")
        }),
    };
    let set = count("cpus", cpu.cpus())?;
    count("mems", cpu.mems())?;
    let quota = processors(cpu.quota(), cpu.period());
    split.demand.cpus = quota.into_iter().chain(set).min();

    let mut guest = cpu.clone();
    guest.set_cpus(None).set_mems(None);
    split.guest.set_cpu(Some(guest));
    let mut host = LinuxCpu::default();
    host.set_shares(cpu.shares().filter(|shares| *shares != 0))
        .set_cpus(cpu.cpus().clone())
        .set_mems(cpu.mems().clone());
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    if let Some(cpus) = quota {
        let whole = i64::from(cpus).saturating_mul(i64::try_from(period).unwrap_or(i64::MAX));
        host.set_quota(Some(whole)).set_period(Some(period));
    } else if cpu.quota().is_some() {
        host.set_quota(Some(-1)).set_period(Some(period));
    }
    split.host.set_cpu(Some(host));
    Ok(())
}

fn split_unified(at: &str, unified: &HashMap<String, String>, split: &mut Split) -> Result<()> {
    let mut guest = HashMap::new();
    let mut host = HashMap::new();
    let mut keys: Vec<_> = unified.iter().collect();
    keys.sort_unstable();
    for (key, value) in keys {
        let path = || format!("{at}.{key}");
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let controller = match key.split_once('.') {
            Some((controller, file)) if !file.is_empty() && key.chars().all(good) => controller,
            _ => return Err(invalid(path(), format!("{value:?}"), "it is CONTROLLER.FILE")),
        };
        match controller {
            "" | "cgroup" => {
                return Err(invalid(path(), format!("{value:?}"), "this is not a limit"));
            }
            "hugetlb" | "rdma" | "misc" | "dmem" => {
                let why = "it counts what a guest does not have";
                return Err(unsupported(path(), format!("{value:?}"), why, LEAVE_OUT));
            }
            "cpuset" | "io" => {
                host.insert(key.clone(), value.clone());
            }
            _ => {
                guest.insert(key.clone(), value.clone());
            }
        }
        match key.as_str() {
            "memory.max" => split.demand.memory = value.parse().ok().or(split.demand.memory),
            "cpu.max" => {
                let mut words = value.split_whitespace().map(str::parse::<i64>);
                let quota = words.next().and_then(std::result::Result::ok);
                let period =
                    words.next().and_then(std::result::Result::ok).and_then(|period| period.try_into().ok());
                split.demand.cpus = processors(quota, period).or(split.demand.cpus);
            }
            _ => {}
        }
    }
    split.guest.set_unified((!guest.is_empty()).then_some(guest));
    split.host.set_unified((!host.is_empty()).then_some(host));
    Ok(())
}

/// A quota in whole processors, rounded up. None, if there is no limit.
pub(crate) fn processors(quota: Option<i64>, period: Option<u64>) -> Option<u32> {
    let quota = u64::try_from(quota?).ok().filter(|quota| *quota > 0)?;
    let period = period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    Some(quota.div_ceil(period).try_into().unwrap_or(u32::MAX))
}

/// How many numbers a list like `0-3,7` has. No system has as many as a range could be made to say.
fn numbers(list: &str) -> Option<u32> {
    const MOST: u32 = 8192;
    let mut all = BTreeSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        all.extend(first..=last);
    }
    all.len().try_into().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Case;

    fn case(resources: &Value) -> Case {
        Case::with(&json!({ "linux": { "resources": resources } }))
    }

    /// Guest and host, without what is null.
    fn sides(resources: &Value) -> (Value, Value) {
        let plan = case(resources).plan();
        let guest = plan.guest.spec.linux().as_ref().unwrap().resources().clone();
        (serde_json::to_value(guest).unwrap(), serde_json::to_value(plan.cgroup.resources).unwrap())
    }

    #[test]
    fn each_side_has_its_part() {
        let throttle = json!([{ "major": 8, "minor": 0, "rate": 9 }]);
        let block_io = json!({ "blockIO": { "weight": 10, "throttleReadBpsDevice": throttle } });
        for (asked, guest, host) in [
            (json!({}), json!({}), json!({})),
            (
                json!({ "memory": { "limit": 1000, "swap": 2000, "reservation": 500, "disableOOMKiller": false },
                        "pids": { "limit": 10 } }),
                json!({ "memory": { "limit": 1000, "swap": 2000, "reservation": 500, "disableOOMKiller": false },
                        "pids": { "limit": 10 } }),
                json!({}),
            ),
            (
                json!({ "cpu": { "shares": 512, "quota": 150_000, "period": 100_000, "cpus": "0-1", "mems": "0",
                                 "burst": 5, "idle": 1, "realtimeRuntime": 0 } }),
                json!({ "cpu": { "shares": 512, "quota": 150_000, "period": 100_000, "burst": 5, "idle": 1,
                                 "realtimeRuntime": 0 } }),
                json!({ "cpu": { "shares": 512, "quota": 200_000, "period": 100_000, "cpus": "0-1", "mems": "0" } }),
            ),
            (block_io.clone(), json!({}), block_io.clone()),
            (
                json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }, { "pageSize": "1GB", "limit": 0 }],
                        "network": { "classID": 0 }, "rdma": {} }),
                json!({}),
                json!({}),
            ),
            (
                json!({ "unified": { "memory.high": "9", "io.max": "8:0 rbps=1", "cpuset.cpus": "1" } }),
                json!({ "unified": { "memory.high": "9" } }),
                json!({ "unified": { "io.max": "8:0 rbps=1", "cpuset.cpus": "1" } }),
            ),
        ] {
            assert_eq!(sides(&asked), (guest, host), "{asked}");
        }
    }

    #[test]
    fn what_no_guest_has() {
        for (asked, path) in [
            (json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 5 }] }), "hugepageLimits[0]"),
            (json!({ "rdma": { "mlx5_1": { "hcaHandles": 3 } } }), "rdma.mlx5_1"),
            (json!({ "network": { "classID": 7 } }), "network"),
            (json!({ "network": { "priorities": [{ "name": "eth0", "priority": 1 }] } }), "network"),
            (json!({ "memory": { "kernel": 7 } }), "memory.kernel"),
            (json!({ "memory": { "kernelTCP": 7 } }), "memory.kernelTCP"),
            (json!({ "memory": { "swappiness": 60 } }), "memory.swappiness"),
            (json!({ "memory": { "disableOOMKiller": true } }), "memory.disableOOMKiller"),
            (json!({ "memory": { "limit": -5 } }), "memory.limit"),
            (json!({ "cpu": { "realtimeRuntime": 1 } }), "cpu.realtimeRuntime"),
            (json!({ "cpu": { "realtimePeriod": 1 } }), "cpu.realtimePeriod"),
            (json!({ "cpu": { "cpus": "3-1" } }), "cpu.cpus"),
            (json!({ "cpu": { "cpus": "0-4294967295" } }), "cpu.cpus"),
            (json!({ "cpu": { "mems": "x" } }), "cpu.mems"),
            (json!({ "blockIO": { "leafWeight": 1 } }), "blockIO.leafWeight"),
            (json!({ "unified": { "hugetlb.2MB.max": "1" } }), "unified.hugetlb.2MB.max"),
            (json!({ "unified": { "cgroup.procs": "1" } }), "unified.cgroup.procs"),
            (json!({ "unified": { "../memory.max": "1" } }), "unified.../memory.max"),
            (json!({ "unified": { "memory": "1" } }), "unified.memory"),
        ] {
            assert_eq!(case(&asked).error().path(), format!("linux.resources.{path}"));
            let resources = serde_json::from_value(asked).unwrap();
            assert_eq!(update(&resources).unwrap_err().path(), format!("resources.{path}"));
        }
    }

    #[test]
    fn updates() {
        let resources = json!({ "memory": { "limit": 1 << 20 }, "cpu": { "quota": -1 } });
        let update = update(&serde_json::from_value(resources).unwrap()).unwrap();
        assert_eq!(update.demand, Demand { cpus: None, memory: Some(1 << 20) });
        assert_eq!(update.guest.memory().unwrap().limit(), Some(1 << 20));
        assert_eq!(update.host.cpu().as_ref().unwrap().quota(), Some(-1));
    }

    #[test]
    fn lists_of_numbers() {
        for (list, count) in [("0", Some(1)), ("0-3,7", Some(5)), ("1,1-2", Some(2)), ("", None), ("a", None)]
        {
            assert_eq!(numbers(list), count, "{list}");
        }
    }
}
