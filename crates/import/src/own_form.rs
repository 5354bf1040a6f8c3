//! A model from outside as a checkpoint of ours: the same weights, in f32, by the names and in the shapes that it has.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_config::{ExpertScore, ModelConfig};

use crate::checkpoint::CheckpointWriter;
use crate::error::Result;
use crate::generation;
use crate::model::Model;
use crate::safetensors_writer::{self, Written};
use crate::weight::{Weight, Weights};

impl Model {
    /// Writes the model as the checkpoint `folder`, where nothing may stand; it appears whole or not at all. `progress`
    /// hears how many of all tensors are written, and may end it.
    ///
    /// # Errors
    /// When something stands there, the file system refuses, or `progress` breaks.
    pub fn save_checkpoint(
        &self,
        folder: &Path,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<PathBuf> {
        let writer = CheckpointWriter::at(folder)?;
        let name = self.path().file_name().unwrap_or(self.path().as_os_str()).to_string_lossy().into_owned();
        let origin = format!("# Made from {name:?}, blake3 {}.\n\n", self.identity()?);
        writer.file("run.toml", (origin + &self.config().to_toml()).as_bytes())?;
        writer.file("tokenizer.json", self.tokenizer().json())?;
        writer.file(generation::FILE, self.generation().to_json().as_bytes())?;
        if let Some(template) = self.chat_template() {
            writer.file("tokenizer_config.json", template.as_bytes())?;
        }
        let tensors = tensors(self.weights(), &self.config().model);
        safetensors_writer::write(&writer.folder().join("model.safetensors"), &tensors, progress)?;
        Ok(writer.place()?)
    }
}

/// The tensors of a checkpoint.
fn tensors<'a>(weights: &'a Weights, config: &ModelConfig) -> Vec<Written<'a>> {
    let mut all = Vec::new();
    // Gate and up are one, and so are experts.
    let mut joined: BTreeSet<String> = BTreeSet::new();
    for (name, _) in weights.iter() {
        if let Some(place) = name.strip_suffix(".gate.weight") {
            joined.insert(place.to_owned());
        }
    }
    let mut places: BTreeSet<String> = BTreeSet::new();
    for place in &joined {
        match place.split_once(".experts.") {
            Some((block, _)) => {
                places.insert(block.to_owned());
            }
            None => all.extend(gated(weights, place)),
        }
    }
    for block in places {
        all.extend(experts(weights, config, &block));
    }
    let part_of = |name: &str| {
        let parts = [".gate.weight", ".up.weight", ".output.weight"];
        parts.iter().any(|part| name.strip_suffix(part).is_some_and(|place| joined.contains(place)))
    };
    for (name, weight) in weights.iter().filter(|(name, _)| !part_of(name)) {
        all.push(if weight.shape().len() == 2 && name != "embedding" && !weights.is_inputs_first() {
            transposed(name.to_owned(), weight)
        } else {
            Written {
                name: name.to_owned(),
                shape: weight.shape().to_vec(),
                values: Box::new(move || weight.values()),
            }
        });
    }
    all.extend(balances(weights, config));
    all
}

/// `[outputs, inputs]` as `[inputs, outputs]`.
fn transposed(name: String, weight: &Weight) -> Written<'_> {
    let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
    Written { name, shape: vec![inputs, outputs], values: Box::new(move || inputs_first(&[weight])) }
}

/// A feed-forward's gate and up side by side, and its output.
fn gated<'a>(weights: &'a Weights, place: &str) -> Vec<Written<'a>> {
    let part = |part: &str| weights.get(&format!("{place}.{part}.weight"));
    let (Some(gate), Some(up), Some(output)) = (part("gate"), part("up"), part("output")) else {
        return Vec::new();
    };
    let (hidden, width) = (gate.shape()[0], gate.shape()[1]);
    let input = Written {
        name: format!("{place}.input.weight"),
        shape: vec![width, 2 * hidden],
        values: Box::new(move || inputs_first(&[gate, up])),
    };
    vec![input, transposed(format!("{place}.output.weight"), output)]
}

/// The experts of a block, one after another.
fn experts<'a>(weights: &'a Weights, config: &ModelConfig, place: &str) -> Vec<Written<'a>> {
    let Some(experts) = &config.experts else { return Vec::new() };
    let (routed, hidden, width) = (experts.routed, experts.width, config.width);
    let every = |parts: &'static [&'static str]| {
        let place = place.to_owned();
        let one = move |expert: usize| -> Vec<f32> {
            let name = |part: &&str| format!("{place}.experts.{expert}.{part}.weight");
            inputs_first(&parts.iter().filter_map(|part| weights.get(&name(part))).collect::<Vec<_>>())
        };
        Box::new(move || (0..routed).flat_map(&one).collect()) as Box<dyn Fn() -> Vec<f32> + 'a>
    };
    let input = (vec![routed, width, 2 * hidden], every(&["gate", "up"]));
    let output = (vec![routed, hidden, width], every(&["output"]));
    [("input", input), ("output", output)]
        .map(|(part, (shape, values))| Written { name: format!("{place}.{part}"), shape, values })
        .into()
}

/// Balancing biases of zero, where sigmoid scores have none: every checkpoint has them.
fn balances<'a>(weights: &Weights, config: &ModelConfig) -> Vec<Written<'a>> {
    let missing = (0..config.blocks).filter_map(|block| {
        let experts = config.experts_of(block).filter(|experts| experts.score == ExpertScore::Sigmoid)?;
        let name = format!("blocks.{block}.feed_forward.balance");
        let (there, routed) = (weights.get(&name).is_some(), experts.routed);
        let values = Box::new(move || vec![0.0_f32; routed]) as Box<dyn Fn() -> Vec<f32> + 'a>;
        (!there).then_some(Written { name, shape: vec![routed], values })
    });
    missing.collect()
}

/// Matrices `[outputs, inputs]` of common inputs as one `[inputs, all outputs]`.
fn inputs_first(matrices: &[&Weight]) -> Vec<f32> {
    let Some(inputs) = matrices.first().and_then(|matrix| matrix.shape().last().copied()) else {
        return Vec::new();
    };
    let outputs: usize = matrices.iter().map(|matrix| matrix.shape()[0]).sum();
    let mut transposed = vec![0.0; inputs * outputs];
    let mut first = 0;
    for matrix in matrices {
        let values = matrix.values();
        // Sixteen inputs at a time, so that the rows that are written stay in cache.
        for start in (0..inputs).step_by(16) {
            let end = inputs.min(start + 16);
            for (output, row) in values.chunks_exact(inputs).enumerate() {
                for input in start..end {
                    transposed[input * outputs + first + output] = row[input];
                }
            }
        }
        first += matrix.shape()[0];
    }
    transposed
}
