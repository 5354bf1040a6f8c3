//! Memory modules with weights, input, output and gradients (`module_*.safetensors`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use burn::module::Param;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use engram_address::{Addressing, Tokens, Vocabulary, assign_primes, draw_multipliers};
use engram_config::{Compression, Gate as GateCount, GateForm, Lookup, MemoryConfig, MemoryForm, Precision};
use engram_model::{Gate, Init, Memory, MemoryRows, Projection, SeparateProjection, Sequences, composed};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::addressing::{self, get};
use crate::report::Report;

/// How a module's operations are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ComputePath {
    /// Fused, as on a CPU.
    Fused,
    /// In Burn's primitives, as on other devices.
    Composed,
    /// On the first NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Checks the addressing and every module of a file.
pub(crate) fn check(
    path: &Path,
    vocabulary: Option<&Vocabulary>,
    compute: ComputePath,
    report: &mut Report,
) -> Result<()> {
    report.file(path);
    let bytes = std::fs::read(path)?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let metadata = header.metadata().as_ref().context("no metadata")?;
    let mut values = serde_json::Map::new();
    for (key, json) in metadata {
        values.insert(key.clone(), serde_json::from_str(json).with_context(|| format!("metadata `{key}`"))?);
    }
    let metadata = Value::Object(values);
    let shape = Shape::of(&metadata)?;
    let file = Tensors::read(&SafeTensors::deserialize(&bytes)?)?;
    addresses(&metadata, &shape.config, &file, vocabulary, report)?;
    for &layer in &shape.config.layers {
        let published = Published { file: &file, prefix: format!("layer{layer}."), shape: &shape };
        match compute {
            ComputePath::Fused => published.check(&Device::flex(), report)?,
            ComputePath::Composed => composed(|| published.check(&Device::flex(), report))?,
            #[cfg(feature = "cuda")]
            ComputePath::Cuda => published.check(&Device::cuda(0), report)?,
        }
    }
    Ok(())
}

/// Multipliers, primes and, given the vocabulary's classes, the ids of all rows.
fn addresses(
    metadata: &Value,
    config: &MemoryConfig,
    file: &Tensors,
    vocabulary: Option<&Vocabulary>,
    report: &mut Report,
) -> Result<()> {
    let classes = get(metadata, "compressed_vocab_size")?;
    let primes = assign_primes(config.layers.len(), &config.rows_per_head, config.heads)?;
    for (layer, primes) in config.layers.iter().zip(&primes) {
        let found = draw_multipliers(config.seed, *layer, classes, config.max_order);
        let name = format!("layer{layer}.multipliers");
        report.integers(&name, &addressing::strings(&found), &get::<Vec<String>>(metadata, &name)?);
        let name = format!("layer{layer}.primes");
        report.integers(&name, &primes.concat(), &get::<Vec<Vec<u64>>>(metadata, &name)?.concat());
    }
    let Some(vocabulary) = vocabulary else {
        report.note("row_ids", "need the *_compression.npy file, to map token ids to classes");
        return Ok(());
    };
    report.integers("classes of the vocabulary", &[vocabulary.classes()], &[classes]);
    let addressing = Addressing::new(&addressing::config(metadata)?, vocabulary.clone())?;
    let (tokens, shape) = file.integers("input_ids")?;
    let &[_, time] = shape else { anyhow::bail!("`input_ids` has the shape {shape:?}, not [batch, time]") };
    let tokens: Vec<u32> =
        tokens.iter().map(|&id| u32::try_from(id).context("`input_ids`")).collect::<Result<_>>()?;
    for (index, layer) in addressing.layers().iter().enumerate() {
        let (mut rows, mut in_heads) = (Vec::new(), Vec::new());
        for sequence in tokens.chunks(time) {
            let ids = addressing::row_ids(&addressing, index, Tokens::from(sequence))?;
            in_heads.extend(addressing::head_ids(layer, &ids));
            rows.extend(ids);
        }
        let mut unique = rows.clone();
        unique.sort_unstable();
        unique.dedup();
        for (name, found) in [("row_ids", rows), ("head_ids", in_heads), ("unique_row_ids", unique)] {
            let name = format!("layer{}.{name}", layer.layer());
            report.integers(&name, &found, file.integers(&name)?.0);
        }
    }
    Ok(())
}

/// What the metadata says about all modules of a file.
struct Shape {
    streams: usize,
    width: usize,
    config: MemoryConfig,
}

impl Shape {
    fn of(metadata: &Value) -> Result<Self> {
        let address = addressing::config(metadata)?;
        address.validate()?;
        let order_width: usize = get(metadata, "n_embed_per_ngram")?;
        ensure!(
            order_width.is_multiple_of(address.heads),
            "`n_embed_per_ngram` is {order_width}, no multiple of the {} heads",
            address.heads
        );
        let config = MemoryConfig {
            form: MemoryForm::Paper,
            gate: GateCount::PerStream,
            gate_form: GateForm::SignedRoot,
            convolution: None,
            layers: address.layers,
            max_order: address.max_order,
            heads: address.heads,
            row_width: order_width / address.heads,
            rows_per_head: address.base_rows,
            compression: Compression::Normalised,
            lookup: Lookup::Own,
            seed: address.seed,
            pad_id: address.pad_id,
            kernel: get(metadata, "kernel_size")?,
            row_init: 0.0,
        };
        Ok(Self { streams: get(metadata, "hc_mult")?, width: get(metadata, "hidden_size")?, config })
    }
}

/// One layer of a file.
struct Published<'a> {
    file: &'a Tensors,
    prefix: String,
    shape: &'a Shape,
}

impl Published<'_> {
    /// Runs the module forward and backward and compares everything. `path` says by which operations.
    fn check(&self, device: &Device, report: &mut Report) -> Result<()> {
        let device = device.clone().autodiff();
        let module = self.module(&device)?;
        let hidden_shape = self.file.floats(&self.name("hidden_in"))?.1;
        let &[batch, time, ..] = hidden_shape else {
            anyhow::bail!("`{}` has the shape {hidden_shape:?}", self.name("hidden_in"));
        };
        let streams = [batch * time, self.shape.streams * self.shape.width];
        let hidden = self.tensor("hidden_in", streams, &device)?.require_grad();
        let ids = self.file.integers(&self.name("unique_row_ids"))?.0;
        let rows =
            self.tensor("unique_rows", [ids.len(), self.shape.config.row_width], &device)?.require_grad();
        let memory = MemoryRows { rows, index: self.index(ids, batch * time)?, dead: None };

        let out = module.forward(hidden.clone(), &Sequences::equal(batch, time), &memory);
        let upstream = self.tensor("grad_out", streams, &device)?;
        let gradients = (out.clone() * upstream).sum().backward();

        let mut line = |name: &str, found: Vec<f32>, expected: &[f32]| {
            report.floats(&format!("{}{name}", self.prefix), &found, expected);
        };
        line("out", values(out.inner())?, self.get("out")?);
        line("grad_hidden", gradient(&hidden, &gradients)?, self.get("grad_hidden")?);
        line("grad_unique_rows", gradient(&memory.rows, &gradients)?, self.get("grad_unique_rows")?);
        for (name, found) in self.parameter_gradients(&module, &gradients)? {
            let name = format!("grad.{name}");
            line(&name, found, self.get(&name)?);
        }
        Ok(())
    }

    /// Our module with the file's weights: key projections of all streams side by side, matrices as `[in, out]`.
    fn module(&self, device: &Device) -> Result<Memory> {
        let Shape { streams, width, config } = self.shape;
        let (streams, width, memory) = (*streams, *width, config.width());
        let weight = |name: &str, outputs: usize| {
            Ok(self.tensor(&format!("param.{name}"), [outputs, memory], device)?.transpose())
        };
        let each = |name: fn(usize) -> String| (0..streams).map(name);
        let stack = |name: fn(usize) -> String| {
            let rows = each(name).map(|name| self.tensor(&format!("param.{name}"), [1, width], device));
            Ok::<_, anyhow::Error>(parameter(Tensor::cat(rows.collect::<Result<Vec<_>>>()?, 0)))
        };
        let keys = each(key_weight).map(|name| weight(&name, width)).collect::<Result<Vec<_>>>()?;
        let mut module = Memory::new(config, streams, width, &Init::new(device, 0), Precision::F32);
        module.projection = Projection::Separate(SeparateProjection {
            key: parameter(Tensor::cat(keys, 1)),
            key_bias: parameter(stack(key_bias)?.val().reshape([streams * width])),
            value: parameter(weight("value_proj.weight", width)?),
            value_bias: parameter(self.tensor("param.value_proj.bias", [width], device)?),
        });
        if let Some(Gate::SignedRoot(gate)) = &mut module.norms {
            (gate.query, gate.key) = (stack(query_norm)?, Some(stack(key_norm)?));
        }
        let convolution = module.convolution.as_mut().context("the paper's form has a convolution")?;
        convolution.norm = stack(convolution_norm)?;
        let taps = [streams, width, config.kernel];
        convolution.weight = parameter(self.tensor("param.short_conv.conv.weight", taps, device)?);
        Ok(module)
    }

    /// Every weight's gradient under its published name and in its published layout.
    fn parameter_gradients(&self, module: &Memory, gradients: &Gradients) -> Result<Vec<(String, Vec<f32>)>> {
        let Shape { streams, width, .. } = *self.shape;
        let Projection::Separate(projection) = &module.projection else {
            unreachable!("built with separate projections")
        };
        let convolution = module.convolution.as_ref().context("the paper's form has a convolution")?;
        let Some(Gate::SignedRoot(norms)) = &module.norms else {
            unreachable!("built with the paper's gate")
        };
        let key_norms = norms.key.as_ref().context("the paper's form has a norm for keys")?;
        let matrix = |param: &Param<Tensor<2>>| {
            let gradient = param.val().grad(gradients).context("a weight without a gradient")?;
            values(gradient.transpose())
        };
        let mut all = vec![
            ("value_proj.weight".to_owned(), matrix(&projection.value)?),
            ("value_proj.bias".to_owned(), gradient(&projection.value_bias.val(), gradients)?),
            ("short_conv.conv.weight".to_owned(), gradient(&convolution.weight.val(), gradients)?),
        ];
        let mut each = |name: fn(usize) -> String, stacked: Vec<f32>| {
            let parts = stacked.chunks_exact(stacked.len() / streams).map(<[f32]>::to_vec);
            all.extend((0..streams).map(name).zip(parts));
        };
        debug_assert_eq!(projection.key.val().dims()[1], streams * width);
        each(key_weight, matrix(&projection.key)?);
        each(key_bias, gradient(&projection.key_bias.val(), gradients)?);
        each(key_norm, gradient(&key_norms.val(), gradients)?);
        each(query_norm, gradient(&norms.query.val(), gradients)?);
        each(convolution_norm, gradient(&convolution.norm.val(), gradients)?);
        Ok(all)
    }

    /// Which of the distinct rows `ids` stands in each slot.
    fn index(&self, ids: &[u64], tokens: usize) -> Result<Arc<[u32]>> {
        let row_ids = self.file.integers(&self.name("row_ids"))?.0;
        ensure!(
            row_ids.len() == tokens * self.shape.config.slots(),
            "`{}` has {} ids for {tokens} tokens of {} slots",
            self.name("row_ids"),
            row_ids.len(),
            self.shape.config.slots()
        );
        let position = |id: &u64| match ids.binary_search(id) {
            Ok(position) => Ok(u32::try_from(position)?),
            Err(_) => anyhow::bail!("row {id} is missing in the sorted `{}`", self.name("unique_row_ids")),
        };
        row_ids.iter().map(position).collect()
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn get(&self, name: &str) -> Result<&[f32]> {
        Ok(self.file.floats(&self.name(name))?.0)
    }

    fn tensor<const D: usize>(&self, name: &str, shape: [usize; D], device: &Device) -> Result<Tensor<D>> {
        let values = self.get(name)?;
        ensure!(
            values.len() == shape.iter().product::<usize>(),
            "`{}` has {} values, which do not fill the shape {shape:?} that the metadata asks for",
            self.name(name),
            values.len()
        );
        Ok(Tensor::from_data(TensorData::new(values.to_vec(), shape), device))
    }
}

fn key_weight(stream: usize) -> String {
    format!("key_projs.{stream}.weight")
}
fn key_bias(stream: usize) -> String {
    format!("key_projs.{stream}.bias")
}
fn key_norm(stream: usize) -> String {
    format!("norm1.{stream}.weight")
}
fn query_norm(stream: usize) -> String {
    format!("norm2.{stream}.weight")
}
fn convolution_norm(stream: usize) -> String {
    format!("short_conv.norms.{stream}.weight")
}

/// A weight of these values; what computed them is left behind.
fn parameter<const D: usize>(values: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(values.detach())
}

fn values<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.into_data().try_into_vec().map_err(|error| anyhow::anyhow!("{error:?}"))
}

fn gradient<const D: usize>(of: &Tensor<D>, gradients: &Gradients) -> Result<Vec<f32>> {
    values(of.grad(gradients).context("a tensor without a gradient")?)
}

/// The tensors of a file, by name, with their shapes.
#[derive(Default)]
struct Tensors {
    floats: HashMap<String, (Vec<f32>, Vec<usize>)>,
    integers: HashMap<String, (Vec<u64>, Vec<usize>)>,
}

impl Tensors {
    fn read(file: &SafeTensors<'_>) -> Result<Self> {
        let mut tensors = Self::default();
        for (name, view) in file.tensors() {
            let shape = view.shape().to_vec();
            match view.dtype() {
                Dtype::F32 => {
                    let words = view.data().as_chunks::<4>().0;
                    let values = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
                    tensors.floats.insert(name, (values, shape));
                }
                Dtype::I64 => {
                    let id = |word: &[u8; 8]| {
                        let id = i64::from_le_bytes(*word);
                        u64::try_from(id).with_context(|| format!("`{name}` holds the negative id {id}"))
                    };
                    let ids = view.data().as_chunks::<8>().0.iter().map(id).collect::<Result<_>>()?;
                    tensors.integers.insert(name, (ids, shape));
                }
                other => anyhow::bail!("`{name}` is of type {other:?}: F32 and I64 are known"),
            }
        }
        Ok(tensors)
    }

    fn floats(&self, name: &str) -> Result<(&[f32], &[usize])> {
        let (values, shape) = self.floats.get(name).with_context(|| format!("no F32 tensor `{name}`"))?;
        Ok((values, shape))
    }

    fn integers(&self, name: &str) -> Result<(&[u64], &[usize])> {
        let (values, shape) = self.integers.get(name).with_context(|| format!("no I64 tensor `{name}`"))?;
        Ok((values, shape))
    }
}
