//! Row ids to rows: formats, tables, gathering and row-sparse training of Engram's memory.
//!
//! Engram's memory is a table of rows, millions to hundreds of millions of them, of which a token needs a few
//! dozen. Which ones depends on tokens alone (see `engram-address`), so that they can be fetched before the
//! model runs. This crate knows rows and nothing of tensors or models. It is useful for any large embedding
//! table.
//!
//! * [`RowFormat`]: how a row lies in bytes: floats of 32, 16 or 8 bits, or integers of 8 or 4, with their
//!   scales beside them.
//! * [`Table`]: rows to read, in RAM on huge pages or mapped from a file. A random row costs a cache miss in
//!   every level; [`RowSource::gather`] keeps many of them in flight.
//! * [`DirectTable`]: rows straight from the disk, with many reads in flight, for tables larger than memory.
//!   [`Cached`] keeps what is asked for often in front of it, or of any other [`RowSource`].
//! * `RedisTable`, with the feature `redis`: rows in a Redis Cluster, for tables beyond one machine.
//! * [`Prefetcher`]: ids submitted now, rows taken when they are needed.
//! * [`DistinctRows`]: about half of the rows that a batch of text asks for are duplicates. Each is fetched,
//!   and learns, once.
//! * [`TrainableTable`] and [`RowOptimizer`]: rows that learn. Memory rows live outside automatic
//!   differentiation: the rows of a batch enter the model as one leaf, and its gradient comes back to
//!   [`update`](TrainableTable::update), which touches those rows only. Nothing but values and state is ever
//!   the size of the table.
//! * [`Storage`]: values and state in RAM, or in a mapped file where RAM is too small.
//! * The [table file](table_file): one checked file per table, written whole or not at all. It names the
//!   addressing that its rows belong to, [`TableOrigin`], and is refused under any other.
//! * [`TableWriter`] and [`TableReader`]: a table as a stream, in memory that does not depend on its size;
//!   [`convert`] from one format to another with a report of its [`Quality`]; [`import`] and [`export`]
//!   between table files and the safetensors files of published models.
//! * [`Overlay`]: a small file of changed rows for a table that is only read; [`Overlaid`] stacks them.
//!   [`ZeroRows`] is a table that takes no room, for overlays to lie on.
//! * [`RowUse`] and [`ReuseDistances`]: how a corpus uses a table, and how often a cache would have the row.
//!
//! ```
//! use engram_store::{AddressIdentity,
//!     DistinctRows, RowInit, RowOptimizer, RowSource, Storage, Table, TableOrigin, TrainableTable,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
//! let init = RowInit::Normal { deviation: 0.02, seed: 42 };
//! let mut table = TrainableTable::new(100_003, 64, init, RowOptimizer::adam(), origin, &Storage::Ram)?;
//!
//! // A batch asks for six rows, four of them distinct.
//! let batch = [17, 99_999, 17, 3, 52_000, 3];
//! let distinct = DistinctRows::of(&batch);
//! assert_eq!(distinct.ids(), [3, 17, 52_000, 99_999]);
//! let mut rows = vec![0.0; distinct.len() * 64];
//! table.gather(distinct.ids(), &mut rows)?;
//!
//! // ... the model uses rows[distinct.index()[i]] for occurrence i, and hands back a gradient ...
//! let gradient = vec![1.0; rows.len()];
//! table.update(distinct.ids(), &gradient, 1e-3)?;
//! assert!(table.row(3)?[0] < rows[0]);
//!
//! // One file holds values, optimiser state and step; the same file serves for reading only.
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("layer1.table");
//! table.save(&path)?;
//! let resumed = TrainableTable::load(&path, &origin, &Storage::Ram)?;
//! assert_eq!(resumed.step(), 1);
//! Table::open(&path, &origin)?.gather(distinct.ids(), &mut rows)?;
//! assert_eq!(rows[..64], resumed.row(3)?);
//!
//! // An id that is not a row is never clamped.
//! let wrong = table.gather(&[5, 100_003], &mut [0.0; 128]).unwrap_err().to_string();
//! assert!(wrong.starts_with("row 100003, at position 1 of the batch, is outside the table of 100003 rows"));
//! # Ok(())
//! # }
//! ```

// Some parts are there for features that may be off.
#![cfg_attr(
    not(all(feature = "cache", feature = "safetensors", feature = "sigbus", feature = "train")),
    allow(dead_code)
)]

#[cfg(target_endian = "big")]
compile_error!(
    "rows are kept little-endian, as they are on disk; big-endian machines would need to swap them"
);

#[cfg(feature = "train")]
mod balanced_momentum;
mod cache_line;
#[cfg(feature = "cache")]
mod cache_sets;
#[cfg(feature = "cache")]
mod cached;
#[cfg(feature = "safetensors")]
mod checkpoint;
#[cfg(feature = "write")]
mod convert;
mod copy_rows;
mod deadline;
mod direct_table;
mod distinct_rows;
mod error;
mod file_stamp;
mod float16;
pub mod fp8;
mod grouped_int;
mod header_page;
mod mapping;
mod memory;
#[cfg(feature = "write")]
mod new_file;
mod origin;
mod overlay;
mod positioned;
mod prefetch;
mod progress;
#[cfg(feature = "safetensors")]
mod published;
mod read_queue;
#[cfg(feature = "train")]
mod records;
#[cfg(feature = "redis")]
mod redis_cluster;
#[cfg(feature = "redis")]
mod redis_connection;
#[cfg(feature = "redis")]
mod redis_table;
#[cfg(all(unix, feature = "mapped"))]
mod resident;
mod reuse_distances;
mod row_format;
mod row_init;
mod row_optimizer;
mod row_source;
mod row_use;
mod simd;
mod span;
mod split_mix;
mod table;
pub mod table_file;
mod table_reader;
#[cfg(feature = "write")]
mod table_writer;
#[cfg(feature = "train")]
mod trainable_table;
mod until_error;
#[cfg(all(target_os = "linux", feature = "io-uring"))]
mod uring;
mod zero_rows;

pub use engram_identity::{AddressIdentity, NotHexadecimal};

#[cfg(feature = "cache")]
pub use cached::{CacheCounts, Cached};
#[cfg(feature = "safetensors")]
pub use checkpoint::Checkpoint;
#[cfg(feature = "write")]
pub use convert::{Quality, QualityMeter, convert, save_rows, table_scale};
pub use direct_table::{DirectOptions, DirectTable, QueueKind, ReadPath};
pub use distinct_rows::DistinctRows;
pub use error::{Result, StoreError};
pub use memory::Storage;
pub use origin::{ContentHash, TableOrigin};
#[cfg(feature = "write")]
pub use overlay::OverlayWriter;
pub use overlay::{Overlaid, Overlay};
pub use prefetch::{FetchedRows, PrefetchOptions, Prefetcher, Ticket};
pub use progress::Progress;
#[cfg(feature = "safetensors")]
pub use published::{TableTensors, export, import};
#[cfg(feature = "redis")]
pub use redis_table::{RedisTable, StoredContent};
pub use reuse_distances::ReuseDistances;
pub use row_format::{RowFormat, TableScale, VALUES_PER_SCALE};
pub use row_init::{LARGEST_DEVIATION, RowInit};
pub use row_optimizer::RowOptimizer;
pub use row_source::RowSource;
pub use row_use::{HeadUse, NGramUse, RowUse, expected_colliding, expected_used};
#[cfg(feature = "mapped")]
pub use table::MapOptions;
pub use table::Table;
pub use table_file::TableHeader;
pub use table_reader::TableReader;
#[cfg(feature = "write")]
pub use table_writer::TableWriter;
#[cfg(feature = "train")]
pub use trainable_table::TrainableTable;
pub use zero_rows::ZeroRows;

/// The examples of the README, which are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
