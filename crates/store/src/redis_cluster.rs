//! Commands to a Redis Cluster: sent to every node at once, bounded in time, repeated where the cluster moves.
//!
//! The `redis` crate's cluster client is not used: a pipeline of it waits out the time limit again for every answer of
//! a node that hangs, and repeats what a node redirects one command after another. Here a batch has one time limit,
//! however many nodes fail meanwhile and however slowly they answer, and what did not succeed is sent again together.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use redis::{
    ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, RedisError, ServerErrorKind, Value,
};

use crate::deadline::Deadline;
use crate::error::{Result, StoreError};
use crate::redis_connection::{Connection, Node, Patience};

/// Slots that keys are spread over (Redis Cluster specification).
const SLOTS: usize = 16_384;

/// Commands that a node is sent before its answers are read.
const IN_FLIGHT: usize = 4096;

/// How long the cluster is left alone before what failed is sent again.
const PAUSE: Duration = Duration::from_millis(20);

/// The slot of a key: CRC16 (XMODEM) of it. Keys here have no `{…}` part.
pub(crate) fn slot(key: &str) -> u16 {
    crc16::State::<crc16::XMODEM>::calculate(key.as_bytes()) % SLOTS as u16
}

/// Who serves which slot.
#[derive(Debug)]
struct SlotMap {
    /// Masters and replicas.
    nodes: Vec<Node>,
    /// Index of each slot's master, if it has one.
    masters: Vec<Option<u16>>,
}

/// Commands that belong together, numbered from 0: how they are sent, and what becomes of their answers.
pub(crate) trait Batch {
    /// How many there are.
    fn len(&self) -> usize;

    /// The slot of command `i`.
    fn slot(&self, i: usize) -> u16;

    /// Appends command `i` as it goes over the wire.
    fn pack(&self, i: usize, out: &mut Vec<u8>);

    /// Takes what `node` answered to command `i`; once for each.
    fn take(&mut self, i: usize, answer: Value, node: &Node) -> Result<()>;
}

/// A cluster, its layout as far as it is known, and idle connections. Any number of threads may use it at once.
pub(crate) struct Cluster {
    /// How to log in, at any node.
    login: ConnectionInfo,
    seeds: Vec<Node>,
    slots: RwLock<Arc<SlotMap>>,
    idle: Mutex<HashMap<Node, Vec<Connection>>>,
    limit: Duration,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("seeds", &self.seeds).field("limit", &self.limit).finish()
    }
}

/// Commands that one attempt did not bring to an end, and why.
#[derive(Default)]
struct Undone {
    commands: Vec<usize>,
    why: Option<(Node, RedisError)>,
}

impl Undone {
    fn add(&mut self, commands: impl IntoIterator<Item = usize>, node: &Node, why: RedisError) {
        self.commands.extend(commands);
        self.why = Some((node.clone(), why));
    }
}

impl Cluster {
    /// Finds the cluster that `seeds` (such as `redis://127.0.0.1:7000`; password and user as usual in such
    /// addresses) belong to, by `deadline`. One that answers is enough. [`run`](Self::run) has `limit` for a batch.
    pub(crate) fn open(seeds: &[&str], limit: Duration, deadline: Deadline) -> Result<Self> {
        if limit < Duration::from_millis(10) {
            return Err(StoreError::setting("time limit", format!("{limit:?}"), "at least 10 ms"));
        }
        let mut nodes = Vec::new();
        let mut login = None;
        for &seed in seeds {
            let refused = |problem: String| StoreError::cluster(seed, problem);
            let info =
                seed.into_connection_info().map_err(|error| refused(format!("not an address: {error}")))?;
            let ConnectionAddr::Tcp(host, port) = info.addr() else {
                return Err(refused("only addresses as redis://host:port reach a cluster".into()));
            };
            if info.redis_settings().db() != 0 {
                return Err(refused(
                    "a cluster has database 0 only; leave the path of the address out".into(),
                ));
            }
            nodes.push(Node { host: host.as_str().into(), port: *port });
            login.get_or_insert(info);
        }
        let Some(login) = login else {
            return Err(StoreError::cluster(
                "cluster",
                "no node is named; name at least one as redis://host:port",
            ));
        };
        let slots = RwLock::new(Arc::new(SlotMap { nodes: nodes.clone(), masters: vec![None; SLOTS] }));
        let cluster = Self { login, seeds: nodes, slots, idle: Mutex::default(), limit };
        cluster.look_around(deadline)?;
        Ok(cluster)
    }

    /// How long a batch may take.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Sends the batch and takes every answer. Commands may reach a node more than once.
    ///
    /// # Errors
    /// When something has no answer within the time limit, or an answer says that it never will.
    pub(crate) fn run(&self, batch: &mut impl Batch) -> Result<()> {
        self.run_by(Deadline::after(self.limit), batch)
    }

    /// [`run`](Self::run), by `deadline`.
    pub(crate) fn run_by(&self, deadline: Deadline, batch: &mut impl Batch) -> Result<()> {
        let mut open: Vec<usize> = (0..batch.len()).collect();
        loop {
            let undone = self.attempt(batch, &open, deadline)?;
            let Some((node, why)) = undone.why else { return Ok(()) };
            if deadline.left() <= PAUSE {
                let problem = format!(
                    "no answer within {:?} to {} of {} commands: {why}; is the node up, and the cluster healthy \
                     (redis-cli --cluster check)?",
                    self.limit,
                    undone.commands.len(),
                    batch.len()
                );
                return Err(StoreError::cluster(node, problem));
            }
            std::thread::sleep(PAUSE);
            // Whether the layout is known now or not: the time limit decides when to give up.
            let _ = self.look_around(deadline);
            open = undone.commands;
        }
    }

    /// One try at the commands `open`.
    fn attempt(&self, batch: &mut impl Batch, open: &[usize], deadline: Deadline) -> Result<Undone> {
        let slots = self.slots();
        let mut undone = Undone::default();
        let mut by_node: Vec<Vec<usize>> = vec![Vec::new(); slots.nodes.len()];
        for &i in open {
            match slots.masters[usize::from(batch.slot(i))] {
                Some(node) => by_node[usize::from(node)].push(i),
                None => undone.add([i], &self.seeds[0], unserved()),
            }
        }
        let mut rounds: Vec<(&Node, &[usize])> = Vec::new();
        let longest = by_node.iter().map(Vec::len).max().unwrap_or(0);
        for start in (0..longest).step_by(IN_FLIGHT) {
            rounds.clear();
            let parts = slots.nodes.iter().zip(&by_node).filter(|(_, commands)| commands.len() > start);
            rounds.extend(
                parts.map(|(node, commands)| (node, &commands[start..commands.len().min(start + IN_FLIGHT)])),
            );
            self.round(batch, &rounds, deadline, &mut undone)?;
        }
        Ok(undone)
    }

    /// Sends every node its commands, then reads every node's answers.
    fn round(
        &self,
        batch: &mut impl Batch,
        parts: &[(&Node, &[usize])],
        deadline: Deadline,
        undone: &mut Undone,
    ) -> Result<()> {
        let mut packed = Vec::new();
        let mut sent = Vec::with_capacity(parts.len());
        for &(node, commands) in parts {
            packed.clear();
            commands.iter().for_each(|&i| batch.pack(i, &mut packed));
            match self.connection(node, deadline).and_then(|mut connection| {
                connection.send(&packed, self.patience(deadline))?;
                Ok(connection)
            }) {
                Ok(connection) => sent.push((node, commands, connection)),
                Err(why) => undone.add(commands.iter().copied(), node, why),
            }
        }
        for (node, commands, connection) in sent {
            self.answers(batch, node, commands, connection, deadline, undone)?;
        }
        Ok(())
    }

    /// Reads the answers of a node. A connection on which an answer may still be under way is not used again.
    fn answers(
        &self,
        batch: &mut impl Batch,
        node: &Node,
        commands: &[usize],
        mut connection: Connection,
        deadline: Deadline,
        undone: &mut Undone,
    ) -> Result<()> {
        let mut asked = Vec::new();
        for (answered, &i) in commands.iter().enumerate() {
            match connection.answer(self.patience(deadline)).and_then(Value::extract_error) {
                Ok(answer) => batch.take(i, answer, node)?,
                Err(why) => match why.kind() {
                    ErrorKind::Server(ServerErrorKind::Ask) => asked.push((i, why)),
                    ErrorKind::Server(kind) if passes(kind) => undone.add([i], node, why),
                    ErrorKind::Server(_) => return Err(StoreError::cluster(node, refusal(&why))),
                    _ => {
                        undone.add(commands[answered..].iter().copied(), node, why);
                        return self.follow(batch, asked, deadline, undone);
                    }
                },
            }
        }
        self.idle().entry(node.clone()).or_default().push(connection);
        self.follow(batch, asked, deadline, undone)
    }

    /// Asks the nodes that a slot is just moving to. It rarely does, and few keys are affected: one by one.
    fn follow(
        &self,
        batch: &mut impl Batch,
        asked: Vec<(usize, RedisError)>,
        deadline: Deadline,
        undone: &mut Undone,
    ) -> Result<()> {
        for (i, redirection) in asked {
            let target = redirection.redirect_node().and_then(|(address, _)| address.rsplit_once(':'));
            let Some((host, Ok(port))) = target.map(|(host, port)| (host, port.parse())) else {
                undone.add([i], &self.seeds[0], redirection);
                continue;
            };
            let node = Node { host: host.into(), port };
            let mut packed = redis::cmd("ASKING").get_packed_command();
            batch.pack(i, &mut packed);
            let answer = self.connection(&node, deadline).and_then(|mut connection| {
                let patience = self.patience(deadline);
                connection.send(&packed, patience)?;
                connection.answer(patience)?.extract_error()?;
                let answer = connection.answer(patience)?.extract_error()?;
                self.idle().entry(node.clone()).or_default().push(connection);
                Ok(answer)
            });
            match answer {
                Ok(answer) => batch.take(i, answer, &node)?,
                Err(why) => undone.add([i], &node, why),
            }
        }
        Ok(())
    }

    /// A connection to `node`.
    fn connection(&self, node: &Node, deadline: Deadline) -> redis::RedisResult<Connection> {
        match self.idle().get_mut(node).and_then(Vec::pop) {
            Some(connection) => Ok(connection),
            None => Connection::open(node, &self.login, self.patience(deadline)),
        }
    }

    fn patience(&self, deadline: Deadline) -> Patience {
        Patience { deadline, silence: self.silence() }
    }

    /// How long a node may say nothing: one that hangs must leave time to find the one that takes its place.
    fn silence(&self) -> Duration {
        self.limit / 4
    }

    /// Asks one node after another for the cluster's layout, until one knows it.
    fn look_around(&self, deadline: Deadline) -> Result<()> {
        let known = self.slots();
        let mut problem = "it names no slots: not a cluster, or one that is not complete yet".to_owned();
        let nodes = known.nodes.iter().chain(self.seeds.iter().filter(|seed| !known.nodes.contains(seed)));
        for node in nodes {
            if deadline.has_passed() {
                break;
            }
            // The answer is short: a node that takes long for it is as good as none.
            let deadline = deadline.within(self.silence());
            let asked = self.connection(node, deadline).and_then(|mut connection| {
                connection.send(
                    &redis::cmd("CLUSTER").arg("SLOTS").get_packed_command(),
                    self.patience(deadline),
                )?;
                let layout = connection.answer(self.patience(deadline))?.extract_error()?;
                self.idle().entry(node.clone()).or_default().push(connection);
                Ok(layout)
            });
            match asked.map(|layout| slot_map(&layout, node)) {
                Ok(Some(slots)) => {
                    *self.slots.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(slots);
                    return Ok(());
                }
                Ok(None) => {}
                Err(refused) => problem = format!("{refused}"),
            }
        }
        let seeds: Vec<String> = self.seeds.iter().map(Node::to_string).collect();
        Err(StoreError::cluster(seeds.join(", "), format!("cannot learn the cluster's layout: {problem}")))
    }

    fn slots(&self) -> Arc<SlotMap> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<Node, Vec<Connection>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what a node refuses for this reason may succeed a little later, here or at another node.
fn passes(kind: ServerErrorKind) -> bool {
    matches!(
        kind,
        ServerErrorKind::Moved
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::BusyLoading
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly
    )
}

fn refusal(why: &RedisError) -> String {
    format!("it refuses: {why}; see its log, and whether it is the Redis Cluster that holds the rows")
}

fn unserved() -> RedisError {
    RedisError::from((ErrorKind::ClusterConnectionNotFound, "no node serves the key's slot"))
}

/// What `CLUSTER SLOTS` says; none if it names no slots. `teller` said it: its own address may be left out.
fn slot_map(layout: &Value, teller: &Node) -> Option<SlotMap> {
    let Value::Array(ranges) = layout else { return None };
    let mut map = SlotMap { nodes: Vec::new(), masters: vec![None; SLOTS] };
    for range in ranges {
        let Value::Array(range) = range else { return None };
        let [Value::Int(first), Value::Int(last), servers @ ..] = &range[..] else { return None };
        let nodes: Vec<usize> = servers.iter().filter_map(|server| map.add(server, teller)).collect();
        let (first, last) = (usize::try_from(*first).ok()?, usize::try_from(*last).ok()?);
        // The master comes first.
        let master = u16::try_from(*nodes.first()?).ok()?;
        map.masters.get_mut(first..=last)?.fill(Some(master));
    }
    map.masters.iter().any(Option::is_some).then_some(map)
}

impl SlotMap {
    /// The index of a server, `[host, port, …]`.
    fn add(&mut self, server: &Value, teller: &Node) -> Option<usize> {
        let Value::Array(fields) = server else { return None };
        let [host, Value::Int(port), ..] = &fields[..] else { return None };
        let host = match host {
            Value::BulkString(host) if !host.is_empty() => std::str::from_utf8(host).ok()?.into(),
            _ => teller.host.clone(),
        };
        let node = Node { host, port: u16::try_from(*port).ok()? };
        Some(self.nodes.iter().position(|known| *known == node).unwrap_or_else(|| {
            self.nodes.push(node);
            self.nodes.len() - 1
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        // The specification's own check value: CRC16 of "123456789" is 0x31C3.
        assert_eq!(slot("123456789"), 0x31C3);
    }

    #[test]
    fn a_layout_names_a_master_for_each_slot() {
        let text = |text: &str| Value::BulkString(text.into());
        let server = |host: &str, port| Value::Array(vec![text(host), Value::Int(port), text("id")]);
        let range = |first, last, servers: Vec<Value>| {
            Value::Array([vec![Value::Int(first), Value::Int(last)], servers].concat())
        };
        let teller = Node { host: "here".into(), port: 1 };
        let layout = Value::Array(vec![
            range(0, 99, vec![server("a", 7000), server("b", 7001)]),
            range(100, 16_383, vec![server("", 7002)]),
        ]);
        let map = slot_map(&layout, &teller).unwrap();
        let named: Vec<String> = map.nodes.iter().map(Node::to_string).collect();
        assert_eq!(named, ["redis://a:7000", "redis://b:7001", "redis://here:7002"]);
        assert_eq!((map.masters[99], map.masters[100]), (Some(0), Some(2)));
        for broken in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![range(0, 16_384, vec![server("a", 1)])]),
            Value::Array(vec![range(-1, 5, vec![server("a", 1)])]),
            Value::Array(vec![range(0, 5, vec![server("a", 70_000)])]),
        ] {
            assert!(slot_map(&broken, &teller).is_none(), "{broken:?}");
        }
    }
}
