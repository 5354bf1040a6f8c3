//! The rows of a step, on their way before the model computes.
//!
//! Which rows a token reads depends on tokens alone. As soon as a step's tokens are known the rows of every memory
//! layer are asked for; they are waited for where the layer needs them, and the wait is measured.
//!
//! Rows of prompts to come have time, and there are many of them; those of tokens that are due have none. So each kind has
//! a prefetcher of its own, and the former are asked for a few at a time: a disk answers in the order in which it is
//! asked.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engram_address::{AddressError, Addressing, History};
use engram_data::PermutedPlaces;
use engram_store::{DistinctRows, PrefetchOptions, Prefetcher, RowSource, StoreError, Ticket};

/// Addressing, and for each memory layer the tier that its rows are fetched from.
#[derive(Debug)]
pub struct RowTiers {
    addressing: Addressing,
    layers: Vec<Tier>,
    /// Whether rows are asked for only where a layer needs them.
    on_demand: bool,
    /// None: every position reads the rows of its own n-grams.
    permuted: Option<PermutedPlaces>,
    /// Of each layer the rows that an overlay changes, if that is to be told.
    changed: Vec<HashSet<u64>>,
}

/// Where the rows of a layer come from.
#[derive(Debug)]
enum Tier {
    /// They are fetched by threads, while others compute.
    Far {
        /// For rows of the next step.
        due: Arc<Prefetcher>,
        /// For rows of later steps.
        ahead: Prefetcher,
        /// Values of a row.
        width: usize,
    },
    /// They are at hand: reading them takes less than asking a thread for them.
    Near(NearRows),
}

/// Rows at hand.
#[derive(Clone)]
struct NearRows(Arc<dyn RowSource>);

impl fmt::Debug for NearRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NearRows({} rows)", self.0.rows())
    }
}

impl Tier {
    fn width(&self) -> usize {
        match self {
            Self::Far { width, .. } => *width,
            Self::Near(rows) => rows.0.width(),
        }
    }
}

/// When rows are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needed {
    /// In the step that computes next.
    Now,
    /// In a step after it.
    Later,
}

/// Rows needed later that are asked for at a time: with 32 a chunk of a prompt is still there in time, and
/// rows of the next step hardly wait (docs/results/serving.md).
const AHEAD_AT_A_TIME: usize = 32;

/// Tables that do not fit the addressing.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// Another number of tables than of memory layers.
    #[error("{found} tables for {needed} memory layers")]
    Count {
        /// Memory layers.
        needed: usize,
        /// Tables given.
        found: usize,
    },
    /// A table has other rows than its layer reads.
    #[error("the table of layer {layer} has {found} rows, but the layer addresses {needed}")]
    Rows {
        /// The layer, counted from 0.
        layer: usize,
        /// Rows that it addresses.
        needed: u64,
        /// Rows of the table.
        found: u64,
    },
    /// Threads could not be started.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RowTiers {
    /// Fetches from `sources`, one for each memory layer in order, by `options`: those hold for rows of each kind of need
    /// by themselves, but that rows needed later are asked for a few at a time.
    ///
    /// # Errors
    /// When the tables are not those of the addressing's layers, or threads cannot be started.
    pub fn new(
        addressing: Addressing,
        sources: Vec<Arc<dyn RowSource>>,
        options: &PrefetchOptions,
    ) -> Result<Self, TierError> {
        Self::of(addressing, sources, |source| {
            let width = source.width();
            let few = options.at_a_time.min(AHEAD_AT_A_TIME);
            let later = options.clone().threads(1).at_a_time(few);
            let ahead = Prefetcher::new(Arc::clone(&source), &later)?;
            Ok(Tier::Far { due: Arc::new(Prefetcher::new(source, options)?), ahead, width })
        })
    }

    /// Reads from `sources`, one for each memory layer in order, where a layer needs rows: for sources that have all rows
    /// at hand, so that asking threads for them would take longer.
    ///
    /// # Errors
    /// When the tables are not those of the addressing's layers.
    pub fn near(addressing: Addressing, sources: Vec<Arc<dyn RowSource>>) -> Result<Self, TierError> {
        Self::of(addressing, sources, |source| Ok(Tier::Near(NearRows(source))))
    }

    fn of(
        addressing: Addressing,
        sources: Vec<Arc<dyn RowSource>>,
        tier: impl Fn(Arc<dyn RowSource>) -> Result<Tier, TierError>,
    ) -> Result<Self, TierError> {
        let needed = addressing.layers().len();
        if sources.len() != needed {
            return Err(TierError::Count { needed, found: sources.len() });
        }
        let layers = addressing.layers().iter().zip(sources).map(|(layer, source)| {
            if source.rows() != layer.rows() {
                let (needed, found) = (layer.rows(), source.rows());
                return Err(TierError::Rows { layer: layer.layer(), needed, found });
            }
            tier(source)
        });
        let layers = layers.collect::<Result<_, _>>()?;
        Ok(Self { addressing, layers, on_demand: false, permuted: None, changed: Vec::new() })
    }

    /// Tells of every position how many of its rows are among `changed`, of each layer those that an overlay changes.
    pub fn telling(self, changed: Vec<HashSet<u64>>) -> Self {
        Self { changed, ..self }
    }

    /// Of each layer, how many of the rows that the positions `range` of `tokens` read an overlay changes.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub(crate) fn changed(
        &self,
        tokens: &[u32],
        range: Range<usize>,
    ) -> Result<Vec<Vec<usize>>, AddressError> {
        if self.changed.is_empty() || self.permuted.is_some() {
            return Ok(vec![vec![0; range.len()]; self.layers.len()]);
        }
        // Tokens further back are in none of the n-grams.
        let first = range.start.saturating_sub(self.addressing.max_order() - 1);
        let mut ids = Vec::new();
        let of_layer = |(layer, changed): (usize, &HashSet<u64>)| {
            ids.clear();
            self.addressing.row_ids(layer, &tokens[first..range.end], &mut ids)?;
            let slots = ids.len() / (range.end - first);
            let of_token = |ids: &[u64]| ids.iter().filter(|id| changed.contains(id)).count();
            Ok(ids.chunks_exact(slots).skip(range.start - first).map(of_token).collect())
        };
        self.changed.iter().enumerate().map(of_layer).collect()
    }

    /// Asks for rows only where a layer needs them: to measure what asking early is worth.
    pub fn on_demand(self) -> Self {
        Self { on_demand: true, ..self }
    }

    /// Reads the rows of other positions' n-grams: the control that a memory is compared with.
    pub fn permuted(self, permuted: Option<PermutedPlaces>) -> Self {
        Self { permuted, ..self }
    }

    /// The addressing.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// Values of a row of each layer.
    pub fn widths(&self) -> Vec<usize> {
        self.layers.iter().map(Tier::width).collect()
    }

    /// Has the rows of all layers fetched that these tokens read.
    ///
    /// # Errors
    /// When there is no room for them within the prefetcher's limit.
    pub fn fetch(&self, ids: RowIds, needed: Needed) -> Result<RowFetch, StoreError> {
        let layers = self.layers.iter().zip(&ids.layers).map(|(tier, ids)| {
            let distinct = DistinctRows::of(ids);
            let rows = match (tier, self.on_demand, needed) {
                (Tier::Near(rows), _, _) => Rows::Near(rows.clone()),
                (Tier::Far { due, .. }, true, _) => Rows::OnDemand(Arc::clone(due)),
                (Tier::Far { due, .. }, false, Needed::Now) => Rows::OnTheirWay(due.submit(distinct.ids())?),
                (Tier::Far { ahead, .. }, false, Needed::Later) => {
                    Rows::OnTheirWay(ahead.submit(distinct.ids())?)
                }
            };
            Ok(LayerFetch { distinct, rows, width: tier.width() })
        });
        let layers = layers.collect::<Result<_, StoreError>>()?;
        Ok(RowFetch { layers, tokens: ids.tokens, waited: Duration::ZERO })
    }
}

/// Row ids of tokens, layer by layer, `[tokens, slots]` each.
#[derive(Debug, Clone, Default)]
pub struct RowIds {
    layers: Vec<Vec<u64>>,
    tokens: usize,
}

impl RowIds {
    /// Adds those of `tokens`, which come next in `history`.
    ///
    /// # Errors
    /// When a token is outside the vocabulary. The history is then as it was.
    pub fn add(
        &mut self,
        history: &mut History,
        tokens: &[u32],
        tiers: &RowTiers,
    ) -> Result<(), AddressError> {
        let layers = tiers.addressing.layers().len();
        self.layers.resize(layers, Vec::new());
        let first = history.len();
        let new = history.extend(tokens)?;
        self.tokens += tokens.len();
        let mut of_layer = Vec::new();
        if let Some(permuted) = tiers.permuted {
            return self.add_permuted(history, first, permuted, &tiers.addressing);
        }
        for (layer, ids) in self.layers.iter_mut().enumerate() {
            new.row_ids(layer, &mut of_layer)?;
            ids.extend_from_slice(&of_layer);
        }
        Ok(())
    }

    /// Adds those that the tokens from `first` on read instead of their own.
    fn add_permuted(
        &mut self,
        history: &History,
        first: usize,
        permuted: PermutedPlaces,
        addressing: &Addressing,
    ) -> Result<(), AddressError> {
        let mut of_token = Vec::new();
        for position in first..history.len() {
            let source = permuted.source(position).and_then(|source| history.token(source));
            for (layer, ids) in self.layers.iter_mut().enumerate() {
                of_token.clear();
                match source {
                    Some(token) => token.row_ids(layer, &mut of_token)?,
                    None => addressing.row_ids(layer, &[permuted.padding()], &mut of_token)?,
                }
                ids.extend_from_slice(&of_token);
            }
        }
        Ok(())
    }
}

/// Rows that are on their way.
pub struct RowFetch {
    layers: Vec<LayerFetch>,
    /// Tokens that they are for.
    tokens: usize,
    waited: Duration,
}

struct LayerFetch {
    distinct: DistinctRows,
    rows: Rows,
    width: usize,
}

enum Rows {
    OnTheirWay(Ticket),
    OnDemand(Arc<Prefetcher>),
    Near(NearRows),
    Taken,
}

impl RowFetch {
    /// Tokens that it brings rows for.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Waits for the rows of memory layer `index` and adds them to `out`, `[tokens, slots · row width]`: each token's
    /// rows side by side.
    ///
    /// # Errors
    /// When they cannot be read, or not in time.
    ///
    /// # Panics
    /// When they were taken before.
    pub(crate) fn take(&mut self, index: usize, out: &mut Vec<f32>) -> Result<(), StoreError> {
        let layer = &mut self.layers[index];
        let mut rows = vec![0.0; layer.distinct.len() * layer.width];
        let start = Instant::now();
        let fetched = match std::mem::replace(&mut layer.rows, Rows::Taken) {
            Rows::OnTheirWay(ticket) => ticket.wait().map(Some),
            Rows::OnDemand(prefetcher) => {
                prefetcher.submit(layer.distinct.ids()).and_then(Ticket::wait).map(Some)
            }
            Rows::Near(source) => source.0.gather(layer.distinct.ids(), &mut rows).map(|()| None),
            Rows::Taken => panic!("the rows of a layer are taken once"),
        };
        self.waited += start.elapsed();
        if let Some(fetched) = fetched? {
            fetched.decode(&mut rows)?;
        }
        let first = out.len();
        out.resize(first + layer.distinct.index().len() * layer.width, 0.0);
        layer.distinct.expand(&rows, layer.width, &mut out[first..])
    }

    /// Whether nothing would be waited for; always where rows are asked for only when they are needed.
    pub(crate) fn is_ready(&self) -> bool {
        self.layers.iter().all(|layer| match &layer.rows {
            Rows::OnTheirWay(ticket) => ticket.is_ready(),
            Rows::OnDemand(_) | Rows::Near(_) | Rows::Taken => true,
        })
    }

    /// Time spent waiting for rows so far.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl fmt::Debug for RowFetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RowFetch").field("layers", &self.layers.len()).finish_non_exhaustive()
    }
}
