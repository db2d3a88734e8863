//! Docker, as Debian has it.

use std::time::Duration;

use anyhow::{Context, Result};
use integration::command::Running;
use integration::wait::{Attempt, until};
use integration::{Ctx, Outcome, Rounds, Test};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{A_WHILE, Feature, Said, chosen, compare, often, other, seldom, without_firewall};
use crate::world::{Inside, RUNC};

/// The runtime under test.
const OURS: &str = "io.containerd.supermachine.v2";

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "client.docker",
        proves: "what people do with docker they can do with machines, as docs/clients.md tells",
        run: features,
        deadline: Duration::from_mins(40),
        rounds: Rounds::once_or(1),
        tags: &["client"],
    }]
}

/// What scripts have at hand.
const WORDS: &str = include_str!("docker.sh");

/// A script that does something with `$RUNTIME`, where the daemon's default is called `$DEFAULT`, in an empty directory,
/// and ends with 0 if it could.
type Script = &'static str;

const FEATURES: &[Feature<Script>] = &[
    often(
        "docker run",
        "run --rm busybox sh -c 'echo out; echo err >&2; id -u; pwd; exit 42' 2>err || echo $?; cat err
        echo typed | run -i --rm busybox cat
        run --rm busybox /nonexistent 2>/dev/null || echo $?",
    ),
    seldom(
        "docker run -it",
        "terminal docker run --runtime $RUNTIME -it --rm busybox sh -c 'test -t 0 && test -t 1 && echo terminal; exit 5' ||
            echo $?",
    ),
    seldom(
        "docker run -d, logs, wait, ps, rm",
        "begin --name box busybox sh -c 'for i in 1 2 3; do echo $i; sleep 0.2; done; exit 6'
        docker logs -f box; docker wait box; docker logs --tail 1 box
        docker ps -a --format '{{.Names}} {{.Image}} {{.Command}}'; docker rm box; docker ps -aq",
    ),
    seldom(
        "docker exec",
        "begin --name box busybox sleep 1000
        docker exec -w /tmp -e A=b -u 1:2 box sh -c 'pwd; echo $A; id; exit 3' || echo $?
        seq 100000 | docker exec -i box md5sum
        terminal docker exec -it box sh -c 'test -t 1 && echo terminal'
        docker exec box no-such-program >/dev/null 2>&1 || echo $?",
    ),
    seldom(
        "docker attach",
        "begin -i --name box busybox sh -c 'echo up; read line; echo got $line; exit 4'
        soon says box up; echo typed | docker attach box || echo $?",
    ),
    seldom(
        "docker cp",
        "begin --name box busybox sleep 1000
        echo there >f; docker cp -q f box:/tmp/g; docker exec box cat /tmp/g
        docker exec box sh -c 'echo back >/tmp/h'; docker cp -q box:/tmp/h i; cat i",
    ),
    seldom(
        "docker stats",
        "begin --name box busybox sh -c 'sleep 1000 & sleep 1000'
        line=$(docker stats --no-stream --format '{{.Name}} {{.PIDs}} {{.MemUsage}}' box)
        echo $line | cut -d' ' -f1,2
        case $line in *' 0B /'*) echo no memory; esac",
    ),
    other(
        "docker top",
        "shows one process of the host, which stands for the container",
        "begin --name box busybox sh -c 'sleep 1000 & exec sleep 1001'
        docker top box -eo pid,args | tail -n +2 | sed 's/ *[0-9]* *//'",
    ),
    seldom(
        "docker pause, unpause",
        "begin --name box busybox sh -c 'while echo tick; do sleep 0.1; done'
        soon says box tick; docker pause box; state box Status
        one=$(docker logs box | wc -l); sleep 2; two=$(docker logs box | wc -l); echo $((two - one)) more
        docker unpause box; state box Status
        soon sh -c \"[ \\$(docker logs box | wc -l) -gt $two ]\"",
    ),
    seldom(
        "docker stop, start, restart, kill",
        "begin --name box busybox sh -c 'trap \"echo bye; exit 9\" TERM; echo up; while :; do sleep 0.1; done'
        soon says box up; docker stop -t 20 box; state box ExitCode; docker logs box
        docker start box; state box Status; docker restart -t 0 box; state box Status
        docker kill box; docker wait box",
    ),
    seldom(
        "docker run --restart",
        "begin --name box --restart on-failure:2 busybox sh -c 'echo again; exit 1'
        soon sh -c '[ \"$(docker logs box | wc -l)\" = 3 ]'; soon is box Status exited
        docker inspect -f '{{.RestartCount}} {{.State.ExitCode}}' box",
    ),
    often(
        "docker run -p",
        "begin --name box -p 8080:80 busybox sh -c 'mkdir /www; echo page >/www/index.html; exec httpd -f -h /www'
        begin --name other -p 9090:90/udp -v $GUEST_PART:/part busybox sh -c '/part serve-udp 90; exit 1'
        soon get http://127.0.0.1:8080/
        get http://127.0.0.1:8080/; get http://172.17.0.1:8080/; get 'http://[::1]:8080/'; datagram 9090; docker port box",
    ),
    often(
        "docker network, names by DNS",
        "docker network create n >/dev/null
        begin --name web --network n --network-alias alias busybox sh -c 'mkdir /www; echo page >/www/index.html; exec httpd -f -h /www'
        run --rm --network n busybox sh -c '
            for i in 1 2 3 4 5 6 7 8 9; do wget -qO- -T 5 http://web/ && break; sleep 0.5; done
            wget -qO- http://alias/; nslookup no-such-name >/dev/null || echo unknown; cat /etc/resolv.conf'
        docker exec web nslookup -type=a web | grep -c Address
        docker network inspect -f '{{len .Containers}}' n",
    ),
    seldom(
        "docker network connect, disconnect",
        "docker network create n >/dev/null
        begin --name web --network n --network-alias web busybox sh -c 'mkdir /www; echo page >/www/index.html; exec httpd -f -h /www'
        begin --name box busybox sleep 1000
        docker exec box ls /sys/class/net; docker network connect n box
        soon docker exec box test -e /sys/class/net/eth1
        soon docker exec box wget -qO- -T 5 http://web/; docker exec box wget -qO- -T 5 http://web/
        docker network disconnect n box; soon docker exec box test ! -e /sys/class/net/eth1",
    ),
    seldom(
        "docker network create --ipv6",
        "docker network create --ipv6 --subnet fd00:77:77::/64 n >/dev/null
        begin --name web --network n --ip6 fd00:77:77::77 busybox sh -c '
            mkdir /www; echo page >/www/index.html; exec httpd -f -p [::]:80 -h /www'
        run --rm --network n busybox sh -c '
            for i in 1 2 3 4 5 6 7 8 9; do wget -qO- -T 5 http://[fd00:77:77::77]/ && break; sleep 0.5; done'",
    ),
    seldom("docker run --network none", "run --rm --network none busybox sh -c 'ls /sys/class/net; ip route'"),
    seldom(
        "docker run --network container:",
        "begin --name web busybox sh -c 'mkdir -p /www; echo page >/www/index.html; exec httpd -f -p 127.0.0.1:80 -h /www'
        run --rm --network container:web busybox sh -c '
            for i in 1 2 3 4 5 6 7 8 9; do wget -qO- -T 5 http://127.0.0.1/ && break; sleep 0.5; done; ls /sys/class/net'
        run --rm --network container:web --pid container:web busybox sh -c 'ps | grep -o \"[h]ttpd -f.*\"'
        begin --name side --network container:web busybox sleep 1000
        docker restart -t 0 web; soon docker exec web wget -qO- -T 5 http://127.0.0.1/
        soon docker exec side test ! -e /sys/class/net/eth0; docker exec side ls /sys/class/net
        docker restart -t 0 side; docker exec side wget -qO- -T 5 http://127.0.0.1/",
    ),
    other(
        "docker run --network host",
        "refused: a machine has a network of its own",
        "run --rm --network host busybox true && echo ran",
    ),
    seldom(
        "docker run -v, --mount",
        "mkdir v; echo host >v/f
        run --rm -v $PWD/v:/v busybox sh -c 'cat /v/f; echo guest >/v/g'; cat v/g
        run --rm -v vol:/d busybox sh -c 'echo kept >/d/x'
        run --rm -v vol:/d:ro busybox sh -c 'cat /d/x; touch /d/y' 2>/dev/null || echo $?
        run --rm --mount type=bind,src=$PWD/v/f,dst=/etc/f,readonly busybox cat /etc/f; docker volume rm vol",
    ),
    seldom(
        "docker run --tmpfs, --shm-size",
        "run --rm --tmpfs /t:size=1m,mode=1770 --shm-size 8m busybox sh -c '
            stat -c %a /t; df -k /t /dev/shm | tail -n +2 | tr -s \" \" | cut -d\" \" -f2,6
            head -c 2000000 /dev/zero >/t/f 2>/dev/null || echo full'",
    ),
    seldom("docker run --read-only", "run --rm --read-only busybox touch /x 2>&1 || echo $?"),
    seldom(
        "docker run --memory",
        "run --rm -m 64m busybox cat /sys/fs/cgroup/memory.max
        run --name box -m 32m busybox sh -c 'tail /dev/zero' 2>/dev/null || echo $?; state box OOMKilled",
    ),
    seldom(
        "docker update",
        "begin --name box -m 64m busybox sleep 1000
        docker update -m 48m --memory-swap 48m box; docker exec box cat /sys/fs/cgroup/memory.max",
    ),
    seldom(
        "docker run --cpus, --pids-limit, --ulimit",
        "run --rm --cpus 0.5 --pids-limit 77 --ulimit nofile=100:200 busybox sh -c '
            cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; ulimit -n; ulimit -Hn'",
    ),
    seldom(
        "docker run --cap-drop, --cap-add, --privileged, --user",
        "for words in '--cap-drop ALL' '--cap-add NET_ADMIN' --privileged '-u 7:8'; do
            run --rm $words busybox sh -c 'id; grep -E ^Cap /proc/self/status'
        done",
    ),
    seldom(
        "docker run --security-opt",
        "for words in no-new-privileges seccomp=unconfined; do
            run --rm --security-opt $words busybox grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status
        done",
    ),
    seldom(
        "docker run -e, -w, -h, --add-host, --dns, --sysctl",
        "run --rm -e A=b -w /tmp -h name --add-host there:10.1.2.3 --dns 10.9.9.9 --sysctl net.ipv4.ip_default_ttl=77 busybox sh -c '
            echo $A; pwd; hostname; grep there /etc/hosts; grep ^nameserver /etc/resolv.conf; cat /proc/sys/net/ipv4/ip_default_ttl'",
    ),
    seldom("docker run --init", "run --rm --init busybox sh -c 'cat /proc/1/comm'"),
    seldom(
        "docker run --health-cmd",
        "begin --name box --health-cmd 'test -e /ok' --health-interval 1s --health-retries 1 busybox sleep 1000
        soon is box Health.Status unhealthy; docker exec box touch /ok; soon is box Health.Status healthy; echo both",
    ),
    seldom(
        "docker commit, diff, export",
        "run --name box busybox sh -c 'echo new >/n'; docker diff box; docker export box | tar -xOf - n
        docker commit box it-committed >/dev/null; run --rm it-committed cat /n; docker image rm it-committed >/dev/null",
    ),
    seldom(
        "docker build, the default runtime",
        "printf 'FROM busybox\\nRUN echo built >/b && test -d /proc/1\\nCMD [\"cat\", \"/b\"]\\n' >Dockerfile
        DOCKER_BUILDKIT=0 docker build -q -t it-built . >/dev/null 2>&1
        docker run --rm it-built; docker image rm it-built >/dev/null
        [ \"$(docker info -f '{{.DefaultRuntime}}')\" = \"$DEFAULT\" ]",
    ),
    seldom(
        "docker buildx build",
        "printf 'FROM busybox\\nRUN echo built >/b\\nCMD [\"cat\", \"/b\"]\\n' >Dockerfile
        docker buildx build -q --load -t it-built . >/dev/null 2>&1; run --rm it-built; docker image rm it-built >/dev/null",
    ),
    seldom(
        "docker compose",
        "cat >compose.yaml <<END
services:
  web:
    image: busybox
    runtime: $RUNTIME
    command: sh -c 'echo page >/data/index.html; exec httpd -f -h /data'
    healthcheck: {test: wget -qO- http://127.0.0.1/, interval: 1s, retries: 60}
    ports: ['8080:80']
    volumes: ['data:/data']
  asks:
    image: busybox
    runtime: $RUNTIME
    depends_on: {web: {condition: service_healthy}}
    command: wget -qO- http://web/
volumes: {data: {}}
END
        compose() { docker compose --progress quiet \"$@\"; }
        compose up -d; soon sh -c '[ \"$(docker compose ps -a --format {{.State}} asks)\" = exited ]'
        compose logs --no-log-prefix asks; compose ps --format '{{.Service}} {{.State}} {{.Health}}'; get http://127.0.0.1:8080/
        compose exec -T web cat /data/index.html; compose restart -t 0 web; compose run --rm -T asks
        compose down -t 0 -v; docker ps -aq; docker volume ls -q",
    ),
    seldom(
        "docker checkpoint create --leave-running, docker start --checkpoint",
        "begin --name box busybox sh -c 'i=0; while :; do i=$((i + 1)); echo $i; sleep 0.2; done'
        soon says box ^3$; docker checkpoint create --leave-running box one; docker checkpoint ls box; state box Status
        last=$(docker logs box | tail -n 1); soon says box ^$((last + 5))$
        docker stop -t 0 box; before=$(docker logs box | wc -l)
        docker start --checkpoint one box; soon sh -c \"[ \\$(docker logs box | wc -l) -gt $((before + 3)) ]\"
        # It says again what it had said after that moment, and goes on without a gap.
        again=$(docker logs box | sed -n $((before + 1))p); [ $again -gt 3 ] && [ $again -le $((last + 1)) ] && echo goes on
        docker logs box | tail -n +$((before + 1)) | awk -v next_one=$again '$1 != next_one++ { print \"gap\" }'
        docker exec box ip -o -4 address show dev eth0 | tr -s ' ' | cut -d' ' -f4",
    ),
    other(
        "docker checkpoint create",
        "leaves the container running: docker tells no runtime but runc that it is to end",
        "begin --name box busybox sleep 1000
        docker checkpoint create box one; sleep 1; state box Status",
    ),
    seldom(
        "docker events",
        // What was before is another second's.
        "sleep 2; since=$(date +%s); run --name box busybox sh -c 'exit 3' || docker rm box >/dev/null
        docker events --since $since --until $(($(date +%s) + 1)) --filter type=container \
            --format '{{.Action}} {{.Actor.Attributes.exitCode}}'",
    ),
];

/// A daemon that runs.
struct Daemon<'a> {
    ctx: &'a Ctx<'a, Inside>,
    running: Option<Running>,
}

impl<'a> Daemon<'a> {
    /// Whose default is this runtime, which it knows by this name.
    fn start(ctx: &'a Ctx<'a, Inside>, default: &str) -> Result<Self> {
        let configuration = json!({
            "default-runtime": default,
            // For checkpoints.
            "experimental": true,
            "runtimes": { "supermachine": { "runtimeType": OURS } },
        });
        let file = ctx.path("daemon.json");
        std::fs::write(&file, configuration.to_string()).context("configuring the daemon")?;
        let running = ctx.cmd("dockerd").arg("--config-file").arg(&file).start()?;
        let daemon = Self { ctx, running: Some(running) };
        until("the daemon to serve", A_WHILE, || match ctx.cmd("docker").arg("info").run() {
            Ok(done) if done.code() == Some(0) => Attempt::Done(()),
            other => Attempt::Pending(format!("{other:?}")),
        })?;
        ctx.cmd("docker").args(["load", "-q", "-i", "/usr/local/lib/testbed/busybox.tar"]).ok()?;
        Ok(daemon)
    }

    /// Removes what a feature has left.
    fn tidy(&self) -> Result<()> {
        let script = "docker ps -aq | xargs -r docker rm -f
            docker network prune -f; docker volume prune -af";
        self.ctx.cmd("sh").args(["-c", script]).ok()?;
        Ok(())
    }
}

impl Drop for Daemon<'_> {
    /// As if there had never been one.
    fn drop(&mut self) {
        let _ = self.tidy();
        if let Some(daemon) = self.running.take() {
            let _ = daemon.signal(Signal::SIGTERM);
            let ended = daemon.wait();
            self.ctx.note(format_args!("the daemon: {ended:?}"));
        }
        without_firewall(
            self.ctx,
            "for mount in $(cut -d' ' -f2 /proc/mounts | grep ^/run/docker/); do umount $mount; done
            rm -rf /run/docker/netns
            ip link del docker0
            find /sys/fs/cgroup/docker -depth -type d -exec rmdir {} ';'",
        );
    }
}

/// What the script says with `runtime`, and whether it could do it.
fn answer(
    ctx: &Ctx<'_, Inside>,
    feature: &Feature<Script>,
    runtime: &str,
    default: &str,
) -> Result<(bool, String)> {
    let directory = ctx.path("feature");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
    ctx.note(format_args!("{}, with {runtime}", feature.name));
    let script = ctx.path("script");
    std::fs::write(&script, format!("set -eu\n{WORDS}\n{}\n", feature.does)).context("writing the script")?;
    let done = ctx
        .cmd("sh")
        .arg(&script)
        .env("RUNTIME", runtime)
        .env("DEFAULT", default)
        .env("GUEST_PART", &ctx.world.guest_part)
        .current_dir(directory)
        .deadline(A_WHILE)
        .run()?;
    Ok((done.code() == Some(0), format!("{}{}", done.out(), done.err())))
}

fn features(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let ctx = &*ctx;
    if !ctx.world.owns_host() {
        return Ok(Outcome::Skipped(
            "a daemon is started here, and what it leaves of the firewall removed".into(),
        ));
    }
    let features = chosen(ctx, FEATURES);
    // Whose default it is matters to what is tried in a soak.
    let defaults = ctx.either(["supermachine", "supermachine"], ["runc", "supermachine"]);
    let mut said = Vec::new();
    let mut running: Option<(&str, Daemon<'_>)> = None;
    for (runtime, default) in [RUNC, OURS].into_iter().zip(defaults) {
        // One at a time.
        running = running.filter(|(known, _)| *known == default);
        let (_, daemon) = match running.take() {
            Some(known) => running.insert(known),
            None => running.insert((default, Daemon::start(ctx, default)?)),
        };
        let mut all = Said::new();
        for feature in &features {
            all.push(answer(ctx, feature, runtime, default)?);
            daemon.tidy()?;
        }
        said.push(all);
    }
    drop(running);
    compare(&features, &said[0], &said[1])?;
    Ok(Outcome::Passed)
}
