//! The memory of a model being trained or used: addressing and one table of rows per memory layer.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use engram_address::{Addressing, Vocabulary};
use engram_config::{BiasCorrection, Compression, MemoryConfig, RowOptimizerKind, RowStorage, RowTraining};
use engram_data::TextTokenizer;
use engram_model::{MemoryRows, Sequences};
use engram_store::{
    DistinctRows, RowFormat, RowInit, RowOptimizer, RowSource, Storage, Table, TableHeader, TableOrigin,
    TrainableTable, save_rows,
};

use crate::error::{Error, Result};
use crate::lookup::RowPlaces;

/// The store's optimiser for rows that train so.
pub(crate) fn row_optimizer(training: &RowTraining) -> RowOptimizer {
    let beta1 = training.beta1.unwrap_or(0.9);
    let beta2 = training.beta2.unwrap_or(0.999);
    let epsilon = training.epsilon.unwrap_or(1e-8);
    match (training.optimizer, training.bias_correction) {
        (RowOptimizerKind::Adam, Some(BiasCorrection::Row)) => {
            RowOptimizer::AdamByRow { beta1, beta2, epsilon }
        }
        (RowOptimizerKind::Adam, Some(BiasCorrection::Table) | None) => {
            RowOptimizer::Adam { beta1, beta2, epsilon }
        }
        (RowOptimizerKind::RowWiseAdam, _) => RowOptimizer::RowWiseAdam { beta2, epsilon },
        (RowOptimizerKind::BalancedMomentum, _) => RowOptimizer::balanced_momentum(),
        (RowOptimizerKind::Frozen, _) => RowOptimizer::Frozen,
    }
}

/// The addressing of `memory` over the vocabulary of `tokenizer`.
///
/// # Errors
/// When the two do not fit, such as a pad token outside the vocabulary.
pub fn addressing(memory: &MemoryConfig, tokenizer: &TextTokenizer) -> Result<Addressing> {
    let vocabulary = match memory.compression {
        Compression::Normalised => Vocabulary::from_tokenizer(tokenizer)?,
        Compression::None => Vocabulary::identity(tokenizer.get_vocab_size(true)),
    };
    Ok(Addressing::new(&memory.addressing(), vocabulary)?)
}

/// Rows of every memory layer that a batch needs, each distinct row once.
#[derive(Debug, Clone)]
pub struct Fetched {
    layers: Vec<FetchedLayer>,
}

#[derive(Debug, Clone)]
struct FetchedLayer {
    width: usize,
    distinct: DistinctRows,
    /// `[distinct, width]`
    rows: Vec<f32>,
}

impl Fetched {
    /// No rows, for a model without memory.
    pub fn none() -> Self {
        Self { layers: Vec::new() }
    }

    /// What the model takes for all windows, on `device`.
    pub fn memory_rows(&self, device: &Device) -> Vec<MemoryRows> {
        let rows = |layer: &FetchedLayer| {
            let data = TensorData::new(layer.rows.clone(), [layer.distinct.len(), layer.width]);
            MemoryRows {
                rows: Tensor::from_data(data, device),
                index: layer.distinct.index().into(),
                dead: None,
            }
        };
        self.layers.iter().map(rows).collect()
    }

    /// Divides the rows among micro-batches of `micro_batch` windows, of the `windows` of equal length that were fetched;
    /// the last may have fewer. Each has its own distinct rows alone, so that a step costs as much in many micro-batches
    /// as in one.
    pub(crate) fn micro_batches(&self, windows: usize, micro_batch: usize) -> Vec<MicroBatchRows> {
        let count = windows.div_ceil(micro_batch);
        if count == 1 {
            let whole =
                |layer: &FetchedLayer| PartLayer { places: None, index: layer.distinct.index().into() };
            return vec![MicroBatchRows { layers: self.layers.iter().map(whole).collect() }];
        }
        let mut parts: Vec<_> = (0..count).map(|_| MicroBatchRows { layers: Vec::new() }).collect();
        for layer in &self.layers {
            let per_window = layer.distinct.index().len() / windows;
            let mut local = vec![ABSENT; layer.distinct.len()];
            let slots = layer.distinct.index().chunks(per_window * micro_batch);
            parts
                .iter_mut()
                .zip(slots)
                .for_each(|(part, slots)| part.layers.push(PartLayer::of(slots, &mut local)));
        }
        parts
    }
}

/// The memory rows of one micro-batch, among those of its step.
#[derive(Debug)]
pub(crate) struct MicroBatchRows {
    layers: Vec<PartLayer>,
}

#[derive(Debug)]
struct PartLayer {
    /// Where each row of the micro-batch stands among the step's distinct rows; none: it has all of them, in order.
    places: Option<Vec<u32>>,
    /// The row of each slot, `[windows·time·slots]`.
    index: Arc<[u32]>,
}

/// A row that the micro-batch has not met.
const ABSENT: u32 = u32::MAX;

impl PartLayer {
    /// Rows in the order in which the `slots` meet them. `local`, one for each row of the step, is all absent before and
    /// after.
    fn of(slots: &[u32], local: &mut [u32]) -> Self {
        let mut places = Vec::new();
        let index = slots.iter().map(|&place| {
            let own = &mut local[place as usize];
            if *own == ABSENT {
                *own = places.len() as u32;
                places.push(place);
            }
            *own
        });
        let index = index.collect();
        places.iter().for_each(|&place| local[place as usize] = ABSENT);
        Self { places: Some(places), index }
    }

    /// The rows, `[rows, width]`.
    fn rows(&self, layer: &FetchedLayer) -> Rows {
        let width = layer.width;
        match &self.places {
            None => (layer.rows.clone(), [layer.distinct.len(), width]),
            Some(places) => {
                let row = |&place: &u32| &layer.rows[place as usize * width..][..width];
                let rows: Vec<f32> = places.iter().flat_map(row).copied().collect();
                (rows, [places.len(), width])
            }
        }
    }
}

/// Values, row by row, and their shape.
type Rows = (Vec<f32>, [usize; 2]);

impl MicroBatchRows {
    /// What the model takes, with the rows as leaves of the graph on `device` that have a gradient.
    pub(crate) fn memory_rows(&self, fetched: &Fetched, device: &Device) -> Vec<MemoryRows> {
        let rows = |(part, layer): (&PartLayer, &FetchedLayer)| {
            let (values, shape) = part.rows(layer);
            let rows = Tensor::from_data(TensorData::new(values, shape), device).require_grad();
            MemoryRows { rows, index: Arc::clone(&part.index), dead: None }
        };
        self.layers.iter().zip(&fetched.layers).map(rows).collect()
    }
}

/// Gradients of a step's distinct rows, `[distinct, width]` per memory layer, summed over its micro-batches.
#[derive(Debug, Default)]
pub(crate) struct RowGradients {
    layers: Vec<Vec<f32>>,
    /// Values of a row, per layer.
    widths: Vec<usize>,
}

impl RowGradients {
    /// Zeros for the rows of `fetched`.
    pub(crate) fn zeros(fetched: &Fetched) -> Self {
        let zeros = |layer: &FetchedLayer| vec![0.0; layer.rows.len()];
        Self {
            layers: fetched.layers.iter().map(zeros).collect(),
            widths: fetched.layers.iter().map(|layer| layer.width).collect(),
        }
    }

    /// Adds the gradients of `part`, `[rows, width]` per layer; none: of a layer that the loss does not depend on.
    pub(crate) fn add(&mut self, part: &MicroBatchRows, gradients: Vec<Option<Vec<f32>>>) {
        for ((sums, part), gradients) in self.layers.iter_mut().zip(&part.layers).zip(gradients) {
            let Some(gradients) = gradients else { continue };
            let Some(places) = &part.places else {
                *sums = gradients;
                continue;
            };
            let width = gradients.len() / places.len();
            for (&place, gradient) in places.iter().zip(gradients.chunks_exact(width)) {
                let sum = &mut sums[place as usize * width..][..width];
                sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
            }
        }
    }

    /// Whether tables take them: every value is finite, and so is what their optimisers make of it.
    pub(crate) fn can_be_learnt(&self) -> bool {
        let layers = self.layers.iter().zip(&self.widths);
        layers.into_iter().all(|(values, &width)| can_be_learnt(values, width))
    }
}

/// Whether the gradients of rows of `width` values are such that a table takes them.
pub(crate) fn can_be_learnt(gradients: &[f32], width: usize) -> bool {
    let largest = RowOptimizer::largest_gradient(width);
    gradients.iter().all(|value| value.abs() <= largest)
}

/// Fetches the rows of their own n-grams that the `sequences` of `tokens` need of `tables`.
///
/// # Errors
/// When a token is outside the vocabulary, or a table cannot be read.
pub fn fetch<T: RowSource>(
    addressing: &Addressing,
    tables: &[T],
    tokens: &[u32],
    sequences: &Sequences,
) -> Result<Fetched> {
    fetch_from(RowPlaces::default(), addressing, tables, tokens, sequences)
}

fn fetch_from<T: RowSource>(
    places: RowPlaces,
    addressing: &Addressing,
    tables: &[T],
    tokens: &[u32],
    sequences: &Sequences,
) -> Result<Fetched> {
    let assign = |(index, table): (usize, &T)| {
        let slots = addressing.layers()[index].slots();
        let mut ids = vec![0; tokens.len() * slots];
        let (mut tokens, mut left) = (tokens, &mut ids[..]);
        for time in sequences.lengths() {
            let (sequence, later) = tokens.split_at(time);
            let (of_sequence, rest) = left.split_at_mut(time * slots);
            places.row_ids(addressing, index, sequence, of_sequence)?;
            (tokens, left) = (later, rest);
        }
        let distinct = DistinctRows::of(&ids);
        // All layers' rows are on their way before the first is waited for.
        table.prefetch(distinct.ids())?;
        Ok(distinct)
    };
    let gather = |(table, distinct): (&T, DistinctRows)| {
        let width = table.width();
        let mut rows = vec![0.0; distinct.len() * width];
        table.gather(distinct.ids(), &mut rows)?;
        Ok(FetchedLayer { width, distinct, rows })
    };
    let distinct: Vec<DistinctRows> = tables.iter().enumerate().map(assign).collect::<Result<_>>()?;
    Ok(Fetched { layers: tables.iter().zip(distinct).map(gather).collect::<Result<_>>()? })
}

/// Memory that learns.
#[derive(Debug)]
pub struct MemoryTables {
    addressing: Addressing,
    places: RowPlaces,
    tables: Vec<TrainableTable>,
    rate_factor: f32,
}

impl MemoryTables {
    /// New tables for `memory`, at step 0. `folder` holds the scratch files of mapped tables.
    ///
    /// # Errors
    /// When the memory cannot be allocated.
    pub fn new(
        memory: &MemoryConfig,
        training: &RowTraining,
        addressing: Addressing,
        seed: u64,
        folder: &Path,
    ) -> Result<Self> {
        let optimizer = row_optimizer(training);
        let storage = storage(training, folder);
        let table = |layer: &engram_address::LayerAddress| {
            let init = match memory.row_init {
                0.0 => RowInit::Zeros,
                deviation => RowInit::Normal { deviation, seed: seed.wrapping_add(layer.layer() as u64) },
            };
            let origin = origin(&addressing, layer);
            TrainableTable::new(layer.rows(), memory.row_width, init, optimizer, origin, &storage)
        };
        let tables = addressing.layers().iter().map(table).collect::<std::result::Result<_, _>>()?;
        Ok(Self { addressing, places: RowPlaces::of(memory), tables, rate_factor: training.rate_factor })
    }

    /// The tables of a checkpoint folder, values and optimiser state.
    ///
    /// # Errors
    /// When a file is missing, damaged, of another addressing, or has the state of another optimiser.
    pub fn load(
        memory: &MemoryConfig,
        training: &RowTraining,
        addressing: Addressing,
        folder: &Path,
        scratch: &Path,
    ) -> Result<Self> {
        let storage = storage(training, scratch);
        let table = |layer: &engram_address::LayerAddress| {
            let path = folder.join(file_name(layer.layer()));
            let table = TrainableTable::load(&path, &origin(&addressing, layer), &storage)?;
            if table.optimizer() != row_optimizer(training) {
                return Err(Error::Mismatch(format!(
                    "{}: its rows have the state of another optimiser, or of other settings, than `[train.memory]` \
                     names; keep those that the run began with, or begin another run",
                    path.display()
                )));
            }
            Ok(table)
        };
        let tables = addressing.layers().iter().map(table).collect::<Result<_>>()?;
        Ok(Self { addressing, places: RowPlaces::of(memory), tables, rate_factor: training.rate_factor })
    }

    /// Takes the rows and their state from a checkpoint folder, which were saved by tables like these.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub(crate) fn reload(
        &mut self,
        memory: &MemoryConfig,
        training: &RowTraining,
        folder: &Path,
    ) -> Result<()> {
        let addressing = self.addressing.clone();
        *self = Self::load(memory, training, addressing, folder, folder)?;
        Ok(())
    }

    /// Writes every table into `folder`; gives the files' names.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn save(&self, folder: &Path) -> Result<Vec<String>> {
        let save = |(layer, table): (&engram_address::LayerAddress, &TrainableTable)| {
            let name = file_name(layer.layer());
            table.save(folder.join(&name))?;
            Ok(name)
        };
        self.addressing.layers().iter().zip(&self.tables).map(save).collect()
    }

    /// Writes the rows of every layer, without what only training needs, to the table file that `path` names for it.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn write_rows(&self, path: impl Fn(usize) -> PathBuf) -> Result<()> {
        for (layer, table) in self.addressing.layers().iter().zip(&self.tables) {
            let (origin, path) = (origin(&self.addressing, layer), path(layer.layer()));
            save_rows(table, origin, path, RowFormat::F32, &mut |_| ControlFlow::Continue(()))?;
        }
        Ok(())
    }

    /// The addressing of these tables.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// The rows that a batch needs; see [`fetch`].
    ///
    /// # Errors
    /// As [`fetch`].
    pub fn fetch(&self, tokens: &[u32], sequences: &Sequences) -> Result<Fetched> {
        fetch_from(self.places, &self.addressing, &self.tables, tokens, sequences)
    }

    /// Teaches the rows of `fetched` by their gradients, at `rate` times the rows' factor.
    ///
    /// # Errors
    /// When a gradient is not finite: ask before, for other tables may then have learned.
    pub(crate) fn update(&mut self, fetched: &Fetched, gradients: &RowGradients, rate: f32) -> Result<()> {
        let layers = self.tables.iter_mut().zip(&fetched.layers).zip(&gradients.layers);
        for ((table, layer), gradient) in layers {
            table.update(layer.distinct.ids(), gradient, rate * self.rate_factor)?;
        }
        Ok(())
    }

    /// Reads the rows of `fetched` anew that `updated` has changed since: what was fetched ahead of an update is
    /// then what a fetch after it would have given.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn refresh(&self, fetched: &mut Fetched, updated: &Fetched) -> Result<()> {
        for ((table, layer), updated) in self.tables.iter().zip(&mut fetched.layers).zip(&updated.layers) {
            let (positions, ids) = common(layer.distinct.ids(), updated.distinct.ids());
            let mut rows = vec![0.0; ids.len() * layer.width];
            table.gather(&ids, &mut rows)?;
            for (position, row) in positions.into_iter().zip(rows.chunks_exact(layer.width)) {
                layer.rows[position * layer.width..][..layer.width].copy_from_slice(row);
            }
        }
        Ok(())
    }
}

/// Memory that is read only, mapped from a checkpoint.
#[derive(Debug)]
pub struct FrozenTables {
    addressing: Addressing,
    places: RowPlaces,
    tables: Vec<Table>,
}

impl FrozenTables {
    /// Maps the tables of a checkpoint folder.
    ///
    /// # Errors
    /// When a file is missing, damaged, or of another addressing.
    pub fn open(addressing: Addressing, folder: &Path) -> Result<Self> {
        let table = |layer: &engram_address::LayerAddress| {
            Table::open(folder.join(file_name(layer.layer())), &origin(&addressing, layer))
        };
        let tables = addressing.layers().iter().map(table).collect::<std::result::Result<_, _>>()?;
        Ok(Self { addressing, places: RowPlaces::default(), tables })
    }

    /// The same tables, read from `places`.
    pub fn reading(self, places: RowPlaces) -> Self {
        Self { places, ..self }
    }

    /// Maps the table file `path` in place of the one of the layer that it belongs to; says which of the tables it
    /// replaces.
    ///
    /// # Errors
    /// When the file is not a table of this addressing, is damaged, or has rows of another width.
    pub fn replace(&mut self, path: &Path) -> Result<usize> {
        let header = TableHeader::read(path)?;
        let layer = header.origin.layer;
        let place = self.addressing.layers().iter().position(|own| own.layer() as u64 == layer);
        let Some(place) = place else {
            let problem = format!("it holds rows of layer {layer}, in which the model has no memory");
            return Err(Error::weights(path, problem));
        };
        let (width, needed) = (header.width, self.tables[place].width());
        if width != needed {
            let problem = format!("its rows have {width} values, but the model takes {needed}");
            return Err(Error::weights(path, problem));
        }
        self.tables[place] = Table::open(path, &origin(&self.addressing, &self.addressing.layers()[place]))?;
        Ok(place)
    }

    /// The addressing of these tables.
    pub fn addressing(&self) -> &Addressing {
        &self.addressing
    }

    /// The rows that a batch needs; see [`fetch`].
    ///
    /// # Errors
    /// As [`fetch`].
    pub fn fetch(&self, tokens: &[u32], sequences: &Sequences) -> Result<Fetched> {
        fetch_from(self.places, &self.addressing, &self.tables, tokens, sequences)
    }
}

fn storage(training: &RowTraining, folder: &Path) -> Storage {
    match training.storage {
        RowStorage::Ram => Storage::Ram,
        RowStorage::Mapped => Storage::MappedIn(folder.to_owned()),
    }
}

fn origin(addressing: &Addressing, layer: &engram_address::LayerAddress) -> TableOrigin {
    TableOrigin { identity: addressing.identity(), layer: layer.layer() as u64 }
}

pub(crate) fn file_name(layer: usize) -> String {
    format!("memory.layer{layer}.table")
}

/// Values that both ascending lists hold, and where they stand in the first.
fn common(first: &[u64], second: &[u64]) -> (Vec<usize>, Vec<u64>) {
    let mut second = second.iter().peekable();
    let shared = first.iter().enumerate().filter(|(_, id)| {
        while second.next_if(|other| other < id).is_some() {}
        second.next_if_eq(id).is_some()
    });
    shared.map(|(position, &id)| (position, id)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use engram_address::{AddressConfig, Arithmetic, Boundary};
    use proptest::prelude::*;

    /// What a table would refuse is no step to take: its square is not finite.
    #[test]
    fn gradients_beyond_what_a_table_takes_are_not_learnt() {
        assert!(can_be_learnt(&[1e18, -1e18], 2) && can_be_learnt(&[], 2));
        for value in [2e19, -2e19, f32::INFINITY, f32::NAN] {
            assert!(!can_be_learnt(&[0.0, value], 2), "{value}");
            assert!(
                !RowGradients { layers: vec![vec![], vec![0.0, value]], widths: vec![2, 2] }.can_be_learnt()
            );
        }
    }

    /// Rows of documents that are sequences of their own are those of each document alone.
    #[test]
    fn n_grams_end_where_a_sequence_does() {
        let config = AddressConfig {
            seed: 3,
            layers: vec![0, 2],
            max_order: 3,
            heads: 2,
            base_rows: vec![50, 60],
            pad_id: 1,
            boundary: Boundary::None,
            arithmetic: Arithmetic::Exact,
        };
        let addressing = Addressing::new(&config, Vocabulary::identity(20)).unwrap();
        let table = |layer: &engram_address::LayerAddress| {
            let fill = |id: u64, row: &mut [f32]| row.copy_from_slice(&[id as f32]);
            let format = engram_store::RowFormat::F32;
            Table::from_fn(layer.rows(), 1, format, origin(&addressing, layer), &Storage::Ram, fill).unwrap()
        };
        let tables: Vec<Table> = addressing.layers().iter().map(table).collect();
        // The row of every slot, of every layer.
        let rows = |tokens: &[u32], sequences: &Sequences| -> Vec<Vec<f32>> {
            let fetched = fetch(&addressing, &tables, tokens, sequences).unwrap();
            let of_layer = |layer: &FetchedLayer| {
                layer.distinct.index().iter().map(|&row| layer.rows[row as usize]).collect()
            };
            fetched.layers.iter().map(of_layer).collect()
        };
        let tokens = [5, 6, 7, 5, 6, 8, 9];
        let apart = rows(&tokens, &Sequences::of_lengths([3, 4]));
        let alone = |tokens: &[u32]| rows(tokens, &Sequences::equal(1, tokens.len()));
        for ((apart, first), second) in apart.iter().zip(alone(&tokens[..3])).zip(alone(&tokens[3..])) {
            assert_eq!(*apart, [first, second].concat());
        }
        assert_ne!(apart, alone(&tokens));
    }

    /// Rows follow PyTorch's optimisers for twenty steps; see `tests/golden/trajectories.py`.
    #[test]
    fn rows_follow_pytorch() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/trajectories.json")).unwrap();
        let of =
            |optimizer, bias_correction| RowTraining { optimizer, bias_correction, ..RowTraining::default() };
        let adam = of(RowOptimizerKind::Adam, None);
        let by_row = of(RowOptimizerKind::Adam, Some(BiasCorrection::Row));
        let row_wise = of(RowOptimizerKind::RowWiseAdam, None);
        let golden = &golden["rows"];
        assert_eq!(deviation(&golden["adam"], &adam), None);
        assert_eq!(deviation(&golden["adam_by_row"], &by_row), None);
        assert_eq!(deviation(&golden["row_wise_adam"], &row_wise), None);
        // And they tell every setting from another.
        assert!(deviation(&golden["adam"], &by_row).is_some());
        for training in [adam, by_row] {
            let name = if training.bias_correction.is_some() { "adam_by_row" } else { "adam" };
            let with = |change: fn(&mut RowTraining)| {
                let mut other = training.clone();
                change(&mut other);
                deviation(&golden[name], &other)
            };
            assert!(with(|other| other.beta1 = Some(0.89)).is_some(), "{name}");
            assert!(with(|other| other.beta2 = Some(0.99)).is_some(), "{name}");
            assert!(with(|other| other.epsilon = Some(1e-3)).is_some(), "{name}");
        }
        let other = RowTraining { beta2: Some(0.99), ..row_wise };
        assert!(deviation(&golden["row_wise_adam"], &other).is_some());
    }

    /// The first value of the rows that is not the golden one.
    fn deviation(golden: &serde_json::Value, training: &RowTraining) -> Option<String> {
        let config: MemoryConfig =
            toml::from_str("layers = [0]\nmax_order = 2\nheads = 1\nrow_width = 3\nrows_per_head = [9]")
                .unwrap();
        let addressing = Addressing::new(&config.addressing(), Vocabulary::identity(20)).unwrap();
        let mut tables = MemoryTables::new(&config, training, addressing, 0, Path::new(".")).unwrap();
        let numbers = |value: &serde_json::Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
        };
        for (step, expected) in (1..).zip(golden.as_array().unwrap()) {
            let ids: Vec<u64> = numbers(&expected["ids"]).into_iter().map(|id| id as u64).collect();
            let scale = 2.0_f32.powi((step as i32 * 3) % 7 - 7);
            let gradient = ids.iter().flat_map(|&id| (1..4).map(move |place| unit(id, step, place) * scale));
            let gradients = RowGradients { layers: vec![gradient.collect()], widths: vec![3] };
            let distinct = DistinctRows::of(&ids);
            let rows = vec![0.0; 3 * ids.len()];
            let fetched = Fetched { layers: vec![FetchedLayer { width: 3, distinct, rows }] };
            tables.update(&fetched, &gradients, 0.05 / training.rate_factor).unwrap();
            let mut found = vec![0.0; 27];
            tables.tables[0].gather(&(0..9).collect::<Vec<_>>(), &mut found).unwrap();
            for (place, (found, expected)) in found.iter().zip(numbers(&expected["rows"])).enumerate() {
                // NaN is not near.
                let near = (f64::from(*found) - expected).abs() < 5e-6;
                if !near {
                    return Some(format!("step {step}, value {place}: {found}, but PyTorch has {expected}"));
                }
            }
        }
        None
    }

    /// A number in [−1, 1) for a place of a row at a step, as the script has it.
    fn unit(row: u64, step: u64, place: u64) -> f32 {
        let mut x = (row * 1_000_003 + step * 7919 + place * 104_729 + 12_345) as u32;
        for (shift, factor) in [(16, 0x7feb_352d_u32), (15, 0x846c_a68b)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        ((x ^ (x >> 16)) >> 16) as f32 / 32768.0 - 1.0
    }

    proptest! {
        /// Whatever the micro-batches: their slots read the rows of the step, each row once, and gradients of the slots
        /// come back as those of the whole.
        #[test]
        fn micro_batches_read_and_teach_the_rows_of_the_step(
            ids in prop::collection::vec(0u64..9, 12..=12), micro_batch in 1_usize..=6,
        ) {
            // Six windows of two slots; whole numbers, so that sums are exact in any order.
            let distinct = DistinctRows::of(&ids);
            let rows: Vec<f32> = distinct.ids().iter().flat_map(|&id| [id as f32, 10.0 * id as f32]).collect();
            let fetched = Fetched { layers: vec![FetchedLayer { width: 2, distinct, rows }] };
            let mut sums = RowGradients::zeros(&fetched);
            let (mut read, mut slot) = (Vec::new(), 0);
            for part in fetched.micro_batches(6, micro_batch) {
                let (values, [count, _]) = part.layers[0].rows(&fetched.layers[0]);
                let mut gradients = vec![0.0; 2 * count];
                for &row in part.layers[0].index.iter() {
                    read.push(values[2 * row as usize] as u64);
                    prop_assert_eq!(values[2 * row as usize + 1], 10.0 * values[2 * row as usize]);
                    gradients[2 * row as usize] += (1 << slot) as f32;
                    slot += 1;
                }
                let met: std::collections::BTreeSet<u32> = part.layers[0].index.iter().copied().collect();
                prop_assert_eq!(met.len(), count);
                sums.add(&part, vec![Some(gradients)]);
            }
            prop_assert_eq!(&read, &ids);
            for (row, id) in fetched.layers[0].distinct.ids().iter().enumerate() {
                let slots = ids.iter().enumerate().filter(|(_, other)| *other == id);
                let expected: u32 = slots.map(|(slot, _)| 1 << slot).sum();
                prop_assert_eq!(sums.layers[0][2 * row], expected as f32);
            }
        }

        #[test]
        fn common_is_the_intersection(
            first in prop::collection::btree_set(0u64..60, 0..40),
            second in prop::collection::btree_set(0u64..60, 0..40),
        ) {
            let list: Vec<u64> = first.iter().copied().collect();
            let (positions, ids) = common(&list, &second.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(&ids, &first.intersection(&second).copied().collect::<Vec<_>>());
            prop_assert_eq!(positions.iter().map(|&at| list[at]).collect::<Vec<_>>(), ids);
        }
    }
}
