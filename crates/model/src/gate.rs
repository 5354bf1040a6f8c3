//! The gates that a memory may have; `docs/adding-a-variant.md` adds one.

use burn::module::Module;
use burn::tensor::Tensor;
use engram_config::{GateForm, MemoryConfig, MemoryForm};

use crate::compute_gate::ComputeGate;
use crate::init::Init;
use crate::sigmoid_gate::SigmoidGate;
use crate::signed_root_gate::SignedRootGate;
use crate::training::{DeclareTraining, TrainingPlan};

/// How far a memory is read.
#[derive(Module, Debug)]
pub enum Gate {
    /// The published one.
    SignedRoot(SignedRootGate),
    /// A plain sigmoid of queries and keys as they are.
    Sigmoid(SigmoidGate),
}

impl Gate {
    /// The gate of `config`, for `gates` queries and keys of `width`.
    pub(crate) fn new(config: &MemoryConfig, gates: usize, width: usize, init: &Init) -> Self {
        match (config.gate_form, config.form) {
            (GateForm::Sigmoid, _) => Self::Sigmoid(SigmoidGate::new(gates)),
            (GateForm::SignedRoot, MemoryForm::Paper) => {
                Self::SignedRoot(SignedRootGate::paper(gates, width, init))
            }
            (GateForm::SignedRoot, _) => Self::SignedRoot(SignedRootGate::v41(gates, width, init)),
        }
    }

    fn form(&self) -> &dyn ComputeGate {
        match self {
            Self::SignedRoot(gate) => gate,
            Self::Sigmoid(gate) => gate,
        }
    }

    /// a, `[tokens, G, 1]`; see [`ComputeGate::gate`].
    pub(crate) fn gate(&self, h: Tensor<2>, keys: Tensor<2>) -> Tensor<3> {
        self.form().gate(h, keys)
    }

    /// The value times every gate, `[tokens, G·width]`; see [`ComputeGate::times`].
    pub(crate) fn times(&self, h: Tensor<2>, keys: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
        self.form().times(h, keys, value)
    }
}

impl DeclareTraining for Gate {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        match self {
            Self::SignedRoot(gate) => gate.declare_training(plan),
            Self::Sigmoid(gate) => gate.declare_training(plan),
        }
    }
}
