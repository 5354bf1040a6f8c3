//! Gradients in little memory: what a block computes is computed again when its gradients are due (Chen et al. 2016,
//! arXiv 1604.06174).
//!
//! A graph of the whole model keeps the activations of every block until the backward pass has come to it. Here the
//! forward pass runs without a graph and keeps what enters each block, `[tokens, n·width]`. Then, from the last
//! block to the first, one block at a time runs once more with a graph, through which the gradient of what it gave is
//! pulled back. The operations and their order are those of the whole graph; where they are fused, so are the bits.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use crate::memory_rows::MemoryRows;
use crate::targets::{Shares, Targets};
use crate::transformer::{LanguageModel, Tokens, Trace};

impl LanguageModel {
    /// The [`loss_counting`](Self::loss_counting), and the gradients of its share and of the shares of the losses that
    /// balance experts, that its graph would give: of weights, and of the rows of `tokens.memory`. Only one block's activations exist at a time, for one more forward pass.
    ///
    /// # Panics
    /// As [`hidden`](Self::hidden), or when the model is not on a device with autodiff.
    pub fn loss_recomputing(
        &self,
        tokens: Tokens<'_>,
        targets: &Targets,
        shares: Shares,
        trace: &mut Trace,
    ) -> (f32, Gradients) {
        let (inputs, last) = self.block_inputs(tokens, trace);
        let x = leaf(last);
        let loss = self.loss_of(self.leave(x.clone()), targets);
        let value = loss.clone().inner().into_scalar();
        let mut all = loss.mul_scalar(shares.loss).backward();
        let mut upstream = x.grad_remove(&mut all).expect("the loss depends on the last block");
        let blocks = inputs.into_iter().zip(self.rows_by_block(tokens.memory)).enumerate();
        for (index, (input, rows)) in blocks.rev() {
            let x = leaf(input);
            let mut passed = Trace::default();
            let y = self.pass(index, x.clone(), tokens.sequences, rows, &mut passed);
            let balance = passed.balance.into_iter().map(|balance| balance.mul_scalar(shares.balance)).next();
            let mut gradients = pull_back(y, upstream, balance);
            upstream = x.grad_remove(&mut gradients).expect("a block depends on its input");
            let mut moving = Move { from: &mut gradients, to: &mut all };
            self.blocks[index].visit(&mut moving);
            rows.into_iter().for_each(|rows| moving.tensor(&rows.rows));
        }
        let mut gradients = pull_back(self.enter(tokens), upstream, None);
        Move { from: &mut gradients, to: &mut all }.tensor(&self.embedding.val());
        (value, all)
    }

    /// The streams before each block, and those after the last, without a graph.
    fn block_inputs(&self, tokens: Tokens<'_>, trace: &mut Trace) -> (Vec<Tensor<2>>, Tensor<2>) {
        let plain = self.valid();
        let without_graph =
            |rows: &MemoryRows| MemoryRows { rows: rows.rows.clone().inner(), ..rows.clone() };
        let memory: Vec<MemoryRows> = tokens.memory.iter().map(without_graph).collect();
        let mut x = plain.enter(tokens);
        let mut inputs = Vec::with_capacity(self.blocks.len());
        for (index, rows) in plain.rows_by_block(&memory).into_iter().enumerate() {
            inputs.push(x.clone());
            x = plain.pass(index, x, tokens.sequences, rows, trace);
        }
        (inputs, x)
    }
}

/// Where a graph begins.
fn leaf(x: Tensor<2>) -> Tensor<2> {
    Tensor::from_inner(x).require_grad()
}

/// Gradients of all that `y` depends on, from its own, of the same shape, and of a loss beside it.
fn pull_back(y: Tensor<2>, upstream: Tensor<2>, beside: Option<Tensor<1>>) -> Gradients {
    // The slope of Σ y·g along y is g, to the bit.
    let sum = (y * Tensor::from_inner(upstream)).sum();
    match beside {
        Some(beside) => (sum + beside).backward(),
        None => sum.backward(),
    }
}

/// Takes gradients from one place to another, where they are added to what is there.
struct Move<'a> {
    from: &'a mut Gradients,
    to: &'a mut Gradients,
}

impl Move<'_> {
    fn tensor<const D: usize>(&mut self, of: &Tensor<D>) {
        if let Some(found) = of.grad_remove(self.from) {
            let sum = match of.grad_remove(self.to) {
                Some(there) => found + there,
                None => found,
            };
            of.grad_replace(self.to, sum);
        }
    }
}

impl ModuleVisitor for Move<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.tensor(&param.val());
    }
}
