//! The gates that a memory may have; `docs/adding-a-variant.md` adds one.

use burn::module::Module;
use burn::tensor::Tensor;
use engram_config::{MemoryConfig, MemoryForm};

use crate::gate_form::GateForm;
use crate::init::Init;
use crate::signed_root_gate::SignedRootGate;
use crate::training::{DeclareTraining, TrainingPlan};

/// How far a memory is read.
#[derive(Module, Debug)]
pub enum Gate {
    /// The published one.
    SignedRoot(SignedRootGate),
}

impl Gate {
    /// The gate of `config`, for `gates` queries and keys of `width`.
    pub(crate) fn new(config: &MemoryConfig, gates: usize, width: usize, init: &Init) -> Self {
        match config.form {
            MemoryForm::Paper => Self::SignedRoot(SignedRootGate::paper(gates, width, init)),
            _ => Self::SignedRoot(SignedRootGate::v41(gates, width, init)),
        }
    }

    fn form(&self) -> &dyn GateForm {
        match self {
            Self::SignedRoot(gate) => gate,
        }
    }

    /// a, `[tokens, G, 1]`; see [`GateForm::gate`].
    pub(crate) fn gate(&self, h: Tensor<2>, keys: Tensor<2>) -> Tensor<3> {
        self.form().gate(h, keys)
    }

    /// The value times every gate, `[tokens, G·width]`; see [`GateForm::times`].
    pub(crate) fn times(&self, h: Tensor<2>, keys: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
        self.form().times(h, keys, value)
    }
}

impl DeclareTraining for Gate {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        match self {
            Self::SignedRoot(gate) => gate.declare_training(plan),
        }
    }
}
