//! What pods can do, by the words with which one asks for it: of a pod's specification, or of `kubectl`.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use integration::containerd::refusal;
use integration::cri::channels::{DATA, ERROR, RESIZE, STDOUT};
use integration::cri::messages::{
    Capability, ContainerConfig, ContainerMetadata, CpuUsage, DnsConfig, Int64Value, KeyValue,
    LinuxContainerResources, LinuxContainerSecurityContext, MemoryUsage, NamespaceMode, PortMapping,
    ProfileType, SecurityProfile,
};
use integration::wait::{Attempt, until};

use super::node::{Node, linux, mount, namespaces, resources, security};
use crate::client::{A_WHILE, Feature, often, other, seldom};

/// What a node says of a feature, which is compared.
pub type Does = fn(&Node<'_>) -> Result<String>;

pub const FEATURES: &[Feature<Does>] = &[
    often("containers", containers),
    seldom("initContainers, restartPolicy", again),
    seldom("terminationGracePeriodSeconds", grace),
    often("kubectl delete pod", deleted),
    seldom("kubectl logs", logs),
    often("kubectl exec, probes, lifecycle", execs),
    seldom("kubectl exec -it", terminal),
    seldom("kubectl attach -i", attached),
    often("kubectl port-forward", forwarded),
    seldom("kubectl top", usage),
    seldom("kubectl debug --target", debug),
    seldom("podIPs", addresses),
    seldom("hostPort", host_port),
    seldom("hostname, dnsConfig, sysctls", names),
    other("hostNetwork", "refused: a machine has a network of its own", |node| {
        let pod = node.pod_with(|config| {
            namespaces(config).network = NamespaceMode::Node.into();
            // It has the host's.
            config.hostname.clear();
        })?;
        pod.run("one", "exit 0")?.ended()
    }),
    other("hostPID", "refused: a machine has processes of its own", |node| {
        let pod = node.pod_with(|config| namespaces(config).pid = NamespaceMode::Node.into())?;
        pod.run("one", "exit 0")?.ended()
    }),
    other("hostIPC", "refused: a machine has its own", |node| {
        let pod = node.pod_with(|config| namespaces(config).ipc = NamespaceMode::Node.into())?;
        pod.run("one", "exit 0")?.ended()
    }),
    seldom("shareProcessNamespace", processes),
    seldom("resources.limits", limits),
    seldom("resources, changed in place", resized),
    seldom("securityContext", rights),
    seldom("volumes: hostPath, emptyDir, configMap", volumes),
    seldom("emptyDir.medium: Memory, /dev/shm", memory),
];

/// A page of a server's, which may have to begin.
fn get(address: &str, port: u16) -> Result<String> {
    let address = SocketAddr::new(address.parse()?, port);
    let page = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = until("a page", A_WHILE, || match page() {
        Ok(answer) if answer.split(' ').nth(1) == Some("200") => Attempt::Done(answer),
        other => Attempt::Pending(format!("{other:?}")),
    })?;
    Ok(answer.split_once("\r\n\r\n").context("an answer without a page")?.1.to_owned())
}

const SERVE: &str = "mkdir -p /www; echo page >/www/index.html; exec httpd -f -h /www -p";
/// Gets the page of `$1`, which may have to begin.
const GET: &str = "get() { for i in 1 2 3 4 5 6 7 8 9; do wget -qO- -T 5 http://$1/ && return; sleep 0.5; done; echo none; }";

fn containers(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let web = pod.run("web", &format!("{SERVE} 127.0.0.1:80"))?;
    let asks = pod.run_with(
        "asks",
        &format!("{GET}; get 127.0.0.1; hostname; pwd; echo $A >&2; exit 3"),
        |config| {
            config.working_dir = "/tmp".into();
            config.envs.push(KeyValue { key: "A".into(), value: "b".into() });
        },
    )?;
    let mut said = asks.ended()? + "\n" + &asks.logged("stdout")? + &asks.logged("stderr")?;
    let ready = node.cri.sandbox(&pod.id)?.state();
    writeln!(said, "{:?} {ready:?}", web.state()?)?;
    Ok(said)
}

/// What runs to its end first, and what is made again as it ended, has what is left in the pod.
fn again(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let volume = node.ctx.path(&format!("volume-{}", node.handler));
    fs::create_dir_all(&volume)?;
    let mut said = String::new();
    for (attempt, code) in [(0, 0), (1, 7), (2, 0)] {
        let script = format!("echo {attempt} >>/v/f; cat /v/f; hostname; exit {code}");
        let one = pod.run_with("one", &script, |config| {
            config.metadata = Some(ContainerMetadata { name: "one".into(), attempt });
            config.mounts.push(mount(&volume, "/v", false));
            config.log_path = format!("{attempt}.log");
        })?;
        said += &one.ended()?;
        said += &fs::read_to_string(one.log.with_file_name(format!("{attempt}.log")))?
            .lines()
            .filter_map(|line| Some(line.split_once(' ')?.1.to_owned() + "\n"))
            .collect::<String>();
        node.cri.remove(&one.id)?;
    }
    Ok(said)
}

fn grace(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let polite = pod.run("polite", "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done")?;
    let deaf = pod.run("deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done")?;
    polite.until_logged("up")?;
    deaf.until_logged("up")?;
    Ok([polite.stop(Duration::from_secs(60))?, polite.logged("stdout")?, deaf.stop(Duration::from_secs(1))?]
        .join("\n"))
}

fn deleted(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let two = [pod.run("one", "sleep 1000")?, pod.run("two", "sleep 1000 & exec sleep 1001")?];
    node.cri.stop_sandbox(&pod.id)?;
    let mut said = format!("{:?}", node.cri.sandbox(&pod.id)?.state());
    for one in &two {
        write!(said, " {}", one.ended()?)?;
    }
    node.cri.remove_sandbox(&pod.id)?;
    // A container that is not there has no state.
    let gone = two[0].state().err().and_then(|error| refusal(&error).map(|(code, _)| code));
    writeln!(said, " {gone:?} {}", node.cri.sandboxes()?.len())?;
    Ok(said)
}

fn logs(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let script =
        "echo out; echo err >&2; printf whole; sleep 0.5; echo ' line'; seq 1 20000 | tr '\\n' ' '; echo
        until [ -e /go ]; do sleep 0.1; done; echo after; printf end";
    let one = pod.run("one", script)?;
    until("what is long to be logged", A_WHILE, || match one.logged("stdout") {
        Ok(said) if said.ends_with("20000 \n") => Attempt::Done(()),
        other => Attempt::Pending(format!("{:?}", other.map(|said| said.len()))),
    })?;
    let mut said = one.logged("stdout")? + &one.logged("stderr")?;
    fs::rename(&one.log, one.log.with_extension("old"))?;
    node.cri.reopen_log(&one.id)?;
    one.exec(&["touch", "/go"])?;
    writeln!(said, "{}", one.ended()?)?;
    said += &one.logged("stdout")?;
    Ok(said)
}

fn execs(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let one = pod.run("one", "sleep 1000")?;
    let mut said = format!("{:?}\n", one.exec(&["sh", "-c", "echo out; echo err >&2; pwd; exit 4"])?);
    let (code, long, _) = one.exec(&["seq", "1", "100000"])?;
    writeln!(said, "{code} {}", long.len())?;
    let no_such = one.exec(&["no-such-program"]).err();
    writeln!(said, "{:?}", no_such.and_then(|error| refusal(&error).map(|(code, _)| code)))?;
    // What takes too long is over.
    let late = node.cri.exec(&one.id, &["sleep", "777"], 1).err();
    writeln!(said, "{:?}", late.and_then(|error| refusal(&error).map(|(code, _)| code)))?;
    until("what took too long to be over", A_WHILE, || {
        match one.exec(&["sh", "-c", "ps | grep '[s]leep 777'"]) {
            Ok((1, _, _)) => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        }
    })?;
    Ok(said)
}

fn terminal(node: &Node<'_>) -> Result<String> {
    let one = node.pod()?.run("one", "sleep 1000")?;
    let script = "test -t 0 && test -t 1 && echo terminal
        until [ \"$(stty size 2>/dev/null)\" = '40 100' ]; do sleep 0.1; done; echo resized; read line; echo got $line; exit 5";
    let mut streams = node.cri.exec_on_terminal(&one.id, &["sh", "-c", script])?;
    streams.until_heard(STDOUT, "terminal")?;
    streams.send(RESIZE, br#"{"Width":100,"Height":40}"#)?;
    streams.until_heard(STDOUT, "resized")?;
    streams.send(DATA, b"typed\n")?;
    streams.until_closed()?;
    Ok(streams.heard(STDOUT) + &streams.heard(ERROR))
}

fn attached(node: &Node<'_>) -> Result<String> {
    let script = "echo up; read line; echo got $line; exit 4";
    let one = node.pod()?.run_with("one", script, |config| config.stdin = true)?;
    one.until_logged("up")?;
    let mut streams = node.cri.attach(&one.id)?;
    streams.send(DATA, b"typed\n")?;
    streams.until_heard(STDOUT, "got typed")?;
    Ok(streams.heard(STDOUT) + &one.ended()? + "\n" + &one.logged("stdout")?)
}

fn forwarded(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let mut said = String::new();
    for (port, address) in [(80, "127.0.0.1"), (81, "[::1]")] {
        let web = pod.run(&format!("web-{port}"), &format!("{SERVE} {address}:{port}"))?;
        said += &web.says(&format!("{GET}; get {address}:{port}"))?;
        for _ in 0..2 {
            let mut streams = node.cri.forward(&pod.id, port)?;
            streams.send(DATA, b"GET / HTTP/1.0\r\n\r\n")?;
            streams.until_heard(DATA, "page\n")?;
            said += "forwarded\n";
        }
    }
    // To a port on which nobody listens; it may seem so for a moment.
    let mut streams = node.cri.forward(&pod.id, 82)?;
    streams.until_closed()?;
    let why = streams.heard(STDOUT);
    node.ctx.note(why.trim_matches('\0'));
    writeln!(said, "nobody: {}", why.contains("refused") || why.contains("reset"))?;
    Ok(said)
}

fn usage(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let one = pod.run("one", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo done; sleep 1000")?;
    one.until_logged("done")?;
    let usage = node.cri.usage(&one.id)?;
    let used = |cpu: Option<CpuUsage>, memory: Option<MemoryUsage>| {
        let cpu = cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map(|used| used.value > 10_000_000);
        let memory = memory.and_then(|memory| memory.working_set_bytes).map(|used| used.value > 100_000);
        format!("processor {cpu:?}, memory {memory:?}\n")
    };
    let mut said = used(usage.cpu, usage.memory);
    let all = node.cri.sandbox_usage(&pod.id)?;
    said += &used(all.cpu, all.memory);
    let interface = all.network.and_then(|network| network.default_interface).map(|one| one.name);
    writeln!(said, "{interface:?} {}", all.containers.len())?;
    Ok(said)
}

fn debug(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let target = pod.run("target", "exec sleep 1234")?;
    let debugger = pod.run_with(
        "debugger",
        "ps | grep -c '[s]leep 1234'; cat /proc/1/cmdline | tr '\\0' ' '",
        |config| {
            let namespaces = security(config).namespace_options.get_or_insert_default();
            namespaces.pid = NamespaceMode::Target.into();
            namespaces.target_id.clone_from(&target.id);
        },
    )?;
    Ok(debugger.ended()? + "\n" + &debugger.logged("stdout")?)
}

fn addresses(node: &Node<'_>) -> Result<String> {
    let web = node.pod()?;
    web.run("web", &format!("{SERVE} [::]:80"))?;
    let addresses = web.addresses()?;
    let mut said = String::new();
    for address in &addresses {
        said += &get(address, 80)?;
    }
    let asks = node.pod()?;
    let [v4, v6] = &addresses[..] else { anyhow::bail!("the pod has {addresses:?}") };
    let script = format!("{GET}; get {v4}; get [{v6}]; ls /sys/class/net");
    let asks = asks.run("asks", &script)?;
    said += &asks.ended()?;
    said += &asks.logged("stdout")?;
    Ok(said)
}

fn host_port(node: &Node<'_>) -> Result<String> {
    let pod = node.pod_with(|config| {
        config.port_mappings.push(PortMapping { container_port: 80, host_port: 8080 });
    })?;
    pod.run("web", &format!("{SERVE} [::]:80"))?;
    Ok(get("127.0.0.1", 8080)? + &get("10.88.0.1", 8080)?)
}

fn names(node: &Node<'_>) -> Result<String> {
    let hosts = node.ctx.path("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n10.1.2.3 there\n")?;
    let pod = node.pod_with(|config| {
        config.hostname = "name".into();
        config.dns_config = Some(DnsConfig {
            servers: words(&["10.9.9.9"]),
            searches: words(&["default.svc.cluster.local", "cluster.local"]),
            options: words(&["ndots:5"]),
        });
        linux(config).sysctls.insert("net.ipv4.ip_default_ttl".into(), "77".into());
        linux(config).sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    })?;
    let script = "hostname; cat /etc/hostname /etc/resolv.conf /etc/hosts
        cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shm_rmid_forced";
    let one = pod.run_with("one", script, |config| config.mounts.push(mount(&hosts, "/etc/hosts", false)))?;
    Ok(one.ended()? + "\n" + &one.logged("stdout")?)
}

fn processes(node: &Node<'_>) -> Result<String> {
    let pod = node.pod_with(|config| namespaces(config).pid = NamespaceMode::Pod.into())?;
    pod.run("one", "exec sleep 1234")?;
    let script = "cat /proc/1/cmdline | tr '\\0' ' '; echo; until one=$(ps | grep '[s]leep 1234'); do sleep 0.1; done; kill $(echo $one | cut -d' ' -f1); echo $?";
    let two = pod.run("two", script)?;
    Ok(two.ended()? + "\n" + &two.logged("stdout")?)
}

const MIB: i64 = 1 << 20;

fn limits(node: &Node<'_>) -> Result<String> {
    let pod = node.pod_with(|config| {
        let limits = LinuxContainerResources { memory_limit_in_bytes: 96 * MIB, ..Default::default() };
        linux(config).resources = Some(limits);
    })?;
    let hog = pod.run_with("hog", "tail /dev/zero", |config| {
        resources(config).memory_limit_in_bytes = 32 * MIB;
    })?;
    let script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max; cat /proc/self/oom_score_adj";
    let one = pod.run_with("one", script, |config| {
        let limits = resources(config);
        (limits.cpu_period, limits.cpu_quota, limits.cpu_shares) = (100_000, 50_000, 512);
        limits.memory_limit_in_bytes = 64 * MIB;
        limits.oom_score_adj = 900;
    })?;
    Ok([hog.ended()?, one.ended()?, one.logged("stdout")?].join("\n"))
}

fn resized(node: &Node<'_>) -> Result<String> {
    let pod = node.pod()?;
    let one = pod.run_with("one", "exec sleep 1000", |config| {
        resources(config).memory_limit_in_bytes = 64 * MIB;
    })?;
    let wanted = LinuxContainerResources {
        memory_limit_in_bytes: 48 * MIB,
        cpu_period: 100_000,
        cpu_quota: 25_000,
        ..Default::default()
    };
    node.cri.update(&one.id, wanted)?;
    one.says("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
}

type Change = fn(&mut LinuxContainerSecurityContext);

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn rights(node: &Node<'_>) -> Result<String> {
    let pod = node.pod_with(|config| {
        linux(config).security_context.get_or_insert_default().privileged = true;
    })?;
    let script = "id; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; touch /x 2>&1; cat /proc/kcore 2>&1 | head -c 1 | wc -c";
    let changes: [(&str, Change); 5] = [
        ("usual", |security| {
            security.masked_paths = words(&["/proc/kcore"]);
            security.readonly_paths = words(&["/proc/sys"]);
        }),
        ("user", |security| {
            security.run_as_user = Some(Int64Value { value: 1000 });
            security.run_as_group = Some(Int64Value { value: 2000 });
            security.supplemental_groups = vec![3000];
            security.no_new_privs = true;
        }),
        ("readonly", |security| security.readonly_rootfs = true),
        ("capabilities", |security| {
            security.capabilities = Some(Capability {
                add_capabilities: words(&["NET_ADMIN"]),
                drop_capabilities: words(&["ALL"]),
            });
            security.seccomp = Some(SecurityProfile { profile_type: ProfileType::RuntimeDefault.into() });
        }),
        ("privileged", |security| security.privileged = true),
    ];
    let mut said = String::new();
    for (name, change) in changes {
        let one = pod.run_with(name, script, |config| change(security(config)))?;
        writeln!(said, "{name}: {}\n{}", one.ended()?, one.logged("stdout")?)?;
    }
    Ok(said)
}

fn volumes(node: &Node<'_>) -> Result<String> {
    let root = node.ctx.path(&format!("volumes-{}", node.handler));
    // A ConfigMap, as a kubelet writes it.
    let map = root.join("map");
    fs::create_dir_all(map.join("..1"))?;
    fs::create_dir_all(root.join("empty"))?;
    fs::write(map.join("..1/key"), "old\n")?;
    std::os::unix::fs::symlink("..1", map.join("..data"))?;
    std::os::unix::fs::symlink("..data/key", map.join("key"))?;
    let pod = node.pod()?;
    let mounts = |config: &mut ContainerConfig| {
        config.mounts.push(mount(&map, "/map", true));
        config.mounts.push(mount(&map.join("..1/key"), "/file", true));
        config.mounts.push(mount(&root.join("empty"), "/empty", false));
    };
    let one = pod.run_with("one", "sleep 1000", mounts)?;
    let two = pod.run_with("two", "sleep 1000", mounts)?;
    let mut said =
        one.says("cat /map/key /file; touch /map/x 2>/dev/null || echo readonly; echo one >/empty/f")?;
    said += &two.says("cat /empty/f; echo two >>/empty/f; mkfifo /empty/p")?;
    said += &fs::read_to_string(root.join("empty/f"))?;
    // It is changed, all at once.
    fs::create_dir_all(map.join("..2"))?;
    fs::write(map.join("..2/key"), "new\n")?;
    std::os::unix::fs::symlink("..2", map.join("..new"))?;
    fs::rename(map.join("..new"), map.join("..data"))?;
    said += &one.says("until grep -q new /map/key; do sleep 0.1; done; cat /map/key /file")?;
    Ok(said)
}

fn memory(node: &Node<'_>) -> Result<String> {
    let place = node.ctx.path(&format!("memory-{}", node.handler));
    fs::create_dir_all(&place)?;
    node.ctx.cmd("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&place).ok()?;
    let used = || -> Result<String> {
        let pod = node.pod()?;
        let mounts = |config: &mut ContainerConfig| config.mounts.push(mount(&place, "/m", false));
        let one = pod.run_with("one", "sleep 1000", mounts)?;
        let two = pod.run_with("two", "sleep 1000", mounts)?;
        let mut said = one.says(
            "echo there >/m/f; echo shared >/dev/shm/g; df -k /m /dev/shm | tail -n +2 | tr -s ' ' | cut -d' ' -f2,6
            head -c 2000000 /dev/zero >/m/large 2>/dev/null || echo full; rm /m/large",
        )?;
        said += &two.says("cat /m/f /dev/shm/g")?;
        node.cri.stop_sandbox(&pod.id)?;
        said += &fs::read_to_string(place.join("f"))?;
        Ok(said)
    };
    let said = used();
    node.tidy()?;
    node.ctx.cmd("umount").arg(&place).ok()?;
    said
}
