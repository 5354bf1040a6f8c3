//! The gated feed-forward (arXiv 2002.05202), for decoding.

use engram_config::Activation;
use engram_kernels::{PackedMatrix, geglu, swiglu};

use crate::weights::{Loader, WeightError};

/// `(σ(x·W_gate) ⊙ x·W_up)·W_out`, where σ is SiLU or GELU.
#[derive(Debug)]
pub(crate) struct FeedForwardDecoder {
    input: Input,
    output: PackedMatrix,
    activation: Activation,
}

/// Gate and up.
#[derive(Debug)]
enum Input {
    /// Side by side, `[width, 2·hidden]`.
    Joint(PackedMatrix),
    /// `[width, hidden]` each, which may be of different formats.
    Apart(PackedMatrix, PackedMatrix),
}

impl FeedForwardDecoder {
    pub(crate) fn load(
        loader: &Loader<'_>,
        width: usize,
        hidden: usize,
        activation: Activation,
    ) -> Result<Self, WeightError> {
        let input = if loader.has("input.weight") {
            Input::Joint(loader.matrix("input.weight", width, 2 * hidden)?)
        } else {
            let gate = loader.matrix("gate.weight", width, hidden)?;
            Input::Apart(gate, loader.matrix("up.weight", width, hidden)?)
        };
        Ok(Self { input, output: loader.matrix("output.weight", hidden, width)?, activation })
    }

    /// Routed experts, whose weights are stacked in our checkpoints, and apart in files from elsewhere.
    pub(crate) fn load_experts(
        loader: &Loader<'_>,
        [count, width, hidden]: [usize; 3],
        activation: Activation,
    ) -> Result<Vec<Self>, WeightError> {
        if !loader.has("input") {
            let experts = loader.child("experts");
            return (0..count).map(|index| Self::load(&experts.child(index), width, hidden, activation)).collect();
        }
        let input = loader.matrices("input", [count, width, 2 * hidden])?.into_iter().map(Input::Joint);
        let output = loader.matrices("output", [count, hidden, width])?;
        Ok(input.zip(output).map(|(input, output)| Self { input, output, activation }).collect())
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let gate_up = match &self.input {
            Input::Joint(joint) => joint.product(x),
            Input::Apart(gate, up) => {
                let size = x.len() / gate.inputs() * gate.outputs();
                let (mut gates, mut ups) = (vec![0.0; size], vec![0.0; size]);
                PackedMatrix::products_into(x, &mut [(gate, &mut gates), (up, &mut ups)]);
                side_by_side(&gates, &ups, gate.outputs())
            }
        };
        self.output.product(&self.activate(&gate_up))
    }

    /// As [`forward`](Self::forward), on the calling thread.
    pub(crate) fn forward_here(&self, x: &[f32]) -> Vec<f32> {
        let gate_up = match &self.input {
            Input::Joint(joint) => joint.product_here(x),
            Input::Apart(gate, up) => side_by_side(&gate.product_here(x), &up.product_here(x), gate.outputs()),
        };
        self.output.product_here(&self.activate(&gate_up))
    }

    fn activate(&self, gate_up: &[f32]) -> Vec<f32> {
        match self.activation {
            Activation::Swiglu => swiglu(gate_up, self.output.inputs()),
            Activation::Geglu => geglu(gate_up, self.output.inputs()),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let input = match &self.input {
            Input::Joint(joint) => joint.bytes(),
            Input::Apart(gate, up) => gate.bytes() + up.bytes(),
        };
        input + self.output.bytes()
    }
}

/// Rows `[rows, width]` of both, side by side.
fn side_by_side(left: &[f32], right: &[f32], width: usize) -> Vec<f32> {
    let rows = left.chunks_exact(width).zip(right.chunks_exact(width));
    rows.flat_map(|(left, right)| [left, right]).flatten().copied().collect()
}
