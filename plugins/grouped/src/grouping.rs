//! How servers are put into groups. Order within a group and between groups follows the order of the request.

use windlass_sdk::{
    PluginError,
    strategy::{Application, Server},
};

use crate::parameters::{Grouping, Parameters};

pub(crate) struct Group<'a> {
    pub(crate) name: String,
    pub(crate) servers: Vec<&'a Server>,
}

/// One server from each deployment zone, a healthy one where there is one.
pub(crate) fn beta_group<'a>(servers: &[&'a Server]) -> Vec<&'a Server> {
    let mut beta: Vec<&'a Server> = Vec::new();
    for server in servers {
        match beta.iter_mut().find(|chosen| chosen.zone == server.zone) {
            None => beta.push(server),
            Some(chosen) if !chosen.healthy && server.healthy => *chosen = server,
            Some(_) => {}
        }
    }
    beta
}

/// The groups of some servers of an application; never an empty one.
pub(crate) fn groups_of<'a>(
    application: &'a Application,
    servers: Vec<&'a Server>,
    parameters: &Parameters,
) -> Result<Vec<Group<'a>>, PluginError> {
    if servers.is_empty() {
        return Ok(Vec::new());
    }
    let numbered = |parts: Vec<Vec<&'a Server>>| {
        parts
            .into_iter()
            .enumerate()
            .map(|(index, servers)| Group {
                name: format!("group {}", index + 1),
                servers,
            })
            .collect()
    };
    Ok(match parameters.grouping {
        Grouping::Quick => numbered(waves(servers, parameters.wave_percent)),
        Grouping::OnePerGroup => numbered(servers.into_iter().map(|server| vec![server]).collect()),
        Grouping::AllInOne => numbered(vec![servers]),
        Grouping::ByCell => {
            let mut groups: Vec<Group<'a>> = Vec::new();
            for server in servers {
                let name = format!("cell {}", server.cell);
                match groups.iter_mut().find(|group| group.name == name) {
                    Some(group) => group.servers.push(server),
                    None => groups.push(Group {
                        name,
                        servers: vec![server],
                    }),
                }
            }
            groups
        }
        Grouping::Explicit => parameters
            .groups
            .iter()
            .filter(|group| group.is_of(application))
            .enumerate()
            .map(|(index, group)| Group {
                name: group
                    .name
                    .clone()
                    .unwrap_or_else(|| format!("group {}", index + 1)),
                servers: group
                    .servers
                    .iter()
                    .filter_map(|wanted| {
                        servers
                            .iter()
                            .find(|server| server.id == *wanted || server.name == *wanted)
                            .copied()
                    })
                    .collect(),
            })
            .filter(|group| !group.servers.is_empty())
            .collect(),
    })
}

/// One server, then waves of a share of all, rounded up.
fn waves(servers: Vec<&Server>, percent: u32) -> Vec<Vec<&Server>> {
    let size = (servers.len() * percent as usize).div_ceil(100).max(1);
    let (first, rest) = servers.split_at(1);
    let mut waves = vec![first.to_vec()];
    waves.extend(rest.chunks(size).map(<[_]>::to_vec));
    waves
}

/// What an amount of the contract (`3`, `25%`) is of a total; shares are rounded down. Unknown texts count as nothing.
pub(crate) fn amount_of(amount: &str, total: u32) -> u32 {
    match amount.strip_suffix('%') {
        Some(percent) => percent.parse::<u64>().map_or(0, |percent| {
            u32::try_from(u64::from(total) * percent / 100).unwrap_or(u32::MAX)
        }),
        None => amount.parse().unwrap_or(0),
    }
}
