//! Writes a model's weights, a batch, and the loss and every gradient that they give, for another implementation to
//! repeat.
//!
//! ```text
//! cargo run --release --example exchange -- CONFIG.toml FOLDER
//! python benches/pytorch/model.py --config CONFIG.toml --weights FOLDER/weights.safetensors \
//!     --batch FOLDER/batch.safetensors --compare FOLDER/gradients.safetensors
//! ```
//!
//! The model is that of the configuration's `[model]` table. Its weights are as at the beginning of training, with
//! noise added so that none of them, such as a convolution that starts at zero, hides what lies behind it; tokens
//! and rows are random. `benches/pytorch/README.md` describes the three files.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use burn::tensor::{Device, Tensor, TensorData};
use engram_config::{MemoryConfig, ModelConfig, Precision, load_model_config};
use engram_import::HostTensor;
use engram_model::{LanguageModel, MemoryRows, Sequences, Tokens, Trace};
use engram_train::{export, export_gradients, import};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use safetensors::tensor::{Dtype, TensorView};

const USAGE: &str = "usage: exchange CONFIG.toml FOLDER";
const BATCH: usize = 2;
const TIME: usize = 96;
/// Rows of a memory layer that the batch uses: fewer than its slots, so that rows are shared.
const ROWS: usize = 500;
/// Standard deviation of the noise on weights.
const NOISE: f32 = 0.02;
/// Standard deviation of rows.
const ROW_DEVIATION: f32 = 0.5;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [config, folder] = &arguments[..] else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match exchange(Path::new(config), Path::new(folder)) {
        Ok(loss) => {
            println!("loss {loss:.7}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Writes the three files; gives the loss.
fn exchange(config: &Path, folder: &Path) -> Result<f32> {
    let config = load_model_config(config)?;
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let device = Device::flex().autodiff();
    let model = noisy(LanguageModel::new(&config, &device, 0, Precision::F32)?, &mut random)?;
    let batch = Batch::random(&config, &mut random);

    let leaves: Vec<Tensor<2>> = batch.memory.iter().map(|layer| layer.leaf(&device)).collect();
    let layers = batch.memory.iter().zip(&leaves);
    let rows = |(layer, leaf): (&LayerBatch, &Tensor<2>)| {
        let index = layer.index.iter().map(|&row| row as u32).collect();
        MemoryRows { rows: leaf.clone(), index, dead: None }
    };
    let memory: Vec<MemoryRows> = layers.map(rows).collect();
    let ids = words(&batch.tokens);
    let sequences = Sequences::equal(BATCH, ids.len() / BATCH);
    let tokens = Tokens { ids: &ids, sequences: &sequences, memory: &memory };
    let loss = model.loss(tokens, Arc::from(words(&batch.targets)), &mut Trace::default());
    let value: f32 = loss.clone().inner().into_scalar();
    let mut gradients = loss.backward();

    let mut compared =
        BTreeMap::from([("loss".to_owned(), HostTensor { shape: vec![1], values: vec![value] })]);
    for (layer, leaf) in batch.memory.iter().zip(&leaves) {
        let gradient = leaf.grad_remove(&mut gradients).context("the loss does not depend on the rows")?;
        let values = gradient.into_data().try_into_vec().expect("gradients are f32");
        let tensor = HostTensor { shape: leaf.dims().to_vec(), values };
        compared.insert(format!("grad.memory.{}.rows", layer.layer), tensor);
    }
    let named = export_gradients(&model, &mut gradients).into_iter();
    compared.extend(named.map(|(name, gradient)| (format!("grad.{name}"), gradient)));

    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    write(&folder.join("weights.safetensors"), views(&export(&model))?)?;
    write(&folder.join("batch.safetensors"), batch.views()?)?;
    write(&folder.join("gradients.safetensors"), views(&compared)?)?;
    Ok(value)
}

/// The model with noise on every weight.
fn noisy(model: LanguageModel, random: &mut impl Rng) -> Result<LanguageModel> {
    let mut weights = export(&model);
    for value in weights.values_mut().flat_map(|tensor| &mut tensor.values) {
        let noise: f32 = random.sample(StandardNormal);
        *value += NOISE * noise;
    }
    Ok(import(model, weights, "the model itself")?)
}

/// A batch of random sequences, `[BATCH, TIME]`. Integers are `i64`, as PyTorch has them.
struct Batch {
    tokens: Vec<i64>,
    targets: Vec<i64>,
    memory: Vec<LayerBatch>,
}

/// Rows of one memory layer.
struct LayerBatch {
    layer: usize,
    width: usize,
    slots: usize,
    /// `[ROWS, width]`
    rows: Vec<f32>,
    /// Which row each slot takes, `[BATCH, TIME, slots]`.
    index: Vec<i64>,
}

impl Batch {
    fn random(config: &ModelConfig, random: &mut impl Rng) -> Self {
        let time = TIME.min(config.context);
        let mut below = |limit: usize, count: usize| -> Vec<i64> {
            (0..count).map(|_| random.random_range(0..limit as i64)).collect()
        };
        let tokens = below(config.vocabulary, BATCH * time);
        let targets = below(config.vocabulary, BATCH * time);
        let memory = config.memory.iter().flat_map(|memory| {
            let layers = memory.layers.iter().map(move |&layer| (layer, memory));
            layers.collect::<Vec<_>>()
        });
        let memory = memory.map(|(layer, memory)| LayerBatch::random(layer, memory, BATCH * time, random));
        Self { tokens, targets, memory: memory.collect() }
    }

    fn views(&self) -> Result<BTreeMap<String, TensorView<'_>>> {
        let shape = vec![BATCH, self.tokens.len() / BATCH];
        let integers =
            |shape: Vec<usize>, values| TensorView::new(Dtype::I64, shape, bytemuck::cast_slice(values));
        let mut views = BTreeMap::from([
            ("tokens".to_owned(), integers(shape.clone(), &self.tokens)?),
            ("targets".to_owned(), integers(shape.clone(), &self.targets)?),
        ]);
        for layer in &self.memory {
            let LayerBatch { layer, width, slots, rows, index } = layer;
            let rows = TensorView::new(Dtype::F32, vec![ROWS, *width], bytemuck::cast_slice(rows))?;
            views.insert(format!("memory.{layer}.rows"), rows);
            let shape = vec![shape[0], shape[1], *slots];
            views.insert(format!("memory.{layer}.index"), integers(shape, index)?);
        }
        Ok(views)
    }
}

impl LayerBatch {
    fn random(layer: usize, memory: &MemoryConfig, tokens: usize, random: &mut impl Rng) -> Self {
        let (width, slots) = (memory.row_width, memory.slots());
        let value = |_| -> f32 {
            let normal: f32 = random.sample(StandardNormal);
            ROW_DEVIATION * normal
        };
        let rows = (0..ROWS * width).map(value).collect();
        let index = (0..tokens * slots).map(|_| random.random_range(0..ROWS as i64)).collect();
        Self { layer, width, slots, rows, index }
    }

    fn leaf(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.rows.clone(), [ROWS, self.width]), device).require_grad()
    }
}

fn words(ids: &[i64]) -> Vec<u32> {
    ids.iter().map(|&id| id as u32).collect()
}

fn views(tensors: &BTreeMap<String, HostTensor>) -> Result<BTreeMap<String, TensorView<'_>>> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), view(tensor)?))).collect()
}

fn view(tensor: &HostTensor) -> Result<TensorView<'_>> {
    let bytes = bytemuck::cast_slice(&tensor.values);
    Ok(TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?)
}

fn write(path: &Path, tensors: BTreeMap<String, TensorView<'_>>) -> Result<()> {
    safetensors::serialize_to_file(tensors, None, path)
        .with_context(|| format!("cannot write {}", path.display()))
}
