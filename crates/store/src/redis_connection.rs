//! A connection to one Redis node, none of whose steps outlasts a deadline.
//!
//! Addresses, the protocol and its errors are the `redis` crate's. Its connection is not used: a limit on each read
//! of the socket, which is all that it has, does not bound an answer that comes byte by byte.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use redis::{ConnectionInfo, Parser, RedisResult, Value};

use crate::deadline::Deadline;

/// A server of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "redis://{}:{}", self.host, self.port)
    }
}

/// How long to wait for a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For all of what is being done.
    pub(crate) deadline: Deadline,
    /// For a node that says nothing at all: what is left of the time is for the one that takes its place.
    pub(crate) silence: Duration,
}

impl Patience {
    /// How long the next step may take.
    fn next_step(self) -> io::Result<Duration> {
        let left = self.deadline.left().min(self.silence);
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the answer is not complete within the limit",
            ));
        }
        // The system's clock counts microseconds, of which 0 would mean no limit.
        Ok(left.max(Duration::from_millis(1)))
    }
}

/// A connection, logged in.
pub(crate) struct Connection {
    stream: TcpStream,
    parser: Parser,
}

impl Connection {
    /// Connects to `node` and logs in as `login` says.
    pub(crate) fn open(node: &Node, login: &ConnectionInfo, patience: Patience) -> RedisResult<Self> {
        let mut refused = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in addresses(node, patience)? {
            match TcpStream::connect_timeout(&address, patience.next_step()?) {
                Ok(stream) => return Self::log_in(stream, login, patience),
                Err(error) => refused = error,
            }
        }
        Err(refused.into())
    }

    fn log_in(stream: TcpStream, login: &ConnectionInfo, patience: Patience) -> RedisResult<Self> {
        stream.set_nodelay(true)?;
        let mut connection = Self { stream, parser: Parser::new() };
        let settings = login.redis_settings();
        if let Some(password) = settings.password() {
            let mut command = redis::cmd("AUTH");
            settings.username().into_iter().for_each(|user| {
                command.arg(user);
            });
            connection.send(&command.arg(password).get_packed_command(), patience)?;
            connection.answer(patience)?.extract_error()?;
        }
        Ok(connection)
    }

    /// Sends commands as they go over the wire.
    pub(crate) fn send(&mut self, packed: &[u8], patience: Patience) -> RedisResult<()> {
        Ok(Timed { stream: &self.stream, patience }.write_all(packed)?)
    }

    /// The next answer, which may be an error that the node tells.
    pub(crate) fn answer(&mut self, patience: Patience) -> RedisResult<Value> {
        self.parser.parse_value(Timed { stream: &self.stream, patience })
    }
}

/// The addresses of a node. The system's look-up of names knows no limit, so that a thread waits for it.
fn addresses(node: &Node, patience: Patience) -> io::Result<Vec<SocketAddr>> {
    let port = node.port;
    if let Ok(address) = node.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (found, finding) = mpsc::channel();
    let host = Arc::clone(&node.host);
    std::thread::Builder::new().name("row-hosts".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = found.send((&*host, port).to_socket_addrs().map(Vec::from_iter));
    })?;
    let late =
        |_| io::Error::new(io::ErrorKind::TimedOut, "the host's name is not resolved within the limit");
    finding.recv_timeout(patience.next_step()?).map_err(late)?
}

/// A socket whose every read and write ends in time.
struct Timed<'a> {
    stream: &'a TcpStream,
    patience: Patience,
}

impl Read for Timed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.patience.next_step()?))?;
        self.stream.read(bytes)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.patience.next_step()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
