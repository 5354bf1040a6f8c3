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

    /// Routed experts, whose weights are stacked.
    pub(crate) fn load_stacked(
        loader: &Loader<'_>,
        [count, width, hidden]: [usize; 3],
        activation: Activation,
    ) -> Result<Vec<Self>, WeightError> {
        let input: Vec<Input> = if loader.has("input") {
            let joint = loader.matrices("input", [count, width, 2 * hidden])?;
            joint.into_iter().map(Input::Joint).collect()
        } else {
            let gate = loader.matrices("gate", [count, width, hidden])?;
            let up = loader.matrices("up", [count, width, hidden])?;
            gate.into_iter().zip(up).map(|(gate, up)| Input::Apart(gate, up)).collect()
        };
        let output = loader.matrices("output", [count, hidden, width])?;
        Ok(input.into_iter().zip(output).map(|(input, output)| Self { input, output, activation }).collect())
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        self.output.product(&self.hidden(x, PackedMatrix::product))
    }

    /// As [`forward`](Self::forward), on the calling thread.
    pub(crate) fn forward_here(&self, x: &[f32]) -> Vec<f32> {
        self.output.product_here(&self.hidden(x, PackedMatrix::product_here))
    }

    fn hidden(&self, x: &[f32], product: impl Fn(&PackedMatrix, &[f32]) -> Vec<f32>) -> Vec<f32> {
        let width = self.output.inputs();
        let gate_up = match &self.input {
            Input::Joint(joint) => product(joint, x),
            Input::Apart(gate, up) => {
                let (gate, up) = (product(gate, x), product(up, x));
                let rows = gate.chunks_exact(width).zip(up.chunks_exact(width));
                rows.flat_map(|(gate, up)| [gate, up]).flatten().copied().collect()
            }
        };
        match self.activation {
            Activation::Swiglu => swiglu(&gate_up, width),
            Activation::Geglu => geglu(&gate_up, width),
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
