//! What the rules of others do with clients' packets, as far as it can be told from the listing.
//!
//! Each chain at the hook `forward` can drop a packet, and no `accept` in another chain prevents it. So each of them is walked with two packets of a client: its first, on its way out of the tunnel, and an answer; once for
//! each device on the other side. Of these packets the devices, the tunnel's ranges and the state of their connection are known;
//! what a rule asks besides is [`Truth::Maybe`]. Where a rule that names the tunnel accepts, if only some, somebody has thought
//! of us and limits clients on purpose: nothing is said.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use gateway_proto::addr::{TUNNEL_V4, TUNNEL_V6};
use ipnet::IpNet;
use serde_json::Value;

/// How deep chains may call each other; the kernel allows 16 (NFT_JUMP_STACK_SIZE).
const DEPTH: usize = 16;
/// How many rules one packet may meet here; chains that call many others could keep us busy for ever.
const PATIENCE: u32 = 100_000;

/// Which packets of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the tunnel: the first packet of a connection.
    Outbound,
    /// Into the tunnel: an answer.
    Inbound,
}

/// A chain at the hook `forward` that drops packets of clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// Its table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Which packets.
    pub directions: BTreeSet<Direction>,
    /// By or to which devices on the other side, if not all.
    pub devices: BTreeSet<String>,
    /// By its policy; else by a rule.
    pub by_policy: bool,
    /// Whatever device they leave by or come from, and no rule before might accept them.
    pub sure: bool,
    /// All chains of the table: they tell whose it is.
    pub chains: Vec<String>,
}

/// The chains that drop, in the order of the listing; our own table is not looked at. `devices` are all of the machine.
pub fn findings(objects: &[Value], tun: &str, devices: &[String]) -> Vec<Finding> {
    let others: Vec<&str> =
        devices.iter().map(String::as_str).filter(|name| is_towards_resources(name, tun)).collect();
    let chains = objects.iter().filter_map(|object| object.get("chain"));
    let at_forward = chains.filter(|chain| chain["hook"] == "forward" && chain["type"] == "filter");
    let foreign = at_forward.filter(|chain| chain["table"] != super::table::NAME);
    foreign.filter_map(|chain| finding(objects, chain, tun, &others)).collect()
}

/// The machine's network devices, of this network namespace.
pub fn devices() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// Not the loopback, nor a bridge or port of containers and virtual machines, which their own firewall guards.
fn is_towards_resources(name: &str, tun: &str) -> bool {
    const INSIDE: [&str; 10] =
        ["docker", "br-", "veth", "cni", "flannel", "cali", "virbr", "vnet", "podman", "lxc"];
    name != "lo" && name != tun && !INSIDE.iter().any(|beginning| name.starts_with(beginning))
}

fn finding(objects: &[Value], base: &Value, tun: &str, others: &[&str]) -> Option<Finding> {
    let [family, table, chain] =
        ["family", "table", "name"].map(|key| base[key].as_str().unwrap_or_default());
    let families: &[Family] = match family {
        "ip" => &[Family::V4],
        "ip6" => &[Family::V6],
        "inet" => &[Family::V4, Family::V6],
        _ => return None,
    };
    let mut found = Finding {
        family: family.to_owned(),
        table: table.to_owned(),
        chain: chain.to_owned(),
        directions: BTreeSet::new(),
        devices: BTreeSet::new(),
        by_policy: true,
        sure: false,
        chains: Vec::new(),
    };
    let mut rules: HashMap<&str, Vec<&Value>> = HashMap::new();
    for rule in objects.iter().filter_map(|object| object.get("rule")).filter(|rule| same_table(rule, base)) {
        rules.entry(rule["chain"].as_str().unwrap_or_default()).or_default().push(rule);
    }
    // A machine without another device yet: whatever comes.
    let others: Vec<Option<&str>> =
        if others.is_empty() { vec![None] } else { others.iter().copied().map(Some).collect() };
    for &family in families {
        for direction in [Direction::Outbound, Direction::Inbound] {
            let (mut dropped, mut by_policy, mut named, mut sure) = (BTreeSet::new(), true, false, true);
            for &other in &others {
                let mut walk = Walk::new(&rules, tun, other, family, direction);
                let end = walk.chain(chain, 0);
                let drops = end == End::Dropped || (end == End::Through && base["policy"] == "drop");
                if drops {
                    dropped.insert(other.unwrap_or_default().to_owned());
                }
                by_policy &= end != End::Dropped;
                sure &= drops && !walk.unsure;
                named |= walk.named;
            }
            if !dropped.is_empty() && !named {
                if dropped.len() < others.len() {
                    found.devices.append(&mut dropped);
                }
                found.directions.insert(direction);
                found.by_policy &= by_policy;
                found.sure |= sure;
            }
        }
    }
    if found.directions.is_empty() {
        return None;
    }
    let of_table =
        objects.iter().filter_map(|object| object.get("chain")).filter(|other| same_table(other, base));
    found.chains = of_table.filter_map(|chain| chain["name"].as_str()).map(str::to_owned).collect();
    Some(found)
}

/// A table (`family name`) of somebody else that masquerades or rewrites sources: it needs a machine that forwards.
pub fn who_translates(objects: &[Value]) -> Option<String> {
    let rules = objects.iter().filter_map(|object| object.get("rule"));
    let mut foreign = rules.filter(|rule| rule["table"] != super::table::NAME);
    let translates = |rule: &&Value| {
        rule["expr"].as_array().into_iter().flatten().any(|statement| {
            let target = statement["xt"]["name"].as_str().unwrap_or_default();
            statement.get("masquerade").is_some()
                || statement.get("snat").is_some()
                || ["MASQUERADE", "SNAT"].contains(&target)
        })
    };
    let rule = foreign.find(translates)?;
    Some(format!("{} {}", rule["family"].as_str()?, rule["table"].as_str()?))
}

fn same_table(one: &Value, other: &Value) -> bool {
    one["family"] == other["family"] && one["table"] == other["table"]
}

/// Whether a rule's condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Maybe,
}

impl Truth {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            _ => Self::Maybe,
        }
    }

    fn any(of: impl Iterator<Item = Self>) -> Self {
        let mut result = Self::No;
        for truth in of {
            match truth {
                Self::Yes => return Self::Yes,
                Self::Maybe => result = Self::Maybe,
                Self::No => {}
            }
        }
        result
    }

    fn not(self) -> Self {
        match self {
            Self::Yes => Self::No,
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

/// How a chain ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Accepted,
    Dropped,
    /// After its last rule, or by `return`.
    Through,
}

/// One packet on its way through one base chain.
struct Walk<'a> {
    /// The rules of each chain of its table.
    rules: &'a HashMap<&'a str, Vec<&'a Value>>,
    tun: &'a str,
    /// The device on the other side, if there is any.
    other: Option<&'a str>,
    family: Family,
    direction: Direction,
    /// A rule that may match might have saved it.
    unsure: bool,
    /// A rule that names the tunnel accepts it, or some of its kind.
    named: bool,
    /// How many more rules it may meet.
    patience: u32,
}

impl<'a> Walk<'a> {
    fn new(
        rules: &'a HashMap<&'a str, Vec<&'a Value>>,
        tun: &'a str,
        other: Option<&'a str>,
        family: Family,
        direction: Direction,
    ) -> Self {
        Self { rules, tun, other, family, direction, unsure: false, named: false, patience: PATIENCE }
    }

    fn chain(&mut self, name: &str, depth: usize) -> End {
        if depth > DEPTH {
            return End::Through;
        }
        let rules = self.rules;
        for rule in rules.get(name).into_iter().flatten() {
            self.patience = self.patience.saturating_sub(1);
            if self.patience == 0 {
                self.unsure = true;
                return End::Through;
            }
            match self.rule(rule, depth) {
                Next::Rule => {}
                Next::End(end) => return end,
            }
        }
        End::Through
    }

    fn rule(&mut self, rule: &Value, depth: usize) -> Next {
        let (mut holds, mut names_us) = (Truth::Yes, false);
        for statement in rule["expr"].as_array().into_iter().flatten() {
            let Some((kind, value)) = statement.as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            match &**kind {
                "match" => {
                    let truth = self.condition(value);
                    names_us |= truth == Truth::Yes && self.is_tunnel(value);
                    holds = holds.and(truth);
                }
                "xt" if value["type"] != "target" => holds = holds.and(Truth::Maybe),
                "xt" if ["REJECT", "DROP"].iter().any(|name| value["name"] == *name) => {
                    return self.verdict("drop", value, holds, names_us, depth);
                }
                "vmap" => match self.verdict_map(value, holds, depth) {
                    Next::Rule => {}
                    end @ Next::End(_) => return end,
                },
                "accept" | "drop" | "reject" | "return" | "jump" | "goto" | "queue" => {
                    return self.verdict(kind, value, holds, names_us, depth);
                }
                // Only some packets get past these.
                "limit" | "quota" | "ct count" | "connlimit" => holds = holds.and(Truth::Maybe),
                // Counters, logs, marks: they decide nothing.
                _ => {}
            }
            if holds == Truth::No {
                return Next::Rule;
            }
        }
        Next::Rule
    }

    fn verdict_map(&mut self, map: &Value, holds: Truth, depth: usize) -> Next {
        // A named map's elements are not in the listing.
        let Some(elements) = map["data"]["set"].as_array() else {
            self.unsure = true;
            return Next::Rule;
        };
        for element in elements {
            let Some((kind, value)) = element[1].as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            let condition = serde_json::json!({"op": "==", "left": map["key"], "right": element[0]});
            let holds = holds.and(self.condition(&condition));
            let names_us = holds == Truth::Yes && self.is_tunnel(&condition);
            if let end @ Next::End(_) = self.verdict(kind, value, holds, names_us, depth) {
                return end;
            }
        }
        Next::Rule
    }

    fn verdict(&mut self, kind: &str, value: &Value, holds: Truth, names_us: bool, depth: usize) -> Next {
        if holds == Truth::No {
            return Next::Rule;
        }
        let end = match kind {
            "accept" | "queue" => End::Accepted,
            "drop" | "reject" => End::Dropped,
            "jump" | "goto" => {
                let before = self.unsure;
                let end = self.chain(value["target"].as_str().unwrap_or_default(), depth + 1);
                if end == End::Through && kind == "jump" {
                    return Next::Rule;
                }
                // What might have saved it from being dropped there does not matter.
                if end == End::Dropped && holds == Truth::Maybe {
                    self.unsure = before;
                }
                end
            }
            // `return`.
            _ => End::Through,
        };
        self.named |= names_us && end == End::Accepted;
        match (holds, end) {
            (Truth::Yes, end) => Next::End(end),
            // Some of the packets only.
            (_, End::Dropped) => Next::Rule,
            (_, End::Accepted | End::Through) => {
                self.unsure = true;
                Next::Rule
            }
        }
    }

    /// A condition on the tunnel's device or addresses.
    fn is_tunnel(&self, condition: &Value) -> bool {
        let left = &condition["left"];
        let key = left["meta"]["key"].as_str().unwrap_or_default();
        let field = left["payload"]["field"].as_str().unwrap_or_default();
        let ours = match self.direction {
            Direction::Outbound => ["iifname", "iif", "saddr"],
            Direction::Inbound => ["oifname", "oif", "daddr"],
        };
        condition["op"] != "!=" && (ours.contains(&key) || ours.contains(&field))
    }

    fn condition(&self, condition: &Value) -> Truth {
        let (left, right) = (&condition["left"], &condition["right"]);
        let truth = match left.as_object().and_then(|object| object.iter().next()) {
            Some((kind, meta)) if kind == "meta" => match meta["key"].as_str().unwrap_or_default() {
                "iifname" | "iif" => any_of(right, |text| self.is_device(text, Direction::Outbound)),
                "oifname" | "oif" => any_of(right, |text| self.is_device(text, Direction::Inbound)),
                "nfproto" => any_of(right, |text| self.is_family(text)),
                _ => Truth::Maybe,
            },
            Some((kind, ct)) if kind == "ct" && ct["key"] == "state" => {
                let state = match self.direction {
                    Direction::Outbound => "new",
                    Direction::Inbound => "established",
                };
                any_of(right, |text| (text == state).into())
            }
            // Nobody translates the destination of a client's packet on its way.
            Some((kind, ct)) if kind == "ct" && ct["key"] == "status" => {
                any_of(right, |text| if text == "dnat" { Truth::No } else { Truth::Maybe })
            }
            Some((kind, payload)) if kind == "payload" => match payload["protocol"].as_str() {
                Some("ip") if self.family == Family::V6 => return Truth::No,
                Some("ip6") if self.family == Family::V4 => return Truth::No,
                Some("ip" | "ip6") if payload["field"] == "saddr" => {
                    any_of(right, |value| self.is_address(value, Direction::Outbound))
                }
                Some("ip" | "ip6") if payload["field"] == "daddr" => {
                    any_of(right, |value| self.is_address(value, Direction::Inbound))
                }
                _ => Truth::Maybe,
            },
            _ => Truth::Maybe,
        };
        match condition["op"].as_str() {
            Some("==" | "in") => truth,
            Some("!=") => truth.not(),
            _ => Truth::Maybe,
        }
    }

    /// Whether `pattern` is the device on the side where packets of direction `side` have the tunnel.
    fn is_device(&self, pattern: &Value, side: Direction) -> Truth {
        let Some(pattern) = pattern.as_str().filter(|pattern| !pattern.starts_with('@')) else {
            return Truth::Maybe;
        };
        let device = if side == self.direction { Some(self.tun) } else { self.other };
        let Some(device) = device else { return Truth::Maybe };
        let matches = match pattern.strip_suffix('*') {
            Some(beginning) => device.starts_with(beginning),
            None => device == pattern,
        };
        matches.into()
    }

    fn is_family(&self, name: &Value) -> Truth {
        (name == if self.family == Family::V4 { "ipv4" } else { "ipv6" }).into()
    }

    /// Whether the address on the side where packets of `side` have a client is within `value`.
    fn is_address(&self, value: &Value, side: Direction) -> Truth {
        let Some(net) = net(value) else { return Truth::Maybe };
        let tunnel = match self.family {
            Family::V4 => IpNet::V4(TUNNEL_V4),
            Family::V6 => IpNet::V6(TUNNEL_V6),
        };
        if side != self.direction {
            return if tunnel.contains(&net) { Truth::No } else { Truth::Maybe };
        }
        if net.contains(&tunnel) {
            Truth::Yes
        } else if tunnel.contains(&net) {
            Truth::Maybe
        } else {
            Truth::No
        }
    }
}

/// What comes after a rule.
enum Next {
    Rule,
    End(End),
}

/// `right` is one value, a list, or a set of them.
fn any_of(right: &Value, test: impl Fn(&Value) -> Truth) -> Truth {
    match right.as_array().or_else(|| right["set"].as_array()) {
        Some(values) => Truth::any(values.iter().map(test)),
        None => test(right),
    }
}

/// An address or a prefix; ranges are none.
fn net(value: &Value) -> Option<IpNet> {
    if let Some(text) = value.as_str() {
        return text.parse::<IpAddr>().ok().map(IpNet::from);
    }
    let prefix = value.get("prefix")?;
    let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
    IpNet::new(prefix["addr"].as_str()?.parse().ok()?, length).ok()
}

#[cfg(test)]
mod tests;
