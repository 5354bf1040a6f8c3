//! The gated feed-forward (arXiv 2002.05202), for decoding.

use engram_config::Activation;
use engram_kernels::{PackedMatrix, geglu, geglu_apart, swiglu, swiglu_apart};

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
            return (0..count)
                .map(|index| Self::load(&experts.child(index), width, hidden, activation))
                .collect();
        }
        let input = loader.matrices("input", [count, width, 2 * hidden])?.into_iter().map(Input::Joint);
        let output = loader.matrices("output", [count, hidden, width])?;
        Ok(input.zip(output).map(|(input, output)| Self { input, output, activation }).collect())
    }

    /// `[rows, width]` to the same.
    pub(crate) fn forward(&self, x: &[f32]) -> Vec<f32> {
        let gated = match &self.input {
            Input::Joint(joint) => self.activate(&joint.product(x)),
            Input::Apart(gate, up) => {
                let [gates, ups] = PackedMatrix::products([gate, up], x);
                self.activate_apart(gates, &ups)
            }
        };
        self.output.product(&gated)
    }

    /// As [`forward`](Self::forward), on the calling thread.
    pub(crate) fn forward_here(&self, x: &[f32]) -> Vec<f32> {
        let gated = match &self.input {
            Input::Joint(joint) => self.activate(&joint.product_here(x)),
            Input::Apart(gate, up) => self.activate_apart(gate.product_here(x), &up.product_here(x)),
        };
        self.output.product_here(&gated)
    }

    /// Takes gates and values side by side, `[rows, 2·hidden]`.
    fn activate(&self, gate_up: &[f32]) -> Vec<f32> {
        match self.activation {
            Activation::Swiglu => swiglu(gate_up, self.output.inputs()),
            Activation::Geglu => geglu(gate_up, self.output.inputs()),
        }
    }

    fn activate_apart(&self, mut gates: Vec<f32>, ups: &[f32]) -> Vec<f32> {
        match self.activation {
            Activation::Swiglu => swiglu_apart(&mut gates, ups),
            Activation::Geglu => geglu_apart(&mut gates, ups),
        }
        gates
    }

    pub(crate) fn bytes(&self) -> usize {
        let input = match &self.input {
            Input::Joint(joint) => joint.bytes(),
            Input::Apart(gate, up) => gate.bytes() + up.bytes(),
        };
        input + self.output.bytes()
    }
}
