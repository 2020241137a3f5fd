//! Rules of the host's firewall: nftables, else iptables.

use serde_json::{Value, json};
use windlass_protocol::{ProbeReply, QueryError, QueryErrorCode};

use super::facts_of;
use crate::query::{failed, program};

pub(super) async fn firewall() -> Result<ProbeReply, QueryError> {
    if program::find("nft").is_some() {
        let said = run("nft", &["--json", "list", "ruleset"]).await?;
        let facts =
            nft_facts(&said).ok_or_else(|| failed("nft answers in another form than expected"))?;
        let text = run("nft", &["list", "ruleset"]).await?;
        return Ok(facts_of(facts, text));
    }
    if program::find("iptables-save").is_some() {
        let text = run("iptables-save", &[]).await?;
        return Ok(facts_of(iptables_facts(&text), text));
    }
    Err(QueryError::new(
        QueryErrorCode::Unsupported,
        "neither `nft` nor `iptables-save` is installed on this server, so its firewall cannot be read",
    ))
}

async fn run(name: &str, arguments: &[&str]) -> Result<String, QueryError> {
    let said = program::run(name, arguments).await?;
    if said.code == 0 {
        return Ok(said.output);
    }
    let errors = said.errors.trim();
    let lower = errors.to_lowercase();
    if lower.contains("not permitted")
        || lower.contains("permission denied")
        || lower.contains("be root")
    {
        return Err(QueryError::new(
            QueryErrorCode::Denied,
            format!(
                "only root may read the firewall's rules: run the agent as root ({name}: {errors})"
            ),
        ));
    }
    Err(failed(format!("{name} ended with {}: {errors}", said.code)))
}

/// From libnftables-json(5).
fn nft_facts(text: &str) -> Option<Value> {
    let document: Value = serde_json::from_str(text).ok()?;
    let (mut chains, mut rules, mut dropping) = (Vec::new(), 0_u64, 0_u64);
    for entry in document["nftables"].as_array()? {
        if let Some(chain) = entry.get("chain") {
            chains.push(json!({
                "family": chain["family"],
                "table": chain["table"],
                "name": chain["name"],
                "hook": chain["hook"],
                "policy": chain["policy"],
            }));
        }
        if let Some(rule) = entry.get("rule") {
            rules += 1;
            let drops = rule["expr"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|expression| {
                    expression.get("drop").is_some() || expression.get("reject").is_some()
                });
            dropping += u64::from(drops);
        }
    }
    Some(with_verdict("nft", chains, rules, dropping))
}

/// From iptables-save(8).
fn iptables_facts(text: &str) -> Value {
    let (mut table, mut chains, mut rules, mut dropping) = ("", Vec::new(), 0_u64, 0_u64);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            let name = words.next().unwrap_or_default();
            let policy = words.next().filter(|policy| *policy != "-");
            let hook = policy.map(|_| name.to_lowercase());
            chains.push(json!({
                "family": "ip",
                "table": table,
                "name": name,
                "hook": hook,
                "policy": policy.map(str::to_lowercase),
            }));
        } else if line.starts_with("-A ") {
            rules += 1;
            dropping += u64::from(line.contains("-j DROP") || line.contains("-j REJECT"));
        }
    }
    with_verdict("iptables", chains, rules, dropping)
}

fn with_verdict(tool: &str, chains: Vec<Value>, rules: u64, dropping: u64) -> Value {
    let closed = |hook: &str| {
        chains
            .iter()
            .any(|chain| chain["hook"] == hook && chain["policy"] == "drop")
    };
    json!({
        "tool": tool,
        "rules": rules,
        "dropping_rules": dropping,
        "input_policy_drop": closed("input"),
        "output_policy_drop": closed("output"),
        "chains": chains,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tools_tell_the_same() {
        let nft = r#"{"nftables":[{"metainfo":{"version":"1"}},{"table":{"family":"inet","name":"filter"}},
            {"chain":{"family":"inet","table":"filter","name":"input","hook":"input","policy":"drop"}},
            {"chain":{"family":"inet","table":"filter","name":"ours"}},
            {"rule":{"family":"inet","table":"filter","chain":"input","expr":[{"match":{}},{"accept":null}]}},
            {"rule":{"family":"inet","table":"filter","chain":"input","expr":[{"drop":null}]}}]}"#;
        let iptables = "*filter\n:INPUT DROP [0:0]\n:ours - [0:0]\n-A INPUT -p tcp -j ACCEPT\n-A INPUT -j DROP\nCOMMIT\n";
        for (facts, tool) in [
            (nft_facts(nft).unwrap(), "nft"),
            (iptables_facts(iptables), "iptables"),
        ] {
            assert_eq!(facts["tool"], tool);
            assert_eq!(
                (&facts["rules"], &facts["dropping_rules"]),
                (&json!(2), &json!(1))
            );
            assert_eq!(facts["input_policy_drop"], true, "{facts}");
            assert_eq!(facts["output_policy_drop"], false);
            assert_eq!(facts["chains"].as_array().unwrap().len(), 2);
        }
        assert!(nft_facts("[]").is_none());
    }
}
