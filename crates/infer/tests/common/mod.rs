//! Small models with everything that a model can have, weights at random, and their rows.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part; a panic is a failure")]

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use engram_address::{Addressing, Vocabulary};
use engram_config::{ModelConfig, Precision};
use engram_data::{PermutedPlaces, TokenBytes};
use engram_import::HostTensor;
use engram_infer::{Decoder, Dtype, Model, RowTiers};
use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
use engram_store::{PrefetchOptions, RowFormat, RowSource, Storage, Table, TableOrigin};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const VOCABULARY: usize = 64;

/// Latent attention, experts, streams and two memories.
pub(crate) const EVERYTHING: &str = r#"
    vocabulary = 64
    width = 24
    blocks = 3
    context = 96
    attention = { kind = "latent", heads = 3, query_rank = 12, latent_rank = 20, content_width = 8, rotary_width = 4, value_width = 10 }
    feed_forward = { width = 40 }
    experts = { first_block = 1, routed = 4, active = 2, width = 12, shared_width = 8 }
    hyper_connections = { streams = 3 }
    memory = { layers = [0, 2], max_order = 3, heads = 2, row_width = 6, rows_per_head = [300, 300] }
"#;

/// Plain attention with two heads to a key, one stream, a memory in V4.1's form, a tied head.
pub(crate) const PLAIN: &str = r#"
    vocabulary = 64
    width = 24
    blocks = 2
    context = 96
    tied_head = true
    attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 6 }
    feed_forward = { width = 40 }
    memory = { form = "v41", layers = [1], max_order = 4, heads = 2, row_width = 6, rows_per_head = [200, 200, 200] }
"#;

/// Latent attention without a latent of its queries, and no memory.
pub(crate) const WITHOUT_MEMORY: &str = r#"
    vocabulary = 64
    width = 24
    blocks = 2
    context = 96
    attention = { kind = "latent", heads = 2, latent_rank = 20, content_width = 8, rotary_width = 4, value_width = 10 }
    feed_forward = { width = 40 }
    hyper_connections = { streams = 2 }
"#;

/// Backbones with one stream and several, and every memory that departs from the published forms.
const BACKBONES: [&str; 2] = [
    r#"
    vocabulary = 64
    width = 24
    blocks = 3
    context = 96
    attention = { kind = "latent", heads = 3, query_rank = 12, latent_rank = 20, content_width = 8, rotary_width = 4, value_width = 10 }
    feed_forward = { width = 40 }
    hyper_connections = { streams = 3 }
    "#,
    r#"
    vocabulary = 64
    width = 24
    blocks = 3
    context = 96
    tied_head = true
    attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 6 }
    feed_forward = { width = 40 }
    "#,
];
const MEMORIES: [&str; 9] = [
    "gate = 'shared', layers = [0, 2], row_width = 6",
    "gate = 'none', layers = [0, 2], row_width = 6",
    "convolution = false, layers = [0, 2], row_width = 6",
    "form = 'v41', gate = 'shared', layers = [1], row_width = 6",
    "form = 'v41', gate = 'none', layers = [1], row_width = 6",
    "form = 'added', layers = [0, 2], row_width = 24",
    "form = 'over_encoding', layers = [0], row_width = 6",
    "form = 'attention_values', layers = [0, 2], row_width = 6",
    "lookup = 'permuted', layers = [0, 2], row_width = 6",
];

/// Models whose memory departs from the published forms.
pub(crate) fn departing() -> Vec<String> {
    let models = BACKBONES.iter().flat_map(|backbone| MEMORIES.map(|memory| (*backbone, memory)));
    // With one stream there is nothing to share a gate.
    let can_be =
        models.filter(|(backbone, memory)| backbone.contains("streams") || !memory.contains("shared"));
    let text = |(backbone, memory): (&str, &str)| {
        format!("{backbone}\nmemory = {{ max_order = 3, heads = 2, rows_per_head = [300, 300], {memory} }}")
    };
    can_be.map(text).collect()
}

/// A model in both forms, and its tables.
pub(crate) struct Fixture {
    pub(crate) config: ModelConfig,
    pub(crate) model: LanguageModel,
    pub(crate) addressing: Option<Addressing>,
    pub(crate) tables: Vec<Arc<Table>>,
}

impl Fixture {
    pub(crate) fn new(config: &str) -> Self {
        let config: ModelConfig = toml::from_str(config).unwrap();
        let model = LanguageModel::new(&config, &Device::flex(), 7, Precision::F32).unwrap();
        let model = model.map(&mut Noise(ChaCha8Rng::seed_from_u64(3)));
        let addressing = config.memory.as_ref().map(|memory| {
            Addressing::new(&memory.addressing(), Vocabulary::identity(config.vocabulary)).unwrap()
        });
        let tables = addressing.iter().flat_map(Addressing::layers).map(|layer| {
            let origin = TableOrigin {
                identity: addressing.as_ref().unwrap().identity(),
                layer: layer.layer() as u64,
            };
            let fill = |id: u64, row: &mut [f32]| {
                let mut random = ChaCha8Rng::seed_from_u64(id ^ ((layer.layer() as u64) << 32));
                row.iter_mut().for_each(|value| *value = random.random_range(-1.0..1.0));
            };
            let width = config.memory.as_ref().unwrap().row_width;
            Arc::new(
                Table::from_fn(layer.rows(), width, RowFormat::F32, origin, &Storage::Ram, fill).unwrap(),
            )
        });
        let tables = tables.collect();
        Self { addressing, tables, model, config }
    }

    pub(crate) fn decoder(&self) -> Decoder {
        self.decoder_of(Dtype::F32)
    }

    pub(crate) fn decoder_of(&self, dtype: Dtype) -> Decoder {
        Decoder::new(&self.config, &weights(&self.model), dtype).unwrap()
    }

    pub(crate) fn tiers(&self) -> Option<RowTiers> {
        let sources = self.tables.iter().map(|table| Arc::clone(table) as Arc<dyn RowSource>).collect();
        self.tiers_of(sources)
    }

    pub(crate) fn tiers_of(&self, sources: Vec<Arc<dyn RowSource>>) -> Option<RowTiers> {
        let addressing = self.addressing.clone()?;
        let tiers = RowTiers::new(addressing, sources, &PrefetchOptions::default()).unwrap();
        Some(tiers.permuted(self.permuted()))
    }

    pub(crate) fn served(&self) -> Model {
        Model::new(self.decoder(), self.tiers(), token_bytes())
    }

    /// Logits after every token, `[tokens][vocabulary]`, by the plain forward pass over each whole beginning.
    pub(crate) fn plain_logits(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        (1..=tokens.len()).map(|end| self.plain_next(&tokens[..end])).collect()
    }

    /// Logits after the last token, by the plain forward pass over the whole sequence.
    pub(crate) fn plain_next(&self, tokens: &[u32]) -> Vec<f32> {
        let memory = self.memory_rows(tokens);
        self.model.next_logits(
            Tokens { ids: tokens, sequences: &Sequences::equal(1, tokens.len()), memory: &memory },
            &mut Trace::default(),
        )
    }

    /// Logits after every token, `[tokens][vocabulary]`, by one plain forward pass.
    pub(crate) fn plain_all(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let memory = self.memory_rows(tokens);
        let hidden = self.model.hidden(
            Tokens { ids: tokens, sequences: &Sequences::equal(1, tokens.len()), memory: &memory },
            &mut Trace::default(),
        );
        let head = match &self.model.head {
            Some(head) => head.val(),
            None => self.model.embedding.val().transpose(),
        };
        let logits: Vec<f32> = hidden.matmul(head).into_data().try_into_vec().unwrap();
        logits.chunks_exact(self.config.vocabulary).map(<[f32]>::to_vec).collect()
    }

    pub(crate) fn plain_gates(&self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let memory = self.memory_rows(tokens);
        let mut trace = Trace::with_gates();
        self.model.hidden(
            Tokens { ids: tokens, sequences: &Sequences::equal(1, tokens.len()), memory: &memory },
            &mut trace,
        );
        trace.gates.unwrap().into_iter().map(|(_, gates)| gates).collect()
    }

    fn permuted(&self) -> Option<PermutedPlaces> {
        self.config.memory.as_ref().and_then(PermutedPlaces::of)
    }

    fn memory_rows(&self, tokens: &[u32]) -> Vec<MemoryRows> {
        let rows = |(index, table): (usize, &Arc<Table>)| {
            let mut ids = Vec::new();
            let addressing = self.addressing.as_ref().unwrap();
            addressing.row_ids(index, tokens, &mut ids).unwrap();
            if let Some(permuted) = self.permuted() {
                let (own, slots) = (ids.clone(), addressing.layers()[index].slots());
                let mut padding = Vec::new();
                addressing.row_ids(index, &[permuted.padding()], &mut padding).unwrap();
                for (position, ids) in ids.chunks_mut(slots).enumerate() {
                    let source = permuted.source(position);
                    ids.copy_from_slice(source.map_or(&padding, |source| &own[source * slots..][..slots]));
                }
            }
            let mut rows = vec![0.0; ids.len() * table.width()];
            table.gather(&ids, &mut rows).unwrap();
            let rows = Tensor::from_data(TensorData::new(rows, [ids.len(), table.width()]), &Device::flex());
            MemoryRows { rows, index: (0..ids.len() as u32).collect(), dead: None }
        };
        self.tables.iter().enumerate().map(rows).collect()
    }
}

/// Every token is a letter or a sign.
pub(crate) fn token_bytes() -> TokenBytes {
    (0..VOCABULARY as u8).map(|token| [b' ' + token]).collect()
}

pub(crate) fn random_tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(0..VOCABULARY as u32)).collect()
}

#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "at {place}: found {found}, expected {expected}");
    }
}

/// Moves every weight: what starts at zero or one would hide mistakes.
struct Noise(ChaCha8Rng);

impl ModuleMapper for Noise {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| {
            let (shape, device) = (tensor.dims(), tensor.device());
            let mut values: Vec<f32> = tensor.into_data().try_into_vec().unwrap();
            values.iter_mut().for_each(|value| *value += self.0.random_range(-0.3..0.3));
            Tensor::from_data(TensorData::new(values, shape), &device)
        })
    }
}

/// The weights of a model by name, as a checkpoint has them.
pub(crate) fn weights(model: &LanguageModel) -> BTreeMap<String, HostTensor> {
    let mut named = Named::default();
    model.visit(&mut named);
    named.weights
}

#[derive(Default)]
struct Named {
    path: Vec<String>,
    weights: BTreeMap<String, HostTensor>,
}

impl ModuleVisitor for Named {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        let values = tensor.into_data().try_into_vec().unwrap();
        self.weights.insert(self.path.join("."), HostTensor { shape, values });
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        // Which variant of an enum holds a weight does not show.
        if !container.starts_with("Enum:") {
            self.path.push(name.to_owned());
        }
    }

    fn exit_module(&mut self, _name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.path.pop();
        }
    }
}
