//! The memory that a run needs before its first step: by part, in bytes.

use engram_address::AddressError;
use serde::Serialize;

use crate::accounting::Account;
use crate::rows::RowStorage;
use crate::run::RunConfig;

/// A lower bound of the memory for training, in bytes. Of a step's activations, only the states between blocks are
/// counted: the rest depends on the device and on which operations are fused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TrainingMemory {
    /// Weights in f32, without the tables.
    pub weights: u64,
    /// Their gradients, in f32.
    pub gradients: u64,
    /// Moments of the weights: one for Muon, two for Adam.
    pub optimizer: u64,
    /// Memory rows in f32 and their optimiser's state; 0 if they live in a mapped file.
    pub tables: u64,
    /// States between blocks that a step keeps for its gradients: `[tokens, streams, width]` for each block.
    pub states: u64,
}

impl TrainingMemory {
    /// Names of the [parts](Self::parts).
    pub const PARTS: [&'static str; 5] =
        ["weights", "gradients", "optimiser", "memory tables", "states between blocks"];

    /// Counts for a valid configuration.
    ///
    /// # Errors
    /// When the primes run out for the tables' rows.
    pub fn of(config: &RunConfig) -> Result<Self, AddressError> {
        let (model, train) = (&config.model, &config.train);
        let account = Account::of(model, &model.table_rows()?);
        let dense = account.total - account.memory;
        let width = model.memory.as_ref().map_or(1, |memory| memory.row_width as u64);
        let state_values = train.memory.state_values(width);
        let tables = match train.memory.storage {
            RowStorage::Ram => 4 * account.memory / width * (width + state_values),
            RowStorage::Mapped => 0,
        };
        let tokens = (train.windows_at_once() * model.context) as u64;
        let state = (model.streams() * model.width) as u64;
        Ok(Self {
            weights: 4 * dense,
            gradients: 4 * dense,
            optimizer: 4 * (account.muon + 2 * (dense - account.muon)),
            tables,
            states: 4 * tokens * state * model.blocks as u64,
        })
    }

    /// The total.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Each part with its name.
    pub fn parts(&self) -> [(&'static str, u64); 5] {
        let Self { weights, gradients, optimizer, tables, states } = *self;
        let bytes = [weights, gradients, optimizer, tables, states];
        std::array::from_fn(|part| (Self::PARTS[part], bytes[part]))
    }
}
