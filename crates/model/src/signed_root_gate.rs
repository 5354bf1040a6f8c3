//! The published gate: `σ(√|s|·sign s)` of `s = ⟨RMSNorm(h), RMSNorm(k)⟩/√width` (arXiv 2601.07372, section 2.3). The
//! signed root is in the published code, not in the paper's equation 4.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::compute_gate::ComputeGate;
use crate::host::like;
use crate::init::Init;
use crate::ops;
use crate::training::{DeclareTraining, TrainingPlan};

/// The gate and the weights of its norms. V4.1 keeps only their product.
#[derive(Module, Debug)]
pub struct SignedRootGate {
    /// Norm weight of the residual streams, `[G, width]`.
    pub query: Param<Tensor<2>>,
    /// Norm weight of the keys, `[G, width]`; none: the query's weight is the product of both.
    pub key: Option<Param<Tensor<2>>>,
    epsilon: f64,
}

/// f32 machine epsilon, in the gate's norms of the demonstration code.
const PAPER_EPSILON: f64 = f32::EPSILON as f64;
/// Epsilon of the gate's norms in V4.1.
const V41_EPSILON: f64 = 1e-20;

impl SignedRootGate {
    /// The paper's gate, with a weight for each norm.
    pub(crate) fn paper(gates: usize, width: usize, init: &Init) -> Self {
        let ones = || init.constant([gates, width], 1.0);
        Self { query: ones(), key: Some(ones()), epsilon: PAPER_EPSILON }
    }

    /// V4.1's gate, with one weight for both norms.
    pub(crate) fn v41(gates: usize, width: usize, init: &Init) -> Self {
        Self { query: init.constant([gates, width], 1.0), key: None, epsilon: V41_EPSILON }
    }
}

impl ComputeGate for SignedRootGate {
    fn gate(&self, h: Tensor<2>, keys: Tensor<2>) -> Tensor<3> {
        let weight = |weight: &Param<Tensor<2>>| like(&h, weight.val());
        let norms = (weight(&self.query), self.key.as_ref().map(weight));
        ops::signed_root_gate(h, keys, norms, self.epsilon)
    }

    fn times(&self, h: Tensor<2>, keys: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
        let norms = (self.query.val(), self.key.as_ref().map(Param::val));
        ops::memory_gate(h, keys, value, norms, self.epsilon)
    }
}

impl DeclareTraining for SignedRootGate {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        plan.adam_without_decay(&self.query);
        self.key.iter().for_each(|key| plan.adam_without_decay(key));
    }
}
