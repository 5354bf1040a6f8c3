//! Options that choose the tier of a table's rows.

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

/// A tier and its options.
#[derive(Debug, Args)]
pub(crate) struct TierOptions {
    /// Where the rows are stored.
    #[arg(long = "tier", value_enum, default_value = "mapped")]
    pub(crate) kind: Tier,
    /// Size of the row cache in front of the tier, such as 256MiB.
    #[arg(long, value_name = "SIZE")]
    row_cache: Option<ByteSize>,
    /// Keep at most about this much of the mapped file in memory (mapped tier), such as 8GiB. Pages not used lately are
    /// released. The default leaves this to the system.
    #[arg(long, value_name = "SIZE")]
    resident: Option<ByteSize>,
    /// Number of concurrent reads (direct tier). More reads raise throughput until the disk is saturated.
    #[arg(long, value_name = "N", default_value_t = 128)]
    depth: usize,
    /// How concurrent reads are made (direct tier).
    #[arg(long, value_enum, default_value = "uring")]
    queue: Queue,
    #[command(flatten)]
    cluster: ClusterOptions,
}

/// A cluster and its timeout.
#[derive(Debug, Args)]
pub(crate) struct ClusterOptions {
    /// Node of the Redis Cluster, such as redis://127.0.0.1:7000. One reachable node is enough. May be repeated.
    #[arg(long = "node", value_name = "URL")]
    pub(crate) nodes: Vec<String>,
    /// Timeout of a request to the cluster in seconds.
    #[arg(long, value_name = "S", default_value_t = 15.0)]
    row_timeout: f64,
}

/// Tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Tier {
    /// In RAM, on huge pages if the system supports them.
    Ram,
    /// In the mapped file; the system decides what stays in memory.
    Mapped,
    /// In the file, read past the page cache with many concurrent reads.
    Direct,
    /// In a Redis Cluster, loaded by `engram table serve-redis-load`.
    Redis,
}

/// Ways to make concurrent reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Queue {
    /// io_uring, or threads if the kernel refuses it.
    Uring,
    /// Threads.
    Threads,
}

/// An open tier.
pub(crate) struct OpenTier {
    pub(crate) source: Box<dyn RowSource>,
    cache: Option<Arc<Cached<Box<dyn RowSource>>>>,
    /// How the direct tier reads; the system may have refused the requested way.
    pub(crate) path: Option<String>,
}

impl TierOptions {
    /// How long the tier may take to answer.
    pub(crate) fn limit(&self) -> anyhow::Result<Duration> {
        self.cluster.limit()
    }

    /// Opens the tier with the rows of the table file at `path`.
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
                let options = DirectOptions::default().depth(self.depth).queue(queue);
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

    /// Maps the table's file, within the limit if there is one.
    fn map(&self, path: &Path, origin: &TableOrigin) -> anyhow::Result<Table> {
        let Some(size) = self.resident else { return Ok(Table::open(path, origin)?) };
        #[cfg(unix)]
        return Ok(Table::open_with(path, origin, &engram_store::MapOptions::new().resident(size.as_u64()))?);
        #[cfg(not(unix))]
        return refuse(format!(
            "--resident {size}: not available on this system; use --tier direct with a --row-cache"
        ));
    }

    /// Number of concurrent reads of a file per requesting thread; none if the tier reads no file.
    pub(crate) fn reads_in_flight(&self) -> Option<usize> {
        match self.kind {
            Tier::Ram | Tier::Redis => None,
            Tier::Mapped => Some(1),
            Tier::Direct => Some(self.depth),
        }
    }

    /// The tier and its cache, in words.
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
    /// The nodes; there must be at least one.
    pub(crate) fn nodes(&self) -> anyhow::Result<Vec<&str>> {
        if self.nodes.is_empty() {
            return refuse("name a node of the cluster, such as --node redis://127.0.0.1:7000");
        }
        Ok(self.nodes.iter().map(String::as_str).collect())
    }

    /// The timeout.
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

/// The cache's counts; none without a cache.
pub(crate) type Counts = Box<dyn Fn() -> Option<CacheCounts> + Send + Sync>;

impl OpenTier {
    /// The rows of the table file at `path`, mapped.
    pub(crate) fn mapped(path: &Path, header: &TableHeader) -> anyhow::Result<Self> {
        let table = Table::open(path, &header.origin)?;
        Ok(Self { source: Box::new(table), cache: None, path: None })
    }

    /// The rows, shared by threads, and the cache's counters.
    pub(crate) fn into_shared(self) -> (Arc<dyn RowSource>, Counts) {
        let cache = self.cache;
        (Arc::from(self.source), Box::new(move || cache.as_ref().map(|cache| cache.counts())))
    }

    /// The cache's counts; none without a cache.
    pub(crate) fn counts(&self) -> Option<CacheCounts> {
        self.cache.as_ref().map(|cache| cache.counts())
    }
}
