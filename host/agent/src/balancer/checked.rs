//! What checks have found of servers, taken over a reload.
//!
//! HAProxy believes its state file more than its configuration: it takes a server's port from there, and a weight that was set
//! while it ran. So a row is taken along for a server that is where it was only, and with the weight that it is to have.

use std::collections::HashMap;

use windlass_domain::load_balancer::{Configuration, MemberConfig};

use super::tally::Member;

/// The state for a configuration, of what `show servers state` shows now; `None`: nothing of it can be used.
pub(super) fn state_for(shown: &str, wanted: &Configuration) -> Option<String> {
    let members: HashMap<Member, &MemberConfig> = wanted
        .members()
        .map(|(pool, member)| ((pool, member.server), member))
        .collect();
    let mut lines = shown.lines();
    let version = lines.next()?;
    let head = lines.next()?;
    let names: Vec<&str> = head.strip_prefix("# ")?.split(' ').collect();
    let column = |name: &str| names.iter().position(|known| *known == name);
    let (pool, server) = (column("be_name")?, column("srv_name")?);
    let (address, port) = (column("srv_addr")?, column("srv_port")?);
    let weights = [column("srv_uweight")?, column("srv_iweight")?];
    let mut state = format!("{version}\n{head}\n");
    for line in lines {
        let mut fields: Vec<String> = line.split(' ').map(str::to_owned).collect();
        if fields.len() != names.len() {
            continue;
        }
        let (Ok(pool), Ok(server)) = (fields[pool].parse(), fields[server].parse()) else {
            continue;
        };
        let stays = members.get(&(pool, server)).filter(|member| {
            fields[address].parse() == Ok(member.address.ip())
                && fields[port].parse() == Ok(member.address.port())
        });
        if let Some(member) = stays {
            for weight in weights {
                fields[weight] = member.weight.to_string();
            }
            state.push_str(&fields.join(" "));
            state.push('\n');
        }
    }
    Some(state)
}

#[cfg(test)]
mod tests {
    use windlass_domain::load_balancer::{
        BackEndConfig, Balance, HealthCheck, ListenerConfig, Protocol,
    };

    use super::*;

    fn id<T: std::str::FromStr>(kind: &str, number: u32) -> T
    where
        T::Err: std::fmt::Debug,
    {
        format!("{kind}_{number:032x}").parse().unwrap()
    }

    #[test]
    fn servers_that_are_where_they_were_are_taken_along() {
        let member = |number: u32, address: &str, weight: u32| MemberConfig {
            server: id("srv", number),
            address: address.parse().unwrap(),
            weight,
        };
        let wanted = Configuration {
            load_balancer: id("lb", 1),
            revision: 1,
            listeners: vec![ListenerConfig {
                id: id("lsn", 1),
                protocol: Protocol::Tcp,
                front_port: 80,
                balance: Balance::RoundRobin,
                forwarded_for: false,
                sticky: false,
                health: HealthCheck::default(),
                peak_kbit_per_s: None,
                access: None,
                back_end: BackEndConfig {
                    pool: id("pool", 1),
                    members: vec![
                        member(1, "10.0.0.1:8080", 0),
                        member(2, "10.0.0.2:9090", 100),
                        member(3, "10.0.0.9:8080", 100),
                        member(4, "[2001:db8::4]:8080", 30),
                    ],
                },
                groups: Vec::new(),
            }],
        };
        let pool = format!("pool_{:032x}", 1);
        let row = |number: u32, address: &str, weight: u32, port: u16| {
            format!(
                "3 {pool} {number} srv_{number:032x} {address} 2 0 {weight} 100 9 8 2 3 6 0 0 0 - {port} - 0 0 - - 0"
            )
        };
        let head = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight \
                    srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state \
                    srv_agent_state bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl srv_check_port \
                    srv_check_addr srv_agent_addr srv_agent_port";
        let shown = [
            head.to_owned(),
            row(1, "10.0.0.1", 100, 8080),
            row(2, "10.0.0.2", 100, 8080),
            row(3, "10.0.0.3", 100, 8080),
            row(4, "2001:db8::4", 100, 8080),
            row(5, "10.0.0.5", 100, 8080),
            "odd".to_owned(),
            String::new(),
        ];
        let first = row(1, "10.0.0.1", 0, 8080).replace(" 0 100 9 ", " 0 0 9 ");
        let fourth = row(4, "2001:db8::4", 30, 8080).replace(" 30 100 9 ", " 30 30 9 ");
        let expect = format!("{head}\n{first}\n{fourth}\n");
        assert_eq!(state_for(&shown.join("\n"), &wanted), Some(expect));
        assert_eq!(state_for("1\n# be_id\n", &wanted), None);
        assert_eq!(state_for("", &wanted), None);
    }
}
