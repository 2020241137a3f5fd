//! HAProxy's admin socket: its master answers for itself, for the current worker (`@1`) and for former ones (`@!<pid>`).
//!
//! The socket is reached through the directory's descriptor, so that the length of a data directory's path does not matter.

use std::{
    collections::{BTreeMap, HashMap},
    os::fd::AsRawFd as _,
    path::PathBuf,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use windlass_domain::{
    id::ServerId,
    pool::{MemberHealth, MemberStats},
};
use windlass_protocol::MemberWeight;

use super::{
    BalancerError,
    files::BalancerDir,
    process::ADMIN_SOCKET,
    tally::{self, Counted, Counters, Member},
};

/// How long HAProxy may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The longest answer: statistics of thousands of servers.
const MAX_ANSWER_BYTES: u64 = 16 * 1024 * 1024;

/// Asks HAProxy one thing.
pub(super) async fn command(dir: &BalancerDir, line: &str) -> Result<String, BalancerError> {
    let asked = async {
        let directory = std::fs::File::open(dir.path())?;
        let path: PathBuf =
            format!("/proc/self/fd/{}/{ADMIN_SOCKET}", directory.as_raw_fd()).into();
        let mut socket = UnixStream::connect(path).await?;
        socket.write_all(format!("{line}\n").as_bytes()).await?;
        // The master closes when it has answered and nothing more can come.
        socket.shutdown().await?;
        let mut answer = Vec::new();
        socket
            .take(MAX_ANSWER_BYTES)
            .read_to_end(&mut answer)
            .await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(BalancerError::Admin(error.to_string())),
        Err(_) => Err(BalancerError::Admin(format!(
            "no answer within {} ms",
            ANSWER_WITHIN.as_millis()
        ))),
    }
}

/// HAProxy's processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Processes {
    pub(super) master: u32,
    /// The one that listens.
    pub(super) worker: Option<u32>,
    /// Those that finish what they have.
    pub(super) old: Vec<u32>,
}

pub(super) async fn processes(dir: &BalancerDir) -> Result<Processes, BalancerError> {
    let shown = command(dir, "show proc").await?;
    parse_processes(&shown)
        .ok_or_else(|| BalancerError::Admin(format!("it shows no processes: {shown:?}")))
}

fn parse_processes(shown: &str) -> Option<Processes> {
    let (mut master, mut worker, mut old) = (None, None, Vec::new());
    let mut section = "";
    for line in shown.lines() {
        if let Some(name) = line.strip_prefix("# ") {
            section = name.trim();
            continue;
        }
        let mut fields = line.split_whitespace();
        let Some(pid) = fields.next().and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        match (section, fields.next()) {
            (_, Some("master")) => master = Some(pid),
            ("workers", _) => worker = Some(pid),
            ("old workers", _) => old.push(pid),
            (_, _) => {}
        }
    }
    Some(Processes {
        master: master?,
        worker,
        old,
    })
}

/// Sets a weight in the current worker and compares what is read back.
pub(super) async fn set_weight(
    dir: &BalancerDir,
    weight: &MemberWeight,
) -> Result<(), BalancerError> {
    let MemberWeight {
        pool,
        server,
        weight,
    } = weight;
    let said = command(dir, &format!("@1 set weight {pool}/{server} {weight}")).await?;
    let shown = command(dir, &format!("@1 get weight {pool}/{server}")).await?;
    if shown.split_whitespace().next() == Some(weight.to_string().as_str()) {
        return Ok(());
    }
    Err(BalancerError::Admin(format!(
        "the weight of {pool}/{server} is {:?} after it was set to {weight}: {:?}",
        shown.trim(),
        said.trim()
    )))
}

/// A server as the current worker shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) weight: u32,
    pub(super) health: MemberHealth,
    /// Of all processes.
    pub(super) sessions: u32,
    pub(super) latency_ms: Option<u32>,
    pub(super) check: String,
    counted: tally::Shown,
}

impl Shown {
    pub(super) fn stats(&self, server: ServerId, counted: Counted) -> MemberStats {
        let Counted {
            counters,
            responses,
        } = counted;
        MemberStats {
            server,
            weight: self.weight,
            health: self.health,
            sessions: self.sessions,
            requests: counters.requests,
            errors: counters.errors,
            retries: counters.retries,
            redispatches: counters.redispatches,
            latency_ms: self.latency_ms,
            responses,
        }
    }
}

/// HAProxy at one moment.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub(super) members: HashMap<Member, Shown>,
    /// Of each process that lives.
    pub(super) counted: HashMap<u32, HashMap<Member, tally::Shown>>,
    pub(super) old_processes: u32,
}

const SERVERS: &str = "show stat -1 4 -1";

/// Looks at all processes.
pub(super) async fn look(dir: &BalancerDir) -> Result<Snapshot, BalancerError> {
    let processes = processes(dir).await?;
    let mut snapshot = Snapshot::default();
    let worker = processes
        .worker
        .ok_or_else(|| BalancerError::Admin("it has no worker (yet)".into()))?;
    let stat = command(dir, &format!("@!{worker} {SERVERS}")).await?;
    snapshot.members = parse_servers(&stat)?;
    let counted = |members: &HashMap<Member, Shown>| {
        members
            .iter()
            .map(|(member, shown)| (*member, shown.counted))
            .collect()
    };
    let of_worker = counted(&snapshot.members);
    snapshot.counted.insert(worker, of_worker);
    for pid in processes.old {
        // One that ends just now has nothing any more.
        let Ok(members) = parse_servers(&command(dir, &format!("@!{pid} {SERVERS}")).await?) else {
            continue;
        };
        let info = command(dir, &format!("@!{pid} show info")).await?;
        let Some(connections) = figure(&info, "CurrConns") else {
            continue;
        };
        snapshot.old_processes += 1;
        let busy: u32 = members.values().map(|shown| shown.sessions).sum();
        let idle = connections.saturating_sub(busy);
        for (member, shown) in &mut snapshot.members {
            let here = members.get(member).map_or(0, |old| old.sessions);
            shown.sessions += here + idle;
        }
        snapshot.counted.insert(pid, counted(&members));
    }
    Ok(snapshot)
}

fn figure(info: &str, name: &str) -> Option<u32> {
    info.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(": ")?
            .trim()
            .parse()
            .ok()
    })
}

fn parse_servers(stat: &str) -> Result<HashMap<Member, Shown>, BalancerError> {
    let odd = |what: &str| {
        BalancerError::Admin(format!(
            "its statistics cannot be read: {what}: {:?}",
            stat.chars().take(200).collect::<String>()
        ))
    };
    let mut lines = stat.lines();
    let head = lines
        .next()
        .and_then(|line| line.strip_prefix("# "))
        .ok_or_else(|| odd("no header"))?;
    let columns: BTreeMap<&str, usize> = head
        .split(',')
        .enumerate()
        .map(|(index, name)| (name, index))
        .collect();
    let mut members = HashMap::new();
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').collect();
        let text = |name: &str| {
            columns
                .get(name)
                .and_then(|index| fields.get(*index))
                .copied()
                .unwrap_or_default()
        };
        let number = |name: &str| text(name).parse::<u64>().unwrap_or(0);
        let small = |name: &str| u32::try_from(number(name)).unwrap_or(u32::MAX);
        let (Ok(pool), Ok(server)) = (text("pxname").parse(), text("svname").parse()) else {
            continue;
        };
        let requests = number("stot");
        let counters = Counters {
            requests,
            errors: number("hrsp_5xx") + number("econ") + number("eresp"),
            retries: number("wretr"),
            redispatches: number("wredis"),
        };
        let weight = text("uweight")
            .parse()
            .or_else(|_| text("weight").parse())
            .map_err(|_| odd("no weight"))?;
        let shown = Shown {
            weight,
            health: health(text("status")),
            sessions: small("scur") + small("qcur"),
            latency_ms: (requests > 0).then(|| small("rtime")),
            check: [
                text("status"),
                text("check_status"),
                text("check_code"),
                text("last_chk"),
            ]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(" "),
            counted: tally::Shown {
                counters,
                mean_ms: small("rtime"),
            },
        };
        members.insert((pool, server), shown);
    }
    Ok(members)
}

/// `UP`, `UP 1/3` (going down), `DOWN`, `DOWN 1/2` (going up), `no check`, `MAINT`, `NOLB`, `DRAIN`.
fn health(status: &str) -> MemberHealth {
    match status.split_whitespace().next().unwrap_or_default() {
        "UP" | "DRAIN" => MemberHealth::Up,
        "no" | "" => MemberHealth::Unchecked,
        _ => MemberHealth::Down,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_read_as_haproxy_shows_them() {
        let shown = "#<PID>          <type>          <reloads>       <uptime>        <version>      \n\
            21879           master          1 [failed: 0]   0d00h00m06s     2.6.12-1+deb12u4\n\
            # workers\n22299           worker          0               0d00h00m01s     2.6.12\n\
            # old workers\n21882           worker          1               0d00h00m06s     2.6.12\n\
            # programs\n\n";
        let expect = Processes {
            master: 21879,
            worker: Some(22299),
            old: vec![21882],
        };
        assert_eq!(parse_processes(shown), Some(expect));
        assert_eq!(parse_processes(""), None);
    }

    #[test]
    fn servers_are_read_by_the_names_of_columns() {
        let (pool, server) = (
            "pool_00000000000000000000000000000001",
            "srv_00000000000000000000000000000002",
        );
        let stat = format!(
            "# pxname,svname,qcur,scur,stot,econ,eresp,wretr,wredis,status,weight,check_status,check_code,last_chk,hrsp_5xx,rtime,ttime,uweight,\n\
             {pool},{server},1,2,10,1,1,3,4,UP,0,L7OK,200,OK,5,7,9,37,\n{pool},BACKEND,,,,,,,,,,,,,,,,,\n\n"
        );
        let members = parse_servers(&stat).unwrap();
        let shown = &members[&(pool.parse().unwrap(), server.parse().unwrap())];
        assert_eq!(
            (shown.weight, shown.health, shown.sessions),
            (37, MemberHealth::Up, 3)
        );
        assert_eq!(shown.latency_ms, Some(7));
        let counters = Counters {
            requests: 10,
            errors: 7,
            retries: 3,
            redispatches: 4,
        };
        let mean_ms = 7;
        assert_eq!(shown.counted, tally::Shown { counters, mean_ms });
        assert_eq!(members.len(), 1);
        assert!(parse_servers("Proxy is disabled.\n").is_err());
    }

    #[test]
    fn every_status_has_its_health() {
        for (status, expect) in [
            ("UP", MemberHealth::Up),
            ("UP 1/3", MemberHealth::Up),
            ("DRAIN", MemberHealth::Up),
            ("DOWN", MemberHealth::Down),
            ("DOWN 1/2", MemberHealth::Down),
            ("MAINT", MemberHealth::Down),
            ("NOLB", MemberHealth::Down),
            ("no check", MemberHealth::Unchecked),
        ] {
            assert_eq!(health(status), expect, "{status}");
        }
    }
}
