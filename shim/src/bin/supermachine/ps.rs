//! `supermachine ps`.

use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{StateRequest, Status};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use serde_json::json;
use shim::inventory::Entry;
use shim::process::Process;
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::context::with_duration;

use crate::{Failure, print, printable};

/// A shim that does not answer by then is said not to.
const ANSWER: Duration = Duration::from_secs(2);

struct Row {
    namespace: String,
    id: String,
    pod: String,
    status: String,
    pid: Option<u32>,
    monitor: Option<u32>,
    memory: Option<u64>,
}

/// Prints them.
pub fn list(entries: &[Entry], json: bool) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows: Vec<_> = entries.iter().map(|entry| runtime.block_on(row(entry))).collect();
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "namespace": row.namespace, "id": row.id, "pod": row.pod, "status": row.status,
                    "pid": row.pid, "monitor": row.monitor, "memory": row.memory,
                })
            })
            .collect();
        print(&format!("{:#}\n", json!(rows)));
    } else {
        print(&table(&rows));
    }
    Ok(())
}

async fn row(entry: &Entry) -> Row {
    let monitor = entry.monitor();
    let group = entry.paths.group();
    Row {
        namespace: entry.namespace.clone(),
        id: entry.id.clone(),
        pod: if group == entry.id { String::new() } else { group.to_owned() },
        status: status(entry).await,
        pid: entry.holder().map(|holder| holder.pid),
        monitor: monitor.map(|monitor| monitor.pid),
        memory: monitor.and_then(|monitor| memory(&monitor)),
    }
}

/// As its shim says.
async fn status(entry: &Entry) -> String {
    let asked = async {
        let stream = UnixStream::connect(entry.address()?).await.ok()?;
        let client = TaskClient::new(Client::new(ttrpc::asynchronous::transport::Socket::new(stream)));
        let request = StateRequest { id: entry.id.clone(), ..StateRequest::default() };
        let state = client.state(with_duration(ANSWER), &request).await.ok()?;
        Some(match state.status.enum_value().ok()? {
            Status::CREATED => "created",
            Status::RUNNING => "running",
            Status::STOPPED => "stopped",
            Status::PAUSED => "paused",
            Status::PAUSING => "pausing",
            Status::UNKNOWN => "unknown",
        })
    };
    timeout(ANSWER, asked).await.ok().flatten().unwrap_or("no answer").to_owned()
}

/// What it takes of the host, its share of what it shares with others.
fn memory(process: &Process) -> Option<u64> {
    let path = Path::new("/proc").join(process.pid.to_string()).join("smaps_rollup");
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn table(rows: &[Row]) -> String {
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let lines: Vec<[String; 7]> = rows
        .iter()
        .map(|row| {
            [
                printable(&row.namespace),
                printable(&row.id),
                if row.pod.is_empty() { "-".to_owned() } else { printable(&row.pod) },
                row.status.clone(),
                number(row.pid),
                number(row.monitor),
                row.memory.map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20)),
            ]
        })
        .collect();
    columns(&["NAMESPACE", "ID", "POD", "STATUS", "PID", "MONITOR", "MEMORY"], &lines)
}

/// A table whose columns are as wide as what is in them.
pub fn columns<const N: usize>(head: &[&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(str::to_owned);
    let lines: Vec<_> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<_> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_what_is_in_it() {
        let row = |id: &str, monitor, memory| Row {
            namespace: "default".into(),
            id: id.into(),
            pod: String::new(),
            status: "running".into(),
            pid: Some(7),
            monitor,
            memory,
        };
        assert_eq!(table(&[]), "NAMESPACE  ID  POD  STATUS  PID  MONITOR  MEMORY\n");
        assert_eq!(
            table(&[row("web", Some(12), Some(70 << 20)), row("long-name", None, None)]),
            "NAMESPACE  ID         POD  STATUS   PID  MONITOR  MEMORY\n\
             default    web        -    running  7    12       70 MiB\n\
             default    long-name  -    running  7    -        -\n"
        );
    }
}
