//! What a container uses, in containerd's own message.

use std::fs;
use std::path::Path;

use agent_api::METRICS_TYPE;
use agent_api::agent::StatsResponse;
use anyhow::{Context, Result};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use protobuf::{Message, MessageField};

use crate::cgroup::{Cgroup, keyed};

/// Of a container. Network counters are the machine's, which it shares with nobody but its pod.
pub fn of(cgroup: &Cgroup) -> Result<StatsResponse> {
    let text = |file: &str| cgroup.read(file).ok();
    let number = |file: &str| text(file).map_or(0, |text| limit(&text));
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids.current"),
            // No limit is 0 here, and the largest number elsewhere.
            limit: text("pids.max").and_then(|text| text.trim().parse().ok()).unwrap_or(0),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(
            &cgroup.read("cpu.stat").context("reading cpu.stat")?,
            text("cpu.pressure"),
        )),
        memory: MessageField::some(MemoryStat {
            usage: number("memory.current"),
            usage_limit: number("memory.max"),
            max_usage: number("memory.peak"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            swap_max_usage: number("memory.swap.peak"),
            psi: pressure(text("memory.pressure")),
            ..memory(&text("memory.stat").unwrap_or_default())
        }),
        memory_events: MessageField::some(memory_events(&text("memory.events").unwrap_or_default())),
        io: MessageField::some(IOStat {
            usage: io(&text("io.stat").unwrap_or_default()),
            psi: pressure(text("io.pressure")),
            ..IOStat::default()
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma(&text("rdma.current").unwrap_or_default()),
            limit: rdma(&text("rdma.max").unwrap_or_default()),
            ..RdmaStat::default()
        }),
        hugetlb: hugetlb(cgroup),
        network: network(&fs::read_to_string("/proc/net/dev").unwrap_or_default()),
        ..Metrics::default()
    };
    let value = metrics.write_to_bytes().context("packing metrics")?;
    Ok(StatsResponse { type_url: METRICS_TYPE.to_owned(), value, ..StatsResponse::default() })
}

/// A number; none at all is the largest.
fn limit(text: &str) -> u64 {
    let text = text.trim();
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

fn cpu(text: &str, psi: Option<String>) -> CPUStat {
    let of = |key: &str| keyed(text, key).unwrap_or(0);
    CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        psi: pressure(psi),
        ..CPUStat::default()
    }
}

fn memory(text: &str) -> MemoryStat {
    let of = |key: &str| keyed(text, key).unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        // Newer kernels tell these apart by what is refaulted.
        workingset_refault: of("workingset_refault_anon") + of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_anon") + of("workingset_activate_file"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        ..MemoryStat::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let of = |key: &str| keyed(text, key).unwrap_or(0);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and a line for `full`.
fn pressure(text: Option<String>) -> MessageField<PSIStats> {
    let Some(text) = text else { return MessageField::none() };
    let line = |kind: &str| {
        let Some(line) = text.lines().find_map(|line| line.strip_prefix(kind)) else {
            return MessageField::none();
        };
        let of = |key: &str| {
            line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')).unwrap_or("0")
        };
        MessageField::some(PSIData {
            avg10: of("avg10").parse().unwrap_or(0.0),
            avg60: of("avg60").parse().unwrap_or(0.0),
            avg300: of("avg300").parse().unwrap_or(0.0),
            total: of("total").parse().unwrap_or(0),
            ..PSIData::default()
        })
    };
    MessageField::some(PSIStats { some: line("some"), full: line("full"), ..PSIStats::default() })
}

/// `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let of = |key: &str| {
            let word = rest.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            word.and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: of("rbytes"),
            wbytes: of("wbytes"),
            rios: of("rios"),
            wios: of("wios"),
            ..IOEntry::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

/// `mlx5_0 hca_handle=2 hca_object=max`
fn rdma(text: &str) -> Vec<RdmaEntry> {
    let entry = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let of = |key: &str| {
            let word = rest.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            word.map_or(0, |word| word.parse().unwrap_or(u32::MAX))
        };
        Some(RdmaEntry {
            device: device.to_owned(),
            hca_handles: of("hca_handle"),
            hca_objects: of("hca_object"),
            ..RdmaEntry::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

fn hugetlb(cgroup: &Cgroup) -> Vec<HugeTlbStat> {
    let size = |path: &Path| {
        path.file_name()?.to_str()?.strip_prefix("hugetlb.")?.strip_suffix(".current").map(str::to_owned)
    };
    let Ok(entries) = fs::read_dir(cgroup.path()) else { return Vec::new() };
    let paths = entries.filter_map(std::result::Result::ok).map(|entry| entry.path());
    let mut sizes: Vec<String> =
        paths.filter_map(|path| size(&path)).filter(|size| !size.contains('.')).collect();
    sizes.sort();
    let number = |file: String| cgroup.read(&file).map_or(0, |text| limit(&text));
    sizes
        .into_iter()
        .map(|pagesize| HugeTlbStat {
            current: number(format!("hugetlb.{pagesize}.current")),
            max: number(format!("hugetlb.{pagesize}.max")),
            failcnt: cgroup.keyed(&format!("hugetlb.{pagesize}.events"), "max").unwrap_or(0),
            pagesize,
            ..HugeTlbStat::default()
        })
        .collect()
}

/// Lines of `/proc/net/dev`, less loopback.
fn network(text: &str) -> Vec<NetworkStat> {
    let entry = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let name = name.trim();
        let numbers: Vec<u64> = rest.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let &[
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = numbers.as_slice()
        else {
            return None;
        };
        (name != "lo").then(|| NetworkStat {
            name: name.to_owned(),
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..NetworkStat::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_none() {
        for (text, number) in [("5\n", 5), ("max\n", u64::MAX), ("", 0), ("x", 0)] {
            assert_eq!(limit(text), number, "{text:?}");
        }
    }

    #[test]
    fn pressures() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.10 total=3\n";
        let psi = pressure(Some(text.to_owned()));
        assert_eq!((psi.some.avg10, psi.some.avg60, psi.some.total), (1.5, 0.25, 12));
        assert_eq!((psi.full.avg300, psi.full.total), (0.1, 3));
        assert!(pressure(None).is_none());
    }

    #[test]
    fn disks() {
        let found = io("254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:16 \nbroken\n");
        assert_eq!(found.len(), 2);
        assert_eq!(
            (found[0].major, found[0].rbytes, found[0].wbytes, found[0].rios, found[0].wios),
            (254, 1, 2, 3, 4)
        );
    }

    #[test]
    fn devices_of_rdma() {
        let found = rdma("mlx5_0 hca_handle=2 hca_object=max\n");
        assert_eq!((found[0].hca_handles, found[0].hca_objects), (2, u32::MAX));
    }

    #[test]
    fn interfaces() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  \
                    eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let found = network(text);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].rx_dropped, found[0].tx_bytes), ("eth0", 4, 9));
    }
}
