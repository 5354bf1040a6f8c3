//! What training a configuration takes in memory, by part.

use crate::accounting::Account;
use crate::attention::AttentionConfig;
use crate::model::{MemoryConfig, ModelConfig};
use crate::rows::{BiasCorrection, RowOptimizerKind, RowStorage, RowTraining};
use crate::run::TrainConfig;

/// Bytes that training takes. All but the activations are exact for the parts that they name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingMemory {
    /// Weights, in f32.
    pub weights: u64,
    /// Their gradients; twice where a step has several micro-batches, which are summed.
    pub gradients: u64,
    /// Muon's momentum and Adam's two moments.
    pub optimizer: u64,
    /// Memory rows and the state of their optimiser.
    pub rows: u64,
    /// Whether these rows lie in memory, and not in a mapped file.
    pub rows_in_memory: bool,
    /// At most: the rows that a step reads, those of the next one, and gradients.
    pub step_rows: u64,
    /// An estimate: what the forward pass of a micro-batch keeps for the backward pass.
    pub activations: u64,
}

/// Of an f32.
const BYTES: u64 = 4;

impl TrainingMemory {
    /// What training `model` as `train` says takes; `account` is that of the model.
    pub fn of(model: &ModelConfig, train: &TrainConfig, account: &Account) -> Self {
        let weights = account.total - account.memory;
        let micro_batches = train.batch.div_ceil(train.windows_at_once()) as u64;
        let step_tokens = (train.batch * model.context) as u64;
        let row_values = model.memory.as_ref().map_or(0, |memory| {
            let of_token = (memory.layers.len() * memory.slots() * memory.row_width) as u64;
            step_tokens * of_token
        });
        Self {
            weights: BYTES * weights,
            gradients: BYTES * weights * micro_batches.min(2),
            optimizer: BYTES * (account.muon + 2 * (weights - account.muon)),
            rows: BYTES
                * model.memory.as_ref().map_or(0, |memory| table_values(memory, &train.memory, account)),
            rows_in_memory: train.memory.storage == RowStorage::Ram,
            step_rows: BYTES * 3 * row_values,
            activations: BYTES
                * (train.windows_at_once() * model.context) as u64
                * kept(model, train.recompute),
        }
    }

    /// Bytes of memory, without rows that lie in a file.
    pub fn total(&self) -> u64 {
        let rows = if self.rows_in_memory { self.rows } else { 0 };
        self.weights + self.gradients + self.optimizer + rows + self.step_rows + self.activations
    }
}

/// Values of all tables with their state.
fn table_values(memory: &MemoryConfig, training: &RowTraining, account: &Account) -> u64 {
    let width = memory.row_width as u64;
    let state = match (training.optimizer, training.bias_correction) {
        (RowOptimizerKind::Adam, Some(BiasCorrection::Row)) => 2 * width + 1,
        (RowOptimizerKind::Adam, Some(BiasCorrection::Table) | None) => 2 * width,
        (RowOptimizerKind::RowWiseAdam, _) => 1,
        (RowOptimizerKind::BalancedMomentum, _) => width,
        (RowOptimizerKind::Frozen, _) => 0,
    };
    account.memory / width * (width + state)
}

/// Values kept per token by the fused operations: inputs of every operation that its backward pass reads again.
fn kept(model: &ModelConfig, recompute: bool) -> u64 {
    let (streams, width) = (model.streams() as u64, model.width as u64);
    let of_blocks = (0..model.blocks).map(|block| kept_by_block(model, block));
    let blocks = match recompute {
        // What enters each block, and one block.
        true => streams * width * model.blocks as u64 + of_blocks.max().unwrap_or(0),
        false => of_blocks.sum(),
    };
    // The embedding, the last norm, and the gradient of what enters the head.
    blocks + 3 * width
}

fn kept_by_block(model: &ModelConfig, block: usize) -> u64 {
    let (streams, width) = (model.streams() as u64, model.width as u64);
    let heads = model.attention.heads() as u64;
    let (key, value) = model.attention.head_widths();
    let (key, value) = (key as u64, value as u64);
    let attention = match &model.attention {
        AttentionConfig::Latent(latent) => {
            let rank = latent.latent_rank as u64;
            let query = latent.query_rank.map_or(0, |rank| 2 * rank as u64);
            // Latents before and after their norms, queries, keys with values, outputs.
            query + 2 * rank + heads * (2 * key + 2 * value + 1)
        }
        AttentionConfig::Plain(_) => heads * (2 * key + 2 * value + 1),
    };
    let hidden = |width: usize| 3 * width as u64;
    let feed_forward = match model.experts_of(block) {
        Some(experts) => {
            let routed = experts.routed as u64 + experts.active as u64 * (hidden(experts.width) + width);
            routed + hidden(experts.shared_width)
        }
        None => hidden(model.feed_forward.width),
    };
    // Around attention and feed-forward: the streams after each, what it reads, that after its norm, what it gives.
    let around = 2 * (streams * width + 3 * width);
    let memory = model.memory.as_ref().filter(|memory| memory.layers.contains(&block));
    let memory = memory.map_or(0, |memory| {
        let keys = memory.gates(model.streams()) as u64 * width;
        memory.width() as u64 + keys + width + 3 * streams * width
    });
    around + attention + feed_forward + memory
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_from_the_configuration() {
        let model: ModelConfig = toml::from_str(
            "vocabulary = 10\nwidth = 4\nblocks = 1\ncontext = 8\ntied_head = true\nfeed_forward = { width = 6 }\n\
             attention = { kind = \"plain\", heads = 2, head_width = 2 }\n\
             memory = { layers = [0], max_order = 2, heads = 2, row_width = 3, rows_per_head = [5] }",
        )
        .unwrap();
        let train = |lines: &str| -> TrainConfig {
            toml::from_str(&format!("steps = 1\nbatch = 4\nschedule = {{ decay = \"constant\" }}\n{lines}"))
                .unwrap()
        };
        let account = Account::of(&model, &[12]);
        let of = |lines: &str| TrainingMemory::of(&model, &train(lines), &account);
        let whole = of("memory = { optimizer = \"row_wise_adam\" }");
        assert_eq!(whole.weights, 4 * (account.total - 36));
        assert_eq!(whole.gradients, whole.weights);
        // Projections of attention, feed-forward and memory; all else is Adam's.
        let muon = 4 * 16 + 3 * 4 * 6 + 2 * 6 * 4;
        assert_eq!(account.muon, muon);
        assert_eq!(whole.optimizer, 4 * (muon + 2 * (account.total - 36 - muon)));
        assert_eq!(whole.rows, 4 * 12 * (3 + 1));
        assert_eq!(whole.step_rows, 4 * 3 * 4 * 8 * 2 * 3);
        let parts = of("micro_batch = 1\nmemory = { optimizer = \"adam\", storage = \"mapped\" }");
        assert_eq!((parts.gradients, parts.rows), (2 * whole.weights, 4 * 12 * 9));
        assert_eq!(4 * parts.activations, whole.activations);
        assert_eq!(
            parts.total(),
            parts.weights + parts.gradients + parts.optimizer + parts.step_rows + parts.activations
        );
        assert_eq!(of("memory = { optimizer = \"adam\", bias_correction = \"row\" }").rows, 4 * 12 * 10);
        assert!(of("recompute = true").activations > 0);
    }
}
