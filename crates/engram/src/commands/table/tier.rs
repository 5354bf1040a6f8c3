//! Options that say where a table's rows are while they are asked for.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use engram_store::{
    CacheCounts, Cached, DirectOptions, DirectTable, QueueKind, RedisTable, RowSource, Storage, Table,
    TableHeader, TableOrigin,
};
use serde::Serialize;

use crate::failure::refuse;

/// A tier, and what it needs to know.
#[derive(Debug, Args)]
pub(crate) struct TierOptions {
    /// Where the rows are.
    #[arg(long = "tier", value_enum, default_value = "mapped")]
    pub(crate) kind: Tier,
    /// Keep rows in memory in front of the tier, in at most this many bytes: 256MiB.
    #[arg(long, value_name = "SIZE")]
    row_cache: Option<ByteSize>,
    /// Keep at most about this many bytes of the mapped file in memory (mapped tier): 8GiB. Pages that were not used lately
    /// are given back to the system. Without it the system decides.
    #[arg(long, value_name = "SIZE")]
    resident: Option<ByteSize>,
    /// Number of concurrent reads (direct tier). More reads raise throughput until the disk is saturated.
    #[arg(long, value_name = "N", default_value_t = 128)]
    depth: usize,
    /// What keeps them in flight.
    #[arg(long, value_enum, default_value = "uring")]
    queue: Queue,
    #[command(flatten)]
    cluster: ClusterOptions,
}

/// A cluster, and how long to wait for it.
#[derive(Debug, Args)]
pub(crate) struct ClusterOptions {
    /// Nodes of the Redis Cluster, such as redis://127.0.0.1:7000; one that answers is enough.
    #[arg(long = "node", value_name = "URL")]
    pub(crate) nodes: Vec<String>,
    /// Seconds that a request to the cluster may take.
    #[arg(long, value_name = "S", default_value_t = 15.0)]
    row_timeout: f64,
}

/// Where rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tier {
    /// All in memory, on huge pages where the system has them.
    Ram,
    /// In the file, mapped; the system keeps what it likes in memory.
    Mapped,
    /// In the file, read past the system's memory, with many reads in flight.
    Direct,
    /// In a Redis Cluster, which `engram table serve-redis-load` put them in.
    Redis,
}

/// Who keeps reads in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Queue {
    /// The kernel, by io_uring; where it refuses, threads.
    Uring,
    /// Threads.
    Threads,
}

/// A tier that answers.
pub(crate) struct OpenTier {
    pub(crate) source: Box<dyn RowSource>,
    cache: Option<Arc<Cached<Box<dyn RowSource>>>>,
    /// How the direct tier reads: the system may have refused what was asked for.
    pub(crate) path: Option<String>,
}

impl TierOptions {
    /// The tier with the rows of the table file at `path`.
    pub(crate) fn open(&self, path: &Path, header: &TableHeader) -> anyhow::Result<OpenTier> {
        let origin = &header.origin;
        if self.kind != Tier::Redis && !self.cluster.nodes.is_empty() {
            return refuse("--node goes with --tier redis");
        }
        if self.kind != Tier::Mapped && self.resident.is_some() {
            return refuse("--resident goes with --tier mapped");
        }
        let mut how = None;
        let source: Box<dyn RowSource> = match self.kind {
            Tier::Ram => Box::new(Table::read(path, origin, &Storage::Ram)?),
            Tier::Mapped => Box::new(self.map(path, origin)?),
            Tier::Direct => {
                let queue = match self.queue {
                    Queue::Uring => QueueKind::IoUring,
                    Queue::Threads => QueueKind::Threads,
                };
                let options = DirectOptions { depth: self.depth, queue, ..DirectOptions::default() };
                let table = DirectTable::open(path, origin, &options)?;
                how = Some(table.path_in_use().to_string());
                Box::new(table)
            }
            Tier::Redis => {
                let limit = self.cluster.limit()?;
                Box::new(RedisTable::open(&self.cluster.nodes()?, origin, limit)?)
            }
        };
        let Some(size) = self.row_cache else { return Ok(OpenTier { source, cache: None, path: how }) };
        let cache = Arc::new(Cached::new(source, size.as_u64())?);
        Ok(OpenTier { source: Box::new(Arc::clone(&cache)), cache: Some(cache), path: how })
    }

    /// The table mapped from its file, within the limit if there is one.
    fn map(&self, path: &Path, origin: &TableOrigin) -> anyhow::Result<Table> {
        let table = Table::open(path, origin)?;
        let Some(size) = self.resident else { return Ok(table) };
        #[cfg(unix)]
        return Ok(table.with_resident_limit(size.as_u64())?);
        #[cfg(not(unix))]
        return refuse(format!(
            "--resident {size}: not available on this system; use --tier direct with a --row-cache"
        ));
    }

    /// Reads of a file that the tier keeps in flight for each thread that asks; none if it reads no file.
    pub(crate) fn reads_in_flight(&self) -> Option<usize> {
        match self.kind {
            Tier::Ram | Tier::Redis => None,
            Tier::Mapped => Some(1),
            Tier::Direct => Some(self.depth),
        }
    }

    /// The tier, and the cache in front of it.
    pub(crate) fn name(&self) -> String {
        let tier = match self.kind {
            Tier::Ram => "RAM",
            Tier::Mapped => "mapped file",
            Tier::Direct => "direct",
            Tier::Redis => "Redis Cluster",
        };
        match self.row_cache {
            None => tier.into(),
            Some(size) => format!("{tier} behind a cache of {}", crate::number::bytes(size.as_u64())),
        }
    }
}

impl ClusterOptions {
    /// The nodes, of which there must be one.
    pub(crate) fn nodes(&self) -> anyhow::Result<Vec<&str>> {
        if self.nodes.is_empty() {
            return refuse("name a node of the cluster, such as --node redis://127.0.0.1:7000");
        }
        Ok(self.nodes.iter().map(String::as_str).collect())
    }

    /// How long to wait.
    pub(crate) fn limit(&self) -> anyhow::Result<Duration> {
        if !(self.row_timeout > 0.0 && self.row_timeout <= 86_400.0) {
            return refuse(format!(
                "--row-timeout is {}, but must be above 0 and at most a day",
                self.row_timeout
            ));
        }
        Ok(Duration::from_secs_f64(self.row_timeout))
    }
}

/// Counts of a cache; none if there is no cache.
pub(crate) type Counts = Box<dyn Fn() -> Option<CacheCounts> + Send + Sync>;

impl OpenTier {
    /// The rows of the table file at `path`, mapped.
    pub(crate) fn mapped(path: &Path, header: &TableHeader) -> anyhow::Result<Self> {
        let table = Table::open(path, &header.origin)?;
        Ok(Self { source: Box::new(table), cache: None, path: None })
    }

    /// The rows, for threads to share, and what counts the cache's hits.
    pub(crate) fn into_shared(self) -> (Arc<dyn RowSource>, Counts) {
        let cache = self.cache;
        (Arc::from(self.source), Box::new(move || cache.as_ref().map(|cache| cache.counts())))
    }

    /// What the cache in front had; none if there is no cache.
    pub(crate) fn counts(&self) -> Option<CacheCounts> {
        self.cache.as_ref().map(|cache| cache.counts())
    }
}
