//! The cost of a configuration: parameters by kind and floating-point operations per token.
//!
//! A multiplication and an addition are two operations. A forward pass costs twice the weights of the matrices that a
//! token uses, plus the products of attention over the tokens before it. Training costs three times that.

use crate::attention::{AttentionConfig, LatentConfig, PlainConfig};
use crate::model::{GateForm, MemoryConfig, MemoryForm, ModelConfig};

/// Parameters and operations of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Every parameter, memory included.
    pub total: u64,
    /// Parameters of the blocks and head that one token uses. Looking up the embedding and memory tables is not
    /// computation and does not count; a tied head does.
    pub active: u64,
    /// Parameters of routed experts.
    pub experts: u64,
    /// Parameters of memory tables.
    pub memory: u64,
    /// Parameters of the embedding and an untied head.
    pub vocabulary: u64,
    /// Parameters that Muon trains: projections of attention, feed-forward, experts and memory.
    pub muon: u64,
    /// Memory rows read per token, over all layers.
    pub rows_per_token: u64,
    /// Floating-point operations of a forward pass per token, averaged over a full context.
    pub forward_flops: u64,
}

impl Account {
    /// Parameters that a token does not activate: inactive experts, tables, the embedding.
    pub fn sparse(&self) -> u64 {
        self.total - self.active
    }

    /// Operations of a training step per token: forward, and twice that for the backward pass.
    pub fn training_flops(&self) -> u64 {
        3 * self.forward_flops
    }

    /// Accounts for a valid configuration. `table_rows` are the rows of each memory layer's table according to its
    /// addressing (`LayerAddress::rows`).
    pub fn of(config: &ModelConfig, table_rows: &[u64]) -> Self {
        let mut account = Self {
            total: 0,
            active: 0,
            experts: 0,
            memory: 0,
            vocabulary: 0,
            muon: 0,
            rows_per_token: 0,
            forward_flops: 0,
        };
        let (width, vocabulary) = (config.width as u64, config.vocabulary as u64);
        let embedding = vocabulary * width;
        account.vocabulary = if config.tied_head { embedding } else { 2 * embedding };
        account.total += account.vocabulary;
        account.active += embedding;
        account.forward_flops += 2 * embedding;
        account.add(width, 0);
        for block in 0..config.blocks {
            account.add_attention(config, block);
            account.add_feed_forward(config, block);
            account.add_streams(config);
        }
        if let Some(memory) = &config.memory {
            for rows in table_rows {
                account.add_memory(config, memory, *rows);
            }
        }
        account
    }

    /// Adds `vectors` parameters that act element by element, and `matrices` that multiply every token and that Muon
    /// trains.
    fn add(&mut self, vectors: u64, matrices: u64) {
        self.add_for_adam(vectors, matrices);
        self.muon += matrices;
    }

    /// Like [`add`](Self::add), for matrices that Adam trains.
    fn add_for_adam(&mut self, vectors: u64, matrices: u64) {
        self.total += vectors + matrices;
        self.active += vectors + matrices;
        self.forward_flops += 2 * matrices;
    }

    fn add_attention(&mut self, config: &ModelConfig, block: usize) {
        let width = config.width as u64;
        let (matrices, vectors) = match &config.attention {
            AttentionConfig::Latent(latent) => latent_parameters(latent, width),
            AttentionConfig::Plain(plain) => plain_parameters(plain, width),
        };
        self.add(vectors + norms(config), matrices);
        // Scores over the key width, sums over the value width, for every position that a token sees.
        let (key, value) = config.attention.head_widths();
        let heads = config.attention.heads() as u64;
        let (context, window) = (config.context as u64, config.attention.window_of(block));
        let window = window.map_or(context, |window| context.min(window as u64));
        // Each of the first `window` tokens sees one more than the one before; the others see `window` each.
        let seen = window * (window + 1) / 2 + (context - window) * window;
        self.forward_flops += 2 * heads * (key + value) as u64 * seen / context;
    }

    fn add_feed_forward(&mut self, config: &ModelConfig, block: usize) {
        let width = config.width as u64;
        let gated = |hidden: usize| 3 * width * hidden as u64;
        let Some(experts) = config.experts_of(block) else {
            return self.add(norms(config), gated(config.feed_forward.width));
        };
        let routed = experts.routed as u64;
        self.add(norms(config), gated(experts.shared_width));
        self.add_for_adam(0, width * routed);
        let one = gated(experts.width);
        let resting = (experts.routed - experts.active) as u64;
        self.add(0, one * experts.active as u64);
        // The balancing bias is state, not a parameter: it has no gradient.
        self.total += one * resting;
        self.muon += one * resting;
        self.experts += one * routed;
    }

    fn add_streams(&mut self, config: &ModelConfig) {
        let Some(hyper) = &config.hyper_connections else { return };
        let (n, width) = (hyper.streams as u64, config.width as u64);
        let coefficients = 2 * n + n * n;
        // Twice per block: projection, bias and three scales, then reading (n), mixing (n²) and writing (n).
        for _ in 0..2 {
            self.add_for_adam(coefficients + 3, n * width * coefficients);
            self.forward_flops += 2 * width * coefficients;
        }
    }

    fn add_memory(&mut self, config: &ModelConfig, memory: &MemoryConfig, rows: u64) {
        let (streams, width) = (config.streams() as u64, config.width as u64);
        let channels = streams * width;
        let keys = memory.gates(config.streams()) as u64 * width;
        let inputs = memory.width() as u64;
        let values = config.attention.key_heads() as u64 * config.attention.head_widths().1 as u64;
        let norms = if memory.gate_form == GateForm::SignedRoot { keys } else { 0 };
        match memory.form {
            // Biases and two gate norms.
            MemoryForm::Paper => self.add(keys + width + 2 * norms, inputs * (keys + width)),
            MemoryForm::V41 => self.add(norms, inputs * (keys + width)),
            MemoryForm::Added => {}
            MemoryForm::OverEncoding => self.add(0, inputs * width),
            MemoryForm::AttentionValues => self.add(0, inputs * values),
        }
        if memory.has_convolution() {
            let kernel = memory.kernel as u64;
            // Its norm and its taps.
            self.add(channels + kernel * channels, 0);
            self.forward_flops += 2 * kernel * channels;
        }
        if keys > 0 {
            // The gate's product, and its application.
            self.forward_flops += 2 * keys + 2 * channels;
        }
        let table = rows * memory.row_width as u64;
        self.total += table;
        self.memory += table;
        self.rows_per_token += memory.slots() as u64;
    }
}

/// Parameters of the norms around attention or a feed-forward.
fn norms(config: &ModelConfig) -> u64 {
    config.width as u64 * if config.post_norms { 2 } else { 1 }
}

/// Parameters of matrices and of vectors.
fn latent_parameters(latent: &LatentConfig, width: u64) -> (u64, u64) {
    let [heads, rank, content, rotary, value] =
        [latent.heads, latent.latent_rank, latent.content_width, latent.rotary_width, latent.value_width]
            .map(|size| size as u64);
    let queries = heads * (content + rotary);
    let query_rank = latent.query_rank.map(|rank| rank as u64);
    let query = query_rank.map_or(width * queries, |rank| width * rank + rank * queries);
    let keys_values = width * (rank + rotary) + rank * heads * (content + value);
    (query + keys_values + heads * value * width, query_rank.unwrap_or(0) + rank)
}

/// Parameters of matrices and of vectors.
fn plain_parameters(plain: &PlainConfig, width: u64) -> (u64, u64) {
    let [heads, key_heads, head_width] =
        [plain.heads, plain.key_heads.unwrap_or(plain.heads), plain.head_width].map(|size| size as u64);
    let vectors = [
        (plain.bias, (heads + 2 * key_heads) * head_width),
        (plain.output_bias, width),
        (plain.query_key_norm, 2 * head_width),
    ];
    let vectors = vectors.iter().filter(|(there, _)| *there).map(|(_, count)| count).sum();
    // Queries and output, keys and values.
    (2 * width * (heads + key_heads) * head_width, vectors)
}
