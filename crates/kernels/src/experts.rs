//! Routed experts (DeepSeekMoE, arXiv 2401.06066): every token passes through the few experts chosen for it.
//!
//! y = Σ over the chosen e of gateₑ · (silu(x·Gₑ) ∘ (x·Uₑ))·Wₑ. Assignments of tokens to experts are sorted by expert,
//! so that each expert multiplies all its tokens at once. No token is ever dropped. The forward pass saves the sorted
//! order and the products x·(G|U), because recomputing them costs a third of the pass. Rows of x and of gradients are
//! gathered again when they are needed.

use crate::embedding::Occurrences;
use crate::parallel::{self, block_rows};
use crate::product::{Matrix, MatrixMut, Threads, multiply};
use crate::simd::{dot, sigmoid, vectorized};
use std::ops::Range;

/// Sizes of [`experts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsShape {
    /// E, the number of experts.
    pub experts: usize,
    /// K, the number of experts per token.
    pub active: usize,
    /// D, the width of a token.
    pub width: usize,
    /// F, the width inside an expert.
    pub hidden: usize,
}

/// The input of [`experts`], all row-major.
#[derive(Debug, Clone, Copy)]
pub struct ExpertsInput<'a> {
    /// `[rows, width]`: the tokens.
    pub x: &'a [f32],
    /// `[rows, active]`: the experts of each token.
    pub choice: &'a [u32],
    /// `[rows, active]`: the weight of each.
    pub gate: &'a [f32],
    /// `[experts, width, 2·hidden]`: gate part, then up part.
    pub w_in: &'a [f32],
    /// `[experts, hidden, width]`.
    pub w_out: &'a [f32],
}

/// What [`experts`] computes.
#[derive(Debug, Clone)]
pub struct Experts {
    /// y `[rows, width]`.
    pub output: Vec<f32>,
    /// For the backward pass.
    pub saved: ExpertsSaved,
}

/// What [`experts_backward`] needs besides the input.
#[derive(Debug, Clone)]
pub struct ExpertsSaved {
    /// Positions of `choice`, sorted by expert.
    order: Occurrences,
    /// `[rows · active]`: the place of each position of `choice` in that order.
    place: Vec<u32>,
    /// `[rows · active, 2·hidden]` in that order: x·w_in.
    gate_up: Vec<f32>,
}

impl ExpertsSaved {
    /// Number of tokens of `expert`.
    pub fn load(&self, expert: usize) -> usize {
        self.order.of_row(expert).len()
    }
}

/// Gradients computed by [`experts_backward`], in the shapes of its inputs. An expert without tokens has zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsGradients {
    /// Gradient of the tokens.
    pub x: Vec<f32>,
    /// Gradient of the gates.
    pub gate: Vec<f32>,
    /// Gradient of `w_in`.
    pub w_in: Vec<f32>,
    /// Gradient of `w_out`.
    pub w_out: Vec<f32>,
}

/// Rows multiplied at once: few enough for the caches, and enough that packing an expert's weights for each product
/// costs little.
const CHUNK_ROWS: usize = 512;
/// Rows of one expert in a task of the backward pass. Experts with more rows are split, which requires adding gradients
/// as large as their weights.
const TASK_ROWS: usize = 2 * CHUNK_ROWS;

/// Each token's sum over its experts, weighted by their gates, in the order of its choices.
///
/// # Panics
/// When a size is 0, a slice does not have the stated shape, or a choice is not below `experts`.
pub fn experts(input: &ExpertsInput<'_>, shape: ExpertsShape) -> Experts {
    shape.check(input);
    let ExpertsShape { active, width, hidden, .. } = shape;
    let order = Occurrences::of(input.choice, shape.experts);
    let mut gate_up = vec![0.0; input.choice.len() * 2 * hidden];
    let mut contributions = vec![0.0; input.choice.len() * width];
    let tasks = Task::split(&order, CHUNK_ROWS);
    let blocks = (tasks.iter()).zip(split_rows(&mut gate_up, &tasks, 2 * hidden)).zip(split_rows(
        &mut contributions,
        &tasks,
        width,
    ));
    parallel::for_each(blocks, |((task, gate_up), contributions)| {
        let assignments = &order.positions[task.rows.clone()];
        let rows = assignments.len();
        let mut x = Vec::with_capacity(rows * width);
        gather(input.x, assignments, active, width, &mut x);
        let mut act = vec![0.0; rows * hidden];
        multiply(
            1.0,
            Matrix::new(&x, rows, width),
            shape.w_in(input, task.expert),
            0.0,
            MatrixMut::new(gate_up, rows, 2 * hidden),
            Threads::One,
        );
        vectorized(
            #[inline(always)]
            || activate(gate_up, assignments, input.gate, hidden, &mut act),
        );
        multiply(
            1.0,
            Matrix::new(&act, rows, hidden),
            shape.w_out(input, task.expert),
            0.0,
            MatrixMut::new(contributions, rows, width),
            Threads::One,
        );
    });
    let place = places(&order);
    let output = combine(&contributions, &place, active, width);
    Experts { output, saved: ExpertsSaved { order, place, gate_up } }
}

/// Gradients of [`experts`], given `grad` `[rows, width]` of its output.
///
/// With a = silu(gate part) ∘ up part: da = grad·w_outᵀ is needed for x's gradient, and also gives the gate's, as
/// grad·(a·w_out) = da·a. So no expert's output has to be saved.
///
/// # Panics
/// As [`experts`], and when `grad` or `saved` belong to another shape.
pub fn experts_backward(
    grad: &[f32],
    input: &ExpertsInput<'_>,
    shape: ExpertsShape,
    saved: &ExpertsSaved,
) -> ExpertsGradients {
    shape.check(input);
    let ExpertsShape { active, width, hidden, .. } = shape;
    let assignments = input.choice.len();
    assert_eq!(grad.len(), input.x.len(), "experts: the gradient has another size than the output");
    assert_eq!(saved.gate_up.len(), assignments * 2 * hidden, "experts: saved values of another shape");
    assert_eq!(saved.order.starts.len(), shape.experts + 1, "experts: saved values of another shape");

    let mut w_in = vec![0.0; input.w_in.len()];
    let mut w_out = vec![0.0; input.w_out.len()];
    let mut contributions = vec![0.0; assignments * width];
    let mut sorted_gate = vec![0.0; assignments];
    let tasks = Task::split(&saved.order, TASK_ROWS);
    let blocks = (tasks.iter())
        .zip(split_rows(&mut contributions, &tasks, width))
        .zip(split_rows(&mut sorted_gate, &tasks, 1))
        .zip(first_of_each_expert(&tasks, &mut w_in, &mut w_out, shape));
    let parts = parallel::map(blocks, |(((task, dx), dgate), weights)| {
        let mut scratch = Backward::new(shape);
        match weights {
            Some((w_in, w_out)) => {
                scratch.run(task, grad, input, saved, [dx, dgate, w_in, w_out]);
                None
            }
            None => {
                let mut w_in = vec![0.0; width * 2 * hidden];
                let mut w_out = vec![0.0; hidden * width];
                scratch.run(task, grad, input, saved, [dx, dgate, &mut w_in, &mut w_out]);
                Some((task.expert, w_in, w_out))
            }
        }
    });
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    let slots = w_in.chunks_mut(width * 2 * hidden).zip(w_out.chunks_mut(hidden * width)).enumerate();
    parallel::for_each(slots, |(expert, (w_in, w_out))| {
        for (_, part_in, part_out) in parts.iter().filter(|(of, ..)| *of == expert) {
            w_in.iter_mut().zip(part_in).for_each(|(total, part)| *total += part);
            w_out.iter_mut().zip(part_out).for_each(|(total, part)| *total += part);
        }
    });
    let gate = saved.place.iter().map(|&place| sorted_gate[place as usize]).collect();
    let x = combine(&contributions, &saved.place, active, width);
    ExpertsGradients { x, gate, w_in, w_out }
}

impl ExpertsShape {
    fn check(&self, input: &ExpertsInput<'_>) {
        let Self { experts, active, width, hidden } = *self;
        assert!(experts * active * width * hidden > 0, "experts: a size is 0 in {self:?}");
        let rows = input.choice.len() / active;
        assert_eq!(input.choice.len(), rows * active, "experts: {active} choices for each token");
        assert_eq!(input.gate.len(), rows * active, "experts: one gate for each choice");
        assert_eq!(input.x.len(), rows * width, "experts: {rows} tokens of width {width}");
        assert_eq!(input.w_in.len(), experts * width * 2 * hidden, "experts: w_in of another size");
        assert_eq!(input.w_out.len(), experts * hidden * width, "experts: w_out of another size");
        if let Some(at) = input.choice.iter().position(|&e| e as usize >= experts) {
            let (token, expert) = (at / active, input.choice[at]);
            panic!("experts: token {token} chose expert {expert} of {experts}");
        }
    }

    fn w_in<'a>(&self, input: &ExpertsInput<'a>, expert: usize) -> Matrix<'a> {
        let size = self.width * 2 * self.hidden;
        Matrix::new(&input.w_in[expert * size..][..size], self.width, 2 * self.hidden)
    }

    fn w_out<'a>(&self, input: &ExpertsInput<'a>, expert: usize) -> Matrix<'a> {
        let size = self.hidden * self.width;
        Matrix::new(&input.w_out[expert * size..][..size], self.hidden, self.width)
    }
}

/// Some of one expert's assignments.
struct Task {
    expert: usize,
    /// Their places in the sorted order.
    rows: Range<usize>,
}

impl Task {
    /// Splits all assignments into tasks of one expert and at most `limit` rows, in order.
    fn split(order: &Occurrences, limit: usize) -> Vec<Self> {
        let experts = order.starts.windows(2).enumerate();
        experts
            .flat_map(|(expert, bounds)| {
                let end = bounds[1];
                (bounds[0]..end)
                    .step_by(limit)
                    .map(move |start| Self { expert, rows: start..end.min(start + limit) })
            })
            .collect()
    }
}

/// The part of each task of a buffer that has `width` values for each assignment.
fn split_rows<'a>(mut buffer: &'a mut [f32], tasks: &[Task], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(tasks.len());
    for task in tasks {
        let (part, rest) = buffer.split_at_mut(task.rows.len() * width);
        parts.push(part);
        buffer = rest;
    }
    parts
}

/// An expert's weight gradients, in the task that is its first.
fn first_of_each_expert<'a>(
    tasks: &[Task],
    w_in: &'a mut [f32],
    w_out: &'a mut [f32],
    shape: ExpertsShape,
) -> Vec<Option<(&'a mut [f32], &'a mut [f32])>> {
    let size = shape.width * shape.hidden;
    let mut slots: Vec<_> = w_in.chunks_mut(2 * size).zip(w_out.chunks_mut(size)).map(Some).collect();
    tasks.iter().map(|task| slots[task.expert].take()).collect()
}

/// The place of each assignment in the sorted order.
fn places(order: &Occurrences) -> Vec<u32> {
    let mut places = vec![0; order.positions.len()];
    for (place, &assignment) in order.positions.iter().enumerate() {
        places[assignment as usize] = place as u32;
    }
    places
}

/// Appends the token rows of some assignments to `out`.
fn gather(rows: &[f32], assignments: &[u32], active: usize, width: usize, out: &mut Vec<f32>) {
    for &assignment in assignments {
        out.extend_from_slice(&rows[assignment as usize / active * width..][..width]);
    }
}

/// act = gate · silu(gate part) ∘ up part.
#[inline(always)]
fn activate(gate_up: &[f32], assignments: &[u32], gates: &[f32], hidden: usize, act: &mut [f32]) {
    let rows = gate_up.chunks_exact(2 * hidden).zip(act.chunks_exact_mut(hidden));
    for ((gate_up, act), &assignment) in rows.zip(assignments) {
        let weight = gates[assignment as usize];
        let (gate, up) = gate_up.split_at(hidden);
        for ((a, &g), &u) in act.iter_mut().zip(gate).zip(up) {
            *a = weight * g * sigmoid(g) * u;
        }
    }
}

/// Sums each token's `active` rows of `contributions`, in the order of its choices.
fn combine(contributions: &[f32], place: &[u32], active: usize, width: usize) -> Vec<f32> {
    let mut output = vec![0.0; place.len() / active * width];
    let block = block_rows((active + 1) * width);
    parallel::for_each(output.chunks_mut(block * width).zip(place.chunks(block * active)), |(out, place)| {
        vectorized(
            #[inline(always)]
            || {
                for (out, place) in out.chunks_exact_mut(width).zip(place.chunks_exact(active)) {
                    let row = |place: u32| &contributions[place as usize * width..][..width];
                    out.copy_from_slice(row(place[0]));
                    for &place in &place[1..] {
                        out.iter_mut().zip(row(place)).for_each(|(total, part)| *total += part);
                    }
                }
            },
        );
    });
    output
}

/// Scratch of a task of the backward pass, for one chunk of rows.
struct Backward {
    shape: ExpertsShape,
    x: Vec<f32>,
    grad: Vec<f32>,
    /// gate · a, for w_out's gradient.
    act: Vec<f32>,
    /// da, before the gate.
    act_grad: Vec<f32>,
    gate_up_grad: Vec<f32>,
}

impl Backward {
    fn new(shape: ExpertsShape) -> Self {
        Self {
            shape,
            x: Vec::new(),
            grad: Vec::new(),
            act: Vec::new(),
            act_grad: Vec::new(),
            gate_up_grad: Vec::new(),
        }
    }

    /// Fills the task's rows of dx and of the gates' gradient and its share of both weight gradients.
    fn run(
        &mut self,
        task: &Task,
        grad: &[f32],
        input: &ExpertsInput<'_>,
        saved: &ExpertsSaved,
        [dx, dgate, w_in, w_out]: [&mut [f32]; 4],
    ) {
        let ExpertsShape { active, width, hidden, .. } = self.shape;
        let chunks = dx.chunks_mut(CHUNK_ROWS * width).zip(dgate.chunks_mut(CHUNK_ROWS));
        for (index, (dx, dgate)) in chunks.enumerate() {
            let rows = dgate.len();
            let start = task.rows.start + index * CHUNK_ROWS;
            let assignments = &saved.order.positions[start..start + rows];
            let gate_up = &saved.gate_up[start * 2 * hidden..][..rows * 2 * hidden];
            self.x.clear();
            gather(input.x, assignments, active, width, &mut self.x);
            self.grad.clear();
            gather(grad, assignments, active, width, &mut self.grad);
            self.act.resize(rows * hidden, 0.0);
            self.act_grad.resize(rows * hidden, 0.0);
            self.gate_up_grad.resize(rows * 2 * hidden, 0.0);

            let grad = Matrix::new(&self.grad, rows, width);
            let act_grad = MatrixMut::new(&mut self.act_grad, rows, hidden);
            let w_out_transposed = self.shape.w_out(input, task.expert).transposed();
            multiply(1.0, grad, w_out_transposed, 0.0, act_grad, Threads::One);
            vectorized(
                #[inline(always)]
                || {
                    let (act, d) = (&mut self.act, &mut self.gate_up_grad);
                    activate_backward(gate_up, &self.act_grad, assignments, input.gate, hidden, act, d, dgate)
                },
            );
            let keep = if index == 0 { 0.0 } else { 1.0 };
            let act = Matrix::new(&self.act, rows, hidden).transposed();
            multiply(1.0, act, grad, keep, MatrixMut::new(w_out, hidden, width), Threads::One);
            let gate_up_grad = Matrix::new(&self.gate_up_grad, rows, 2 * hidden);
            let x = Matrix::new(&self.x, rows, width).transposed();
            multiply(1.0, x, gate_up_grad, keep, MatrixMut::new(w_in, width, 2 * hidden), Threads::One);
            let w_in_transposed = self.shape.w_in(input, task.expert).transposed();
            multiply(1.0, gate_up_grad, w_in_transposed, 0.0, MatrixMut::new(dx, rows, width), Threads::One);
        }
    }
}

/// From da of each row: gate·a, the gradient of the gate and up parts, and that of the gate.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the outputs are borrowed from different vectors")]
fn activate_backward(
    gate_up: &[f32],
    act_grad: &[f32],
    assignments: &[u32],
    gates: &[f32],
    hidden: usize,
    act: &mut [f32],
    gate_up_grad: &mut [f32],
    gate_grad: &mut [f32],
) {
    let rows = (gate_up.chunks_exact(2 * hidden).zip(act_grad.chunks_exact(hidden)))
        .zip(act.chunks_exact_mut(hidden).zip(gate_up_grad.chunks_exact_mut(2 * hidden)))
        .zip(assignments.iter().zip(gate_grad));
    for (((gate_up, da), (act, d)), (&assignment, dgate)) in rows {
        let weight = gates[assignment as usize];
        let (gate, up) = gate_up.split_at(hidden);
        let (d_gate_part, d_up) = d.split_at_mut(hidden);
        let parts = gate.iter().zip(up).zip(da).zip(act.iter_mut());
        for ((((&g, &u), &da), act), (dg, du)) in parts.zip(d_gate_part.iter_mut().zip(d_up)) {
            let s = sigmoid(g);
            let silu = g * s;
            *act = silu * u;
            *dg = weight * da * u * s * (1.0 + g * (1.0 - s));
            *du = weight * da * silu;
        }
        *dgate = dot(da, act);
        act.iter_mut().for_each(|a| *a *= weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    struct Case {
        x: Vec<f32>,
        choice: Vec<u32>,
        gate: Vec<f32>,
        w_in: Vec<f32>,
        w_out: Vec<f32>,
    }

    impl Case {
        /// Each token takes distinct experts among the first `used`.
        fn new(shape: ExpertsShape, rows: usize, used: usize, seed: u64) -> Self {
            let ExpertsShape { experts, active, width, hidden } = shape;
            let choice = random(rows, seed ^ 1)
                .iter()
                .flat_map(|r| {
                    let first = ((r + 1.0) * 0.5 * used as f32) as usize;
                    (0..active).map(move |k| ((first + k) % used) as u32)
                })
                .collect();
            Self {
                x: random(rows * width, seed ^ 2),
                choice,
                gate: random(rows * active, seed ^ 3),
                w_in: random(experts * width * 2 * hidden, seed ^ 4),
                w_out: random(experts * hidden * width, seed ^ 5),
            }
        }

        fn input(&self) -> ExpertsInput<'_> {
            ExpertsInput {
                x: &self.x,
                choice: &self.choice,
                gate: &self.gate,
                w_in: &self.w_in,
                w_out: &self.w_out,
            }
        }
    }

    /// Token by token, in f64.
    fn naive(input: &ExpertsInput<'_>, shape: ExpertsShape) -> Vec<f32> {
        let ExpertsShape { active, width, hidden, .. } = shape;
        let mut output = vec![0.0_f64; input.x.len()];
        for (assignment, (&expert, &gate)) in input.choice.iter().zip(input.gate).enumerate() {
            let token = assignment / active;
            let x = &input.x[token * width..][..width];
            let w_in =
                |i: usize, f: usize| f64::from(input.w_in[(expert as usize * width + i) * 2 * hidden + f]);
            let project = |f: usize| -> f64 { (0..width).map(|i| f64::from(x[i]) * w_in(i, f)).sum() };
            for f in 0..hidden {
                let (g, u) = (project(f), project(hidden + f));
                let act = f64::from(gate) * g / (1.0 + (-g).exp()) * u;
                for i in 0..width {
                    output[token * width + i] +=
                        act * f64::from(input.w_out[(expert as usize * hidden + f) * width + i]);
                }
            }
        }
        output.iter().map(|&v| v as f32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn forward_and_gradients(
            experts_ in 1_usize..7, active in 1_usize..4, rows in 0_usize..12,
            width in 1_usize..14, hidden in 1_usize..10, used in 1_usize..7, seed: u64,
        ) {
            let active = active.min(experts_);
            let used = used.clamp(active, experts_);
            let shape = ExpertsShape { experts: experts_, active, width, hidden };
            let case = Case::new(shape, rows, used, seed);
            let input = case.input();
            let forward = experts(&input, shape);
            assert_close(&forward.output, &naive(&input, shape), 1e-5);
            prop_assert_eq!((0..experts_).map(|e| forward.saved.load(e)).sum::<usize>(), rows * active);

            let grad = random(rows * width, seed ^ 6);
            let found = experts_backward(&grad, &input, shape, &forward.saved);
            let loss = |input: ExpertsInput<'_>| weighted(&experts(&input, shape).output, &grad);
            assert_gradient("x", &case.x, &found.x, |x| loss(ExpertsInput { x, ..input }));
            assert_gradient("gate", &case.gate, &found.gate, |gate| loss(ExpertsInput { gate, ..input }));
            assert_gradient("w_in", &case.w_in, &found.w_in, |w_in| loss(ExpertsInput { w_in, ..input }));
            assert_gradient("w_out", &case.w_out, &found.w_out, |w_out| {
                loss(ExpertsInput { w_out, ..input })
            });
            for expert in (0..experts_).filter(|&e| forward.saved.load(e) == 0) {
                let size = width * hidden;
                prop_assert!(found.w_in[expert * 2 * size..][..2 * size].iter().all(|&g| g == 0.0));
                prop_assert!(found.w_out[expert * size..][..size].iter().all(|&g| g == 0.0));
            }
        }
    }

    /// One expert has most tokens and is split into several tasks. The gradients are those of the experts' own tokens,
    /// independent of the tasks.
    #[test]
    fn an_overloaded_expert_is_exact_and_repeats_its_bits() {
        let shape = ExpertsShape { experts: 3, active: 1, width: 6, hidden: 5 };
        let rows = 2 * TASK_ROWS + CHUNK_ROWS + 77;
        let mut case = Case::new(shape, rows, 3, 11);
        case.choice = (0..rows).map(|i| if i % 40 == 0 { 2 } else { 0 }).collect();
        let input = case.input();
        let grad = random(rows * 6, 12);
        let forward = experts(&input, shape);
        let found = experts_backward(&grad, &input, shape, &forward.saved);
        assert_close(&forward.output, &naive(&input, shape), 1e-5);
        assert_eq!(forward.output, experts(&input, shape).output);
        assert_eq!(found, experts_backward(&grad, &input, shape, &forward.saved));

        let (mut w_in, mut w_out) = (vec![0.0; case.w_in.len()], vec![0.0; case.w_out.len()]);
        for start in (0..rows).step_by(100) {
            let tokens = start..rows.min(start + 100);
            let part = ExpertsInput {
                x: &case.x[tokens.start * 6..tokens.end * 6],
                choice: &case.choice[tokens.clone()],
                gate: &case.gate[tokens.clone()],
                ..input
            };
            let grad = &grad[tokens.start * 6..tokens.end * 6];
            let part = experts_backward(grad, &part, shape, &experts(&part, shape).saved);
            assert_close(&part.x, &found.x[tokens.start * 6..tokens.end * 6], 1e-5);
            w_in.iter_mut().zip(&part.w_in).for_each(|(total, part)| *total += part);
            w_out.iter_mut().zip(&part.w_out).for_each(|(total, part)| *total += part);
        }
        assert_close(&found.w_in, &w_in, 1e-3);
        assert_close(&found.w_out, &w_out, 1e-3);
        assert!(found.w_in[60..120].iter().all(|&g| g == 0.0)); // nobody chose expert 1
    }

    #[test]
    #[should_panic(expected = "token 1 chose expert 7 of 4")]
    fn refuses_an_expert_that_does_not_exist() {
        let shape = ExpertsShape { experts: 4, active: 2, width: 1, hidden: 1 };
        let mut case = Case::new(shape, 3, 4, 1);
        case.choice[3] = 7;
        experts(&case.input(), shape);
    }
}
