//! Causal attention that never stores its probabilities (Dao et al. 2022, arXiv 2205.14135), plain
//! and as multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
//!
//! Each (sequence, head) is a task. It computes [`QUERIES`] queries at a time against the keys up to the last of them,
//! [`KEYS`] keys at a time, so one block of scores stays in the second-level cache. The forward pass keeps only the
//! logarithm of each row's sum of exponentials. From it, the backward pass recomputes the probabilities of a block.

use crate::heads::{self, HeadMut};
use crate::parallel;
use crate::product::{Matrix, MatrixMut, Threads, multiply, transpose};
use crate::rotary::Angles;
use crate::simd::{self, vectorized};

/// Queries per block of scores.
const QUERIES: usize = 64;
/// Keys per block of scores: a multiple of [`QUERIES`], so that every row of a block sees a key.
const KEYS: usize = 512;

/// Sizes of [`causal_attention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head's query and key.
    pub key: usize,
    /// Width of a head's value.
    pub value: usize,
}

/// Sizes of [`latent_attention`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub time: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the part of a head's query and key that carries no position.
    pub content: usize,
    /// Width of the part that rotary embedding turns; its key is shared by all heads.
    pub rotary: usize,
    /// Width of a head's value.
    pub value: usize,
}

impl LatentShape {
    /// The plain attention after concatenating queries and keys.
    fn assembled(self) -> AttentionShape {
        let Self { batch, time, heads, content, rotary, value } = self;
        AttentionShape { batch, time, heads, key: content + rotary, value }
    }
}

/// What attention computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// `[batch, time, heads, value]`.
    pub output: Vec<f32>,
    /// `[batch, heads, time]`: logarithm of each query's sum of exponentials, for the backward pass.
    pub log_sum_exp: Vec<f32>,
}

/// The parts of an [`Attention`] that its backward pass reads.
#[derive(Debug, Clone, Copy)]
pub struct AttentionOutput<'a> {
    /// `[batch, time, heads, value]`: the output.
    pub output: &'a [f32],
    /// `[batch, heads, time]`: see [`Attention::log_sum_exp`].
    pub log_sum_exp: &'a [f32],
}

impl Attention {
    /// What the backward pass reads.
    pub fn view(&self) -> AttentionOutput<'_> {
        AttentionOutput { output: &self.output, log_sum_exp: &self.log_sum_exp }
    }
}

/// Gradients of [`causal_attention`]'s inputs, in their shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionGradients {
    /// `[batch, time, heads, key]`.
    pub q: Vec<f32>,
    /// `[batch, time, heads, key]`.
    pub k: Vec<f32>,
    /// `[batch, time, heads, value]`.
    pub v: Vec<f32>,
}

/// Gradients of [`latent_attention`]'s inputs, in their shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentGradients {
    /// `[batch, time, heads, content + rotary]`.
    pub q: Vec<f32>,
    /// `[batch, time, heads, content + value]`.
    pub kv: Vec<f32>,
    /// `[batch, time, rotary]`.
    pub k_rotary: Vec<f32>,
}

/// softmax(scale · q·kᵀ, over the keys up to the query's position) · v, for each head.
///
/// `q`, `k`: `[batch, time, heads, key]`; `v`: `[batch, time, heads, value]`.
///
/// # Panics
/// When a size is 0, `scale` is not positive, or a slice does not have the stated shape.
pub fn causal_attention(q: &[f32], k: &[f32], v: &[f32], shape: AttentionShape, scale: f32) -> Attention {
    check_plain(q, k, v, shape);
    forward(
        shape,
        scale,
        #[inline(always)]
        |batch, head, operands| load_plain(q, k, v, shape, batch, head, operands),
    )
}

/// Gradients of [`causal_attention`], given `grad` `[batch, time, heads, value]` of its output and
/// what it returned.
///
/// # Panics
/// As [`causal_attention`].
pub fn causal_attention_backward(
    grad: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    attention: AttentionOutput<'_>,
    shape: AttentionShape,
    scale: f32,
) -> AttentionGradients {
    check_plain(q, k, v, shape);
    let AttentionShape { time, heads, key, value, .. } = shape;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let targets = (HeadMut::split(&mut dq, time, heads, key).into_iter())
        .zip(HeadMut::split(&mut dk, time, heads, key))
        .zip(HeadMut::split(&mut dv, time, heads, value));
    backward(
        shape,
        scale,
        grad,
        attention,
        targets,
        #[inline(always)]
        |batch, head, operands| load_plain(q, k, v, shape, batch, head, operands),
        #[inline(always)]
        |((mut dq, mut dk), mut dv), gradients| {
            for t in 0..time {
                dq.row(t).copy_from_slice(&gradients.q[t * key..][..key]);
                dk.row(t).copy_from_slice(&gradients.k[t * key..][..key]);
                dv.row(t).copy_from_slice(&gradients.v[t * value..][..value]);
            }
        },
    );
    AttentionGradients { q: dq, k: dk, v: dv }
}

/// Attention over keys and values expanded from a latent, with rotary positions on separate widths.
///
/// * `q` `[batch, time, heads, content + rotary]`: each head's content query, then its rotary query,
///   not yet turned.
/// * `kv` `[batch, time, heads, content + value]`: each head's content key, then its value.
/// * `k_rotary` `[batch, time, rotary]`: the rotary key, shared by the heads, not yet turned.
/// * `angles` `[time, rotary/2]`.
///
/// Equals [`causal_attention`] of the concatenated queries and keys after [`rotary`](crate::rotary).
///
/// # Panics
/// When a size other than `rotary` is 0, `scale` is not positive, or a slice does not have the stated shape.
pub fn latent_attention(
    q: &[f32],
    kv: &[f32],
    k_rotary: &[f32],
    angles: Angles<'_>,
    shape: LatentShape,
    scale: f32,
) -> Attention {
    let inputs = Latent { q, kv, k_rotary, angles, shape };
    inputs.check();
    forward(
        shape.assembled(),
        scale,
        #[inline(always)]
        |batch, head, operands| inputs.load(batch, head, operands),
    )
}

/// Gradients of [`latent_attention`], given `grad` `[batch, time, heads, value]` of its output and
/// what it returned.
///
/// # Panics
/// As [`latent_attention`].
#[expect(clippy::too_many_arguments, reason = "the inputs of the forward pass and what it returned")]
pub fn latent_attention_backward(
    grad: &[f32],
    q: &[f32],
    kv: &[f32],
    k_rotary: &[f32],
    angles: Angles<'_>,
    attention: AttentionOutput<'_>,
    shape: LatentShape,
    scale: f32,
) -> LatentGradients {
    let inputs = Latent { q, kv, k_rotary, angles, shape };
    inputs.check();
    let LatentShape { time, heads, content, rotary, value, .. } = shape;
    let (key, packed) = (content + rotary, content + value);
    let (mut dq, mut dkv) = (vec![0.0; q.len()], vec![0.0; kv.len()]);
    // [batch, heads, time, rotary], still turned: each head's share of the shared key's gradient.
    let mut shares = vec![0.0; k_rotary.len() * heads];
    let targets = (HeadMut::split(&mut dq, time, heads, key).into_iter())
        .zip(HeadMut::split(&mut dkv, time, heads, packed))
        .zip(pieces_mut(&mut shares, time * rotary, shape.batch * heads));
    backward(
        shape.assembled(),
        scale,
        grad,
        attention,
        targets,
        #[inline(always)]
        |batch, head, operands| inputs.load(batch, head, operands),
        #[inline(always)]
        |((mut dq, mut dkv), share), gradients| {
            for t in 0..time {
                let (source, target) = (&gradients.q[t * key..][..key], dq.row(t));
                target[..content].copy_from_slice(&source[..content]);
                angles.turn_back(t, &source[content..], &mut target[content..]);
                let (source, target) = (&gradients.k[t * key..][..key], dkv.row(t));
                target[..content].copy_from_slice(&source[..content]);
                target[content..].copy_from_slice(&gradients.v[t * value..][..value]);
                share[t * rotary..][..rotary].copy_from_slice(&source[content..]);
            }
        },
    );
    LatentGradients { q: dq, kv: dkv, k_rotary: sum_shares(&shares, angles, shape) }
}

/// Adds the heads' shares `[batch, heads, time, rotary]` in order and turns the sum back.
fn sum_shares(shares: &[f32], angles: Angles<'_>, shape: LatentShape) -> Vec<f32> {
    let LatentShape { batch, time, heads, rotary, .. } = shape;
    let sequence = time * rotary;
    let mut dk = vec![0.0; batch * sequence];
    if rotary == 0 {
        return dk;
    }
    let sequences = dk.chunks_exact_mut(sequence).zip(shares.chunks_exact(heads * sequence));
    parallel::for_each(sequences, |(dk, shares)| {
        let mut total = shares[..sequence].to_vec();
        for share in shares[sequence..].chunks_exact(sequence) {
            for (t, s) in total.iter_mut().zip(share) {
                *t += s;
            }
        }
        for t in 0..time {
            angles.turn_back(t, &total[t * rotary..][..rotary], &mut dk[t * rotary..][..rotary]);
        }
    });
    dk
}

/// `count` consecutive pieces of `len` values, which may be 0.
fn pieces_mut(mut data: &mut [f32], len: usize, count: usize) -> Vec<&mut [f32]> {
    let mut pieces = Vec::with_capacity(count);
    for _ in 0..count {
        let (piece, rest) = data.split_at_mut(len);
        pieces.push(piece);
        data = rest;
    }
    pieces
}

/// One head's concatenated operands: `q`, `k` `[time, key]`, `v` `[time, value]`.
struct Operands {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Operands {
    fn new(shape: AttentionShape) -> Self {
        let AttentionShape { time, key, value, .. } = shape;
        Self { q: vec![0.0; time * key], k: vec![0.0; time * key], v: vec![0.0; time * value] }
    }
}

fn check_plain(q: &[f32], k: &[f32], v: &[f32], shape: AttentionShape) {
    let AttentionShape { batch, time, heads, key, value } = shape;
    let rows = batch * time * heads;
    assert_eq!(q.len(), rows * key, "attention: queries are not [batch, time, heads, key] of {shape:?}");
    assert_eq!(k.len(), rows * key, "attention: keys are not [batch, time, heads, key] of {shape:?}");
    assert_eq!(v.len(), rows * value, "attention: values are not [batch, time, heads, value] of {shape:?}");
}

#[inline(always)]
fn load_plain(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    shape: AttentionShape,
    batch: usize,
    head: usize,
    operands: &mut Operands,
) {
    let AttentionShape { time, heads, key, value, .. } = shape;
    for (source, target, width) in
        [(q, &mut operands.q, key), (k, &mut operands.k, key), (v, &mut operands.v, value)]
    {
        let sequence = &source[batch * time * heads * width..][..time * heads * width];
        for (t, target) in target.chunks_exact_mut(width).enumerate() {
            target.copy_from_slice(heads::row(sequence, heads, width, t, head));
        }
    }
}

/// The inputs of latent attention.
struct Latent<'a> {
    q: &'a [f32],
    kv: &'a [f32],
    k_rotary: &'a [f32],
    angles: Angles<'a>,
    shape: LatentShape,
}

impl Latent<'_> {
    fn check(&self) {
        let LatentShape { batch, time, heads, content, rotary, value } = self.shape;
        let shape = self.shape;
        let rows = batch * time * heads;
        self.angles.check(time, rotary);
        let (key, packed) = (content + rotary, content + value);
        assert_eq!(
            self.q.len(),
            rows * key,
            "latent attention: q is not [.., content + rotary] of {shape:?}"
        );
        assert_eq!(
            self.kv.len(),
            rows * packed,
            "latent attention: kv is not [.., content + value] of {shape:?}"
        );
        let shared = batch * time * rotary;
        assert_eq!(
            self.k_rotary.len(),
            shared,
            "latent attention: k_rotary is not [.., rotary] of {shape:?}"
        );
    }

    /// Concatenates one head's queries and keys and rotates the rotary parts.
    #[inline(always)]
    fn load(&self, batch: usize, head: usize, operands: &mut Operands) {
        let LatentShape { time, heads, content, rotary, value, .. } = self.shape;
        let (key, packed) = (content + rotary, content + value);
        let q = &self.q[batch * time * heads * key..][..time * heads * key];
        let kv = &self.kv[batch * time * heads * packed..][..time * heads * packed];
        let k_rotary = &self.k_rotary[batch * time * rotary..][..time * rotary];
        for t in 0..time {
            let (source, target) = (heads::row(q, heads, key, t, head), &mut operands.q[t * key..][..key]);
            target[..content].copy_from_slice(&source[..content]);
            self.angles.turn(t, &source[content..], &mut target[content..]);
            let (source, target) =
                (heads::row(kv, heads, packed, t, head), &mut operands.k[t * key..][..key]);
            target[..content].copy_from_slice(&source[..content]);
            self.angles.turn(t, &k_rotary[t * rotary..][..rotary], &mut target[content..]);
            operands.v[t * value..][..value].copy_from_slice(&source[content..]);
        }
    }
}

/// Attention of every head, whose operands `load(batch, head, operands)` fills.
fn forward(
    shape: AttentionShape,
    scale: f32,
    load: impl Fn(usize, usize, &mut Operands) + Send + Sync,
) -> Attention {
    let AttentionShape { batch, time, heads, key, value } = shape;
    assert!(batch * time * heads * key * value > 0, "attention: a size of {shape:?} is 0");
    assert!(scale > 0.0, "attention: scale {scale} is not positive");
    let mut output = vec![0.0; batch * time * heads * value];
    let mut log_sum_exp = vec![0.0; batch * heads * time];
    let targets = HeadMut::split(&mut output, time, heads, value).into_iter();
    let tasks = targets.zip(log_sum_exp.chunks_exact_mut(time)).enumerate();
    parallel::for_each(tasks, |(index, (mut target, log_sum_exp))| {
        let mut operands = Operands::new(shape);
        vectorized(
            #[inline(always)]
            || load(index / heads, index % heads, &mut operands),
        );
        let mut output = vec![0.0; time * value];
        forward_head(&operands, shape, scale, &mut output, log_sum_exp);
        for (t, row) in output.chunks_exact(value).enumerate() {
            target.row(t).copy_from_slice(row);
        }
    });
    Attention { output, log_sum_exp }
}

/// Attention of one head: `output` `[time, value]`, `log_sum_exp` `[time]`.
fn forward_head(
    operands: &Operands,
    shape: AttentionShape,
    scale: f32,
    output: &mut [f32],
    log_sum_exp: &mut [f32],
) {
    let AttentionShape { time, key, value, .. } = shape;
    let keys = transpose(&operands.k, time, key);
    let mut scores = vec![0.0; QUERIES.min(time) * KEYS.min(time)];
    for first_query in (0..time).step_by(QUERIES) {
        let queries = QUERIES.min(time - first_query);
        let output = &mut output[first_query * value..][..queries * value];
        let mut rows = [Row::EMPTY; QUERIES];
        for first_key in (0..first_query + queries).step_by(KEYS) {
            let block = Block { first_query, queries, first_key, time };
            let n = block.keys();
            let scores = &mut scores[..queries * n];
            block.scores(&operands.q, &keys, key, scores);
            vectorized(
                #[inline(always)]
                || block.exponentiate(scale, scores, &mut rows, output),
            );
            let values = Matrix::new(&operands.v[first_key * value..], n, value);
            let kept = if first_key == 0 { 0.0 } else { 1.0 };
            let target = MatrixMut::new(output, queries, value);
            multiply(1.0, Matrix::new(scores, queries, n), values, kept, target, Threads::One);
        }
        let rows = output.chunks_exact_mut(value).zip(&rows).zip(&mut log_sum_exp[first_query..]);
        for ((output, row), log_sum_exp) in rows {
            let inverse = 1.0 / row.sum;
            output.iter_mut().for_each(|v| *v *= inverse);
            *log_sum_exp = row.max + row.sum.ln();
        }
    }
}

/// A query's running maximum of scaled scores, and sum of exponentials relative to it.
#[derive(Clone, Copy)]
struct Row {
    max: f32,
    sum: f32,
}

impl Row {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// A rectangle of the score matrix of one head.
#[derive(Clone, Copy)]
struct Block {
    first_query: usize,
    queries: usize,
    first_key: usize,
    time: usize,
}

impl Block {
    /// Keys of the block: up to the last query, at most [`KEYS`].
    fn keys(self) -> usize {
        KEYS.min(self.first_query + self.queries - self.first_key)
    }

    /// How many of the block's keys query number `row` sees: at least one.
    #[inline(always)]
    fn visible(self, row: usize) -> usize {
        self.keys().min(self.first_query + row + 1 - self.first_key)
    }

    /// `scores` `[queries, keys]` = q · kᵀ, unscaled. `keys` is `[key, time]`.
    fn scores(self, q: &[f32], keys: &[f32], key: usize, scores: &mut [f32]) {
        let n = self.keys();
        let q = Matrix::new(&q[self.first_query * key..], self.queries, key);
        let keys = Matrix::strided(&keys[self.first_key..], key, n, self.time);
        multiply(1.0, q, keys, 0.0, MatrixMut::new(scores, self.queries, n), Threads::One);
    }

    /// Turns scores into exponentials relative to each row's maximum so far, and rescales the sums of earlier blocks in
    /// `rows` and `output` to the same maximum.
    #[inline(always)]
    fn exponentiate(self, scale: f32, scores: &mut [f32], rows: &mut [Row; QUERIES], output: &mut [f32]) {
        let value = output.len() / self.queries;
        let lines = scores.chunks_exact_mut(self.keys()).zip(rows).zip(output.chunks_exact_mut(value));
        for (index, ((scores, row), output)) in lines.enumerate() {
            let (seen, hidden) = scores.split_at_mut(self.visible(index));
            let max = row.max.max(scale * simd::max(seen));
            let sum = simd::exp_in_place(seen, scale, max);
            hidden.fill(0.0);
            let kept = simd::exp(row.max - max);
            *row = Row { max, sum: row.sum * kept + sum };
            if self.first_key > 0 {
                output.iter_mut().for_each(|v| *v *= kept);
            }
        }
    }

    /// Turns scores into probabilities, given the logarithm of every query's sum.
    #[inline(always)]
    fn probabilities(self, scale: f32, scores: &mut [f32], log_sum_exp: &[f32]) {
        let lines = scores.chunks_exact_mut(self.keys()).zip(log_sum_exp);
        for (index, (scores, &log_sum_exp)) in lines.enumerate() {
            let (seen, hidden) = scores.split_at_mut(self.visible(index));
            simd::exp_in_place(seen, scale, log_sum_exp);
            hidden.fill(0.0);
        }
    }
}

/// Gradients of every head: `store(target, gradients)` for each of `targets`, in (batch, head) order.
fn backward<T: Send>(
    shape: AttentionShape,
    scale: f32,
    grad: &[f32],
    attention: AttentionOutput<'_>,
    targets: impl Iterator<Item = T>,
    load: impl Fn(usize, usize, &mut Operands) + Send + Sync,
    store: impl Fn(T, &Operands) + Send + Sync,
) {
    let AttentionShape { batch, time, heads, value, .. } = shape;
    let size = batch * time * heads * value;
    assert_eq!(grad.len(), size, "attention: the gradient is not [batch, time, heads, value] of {shape:?}");
    assert_eq!(attention.output.len(), size, "attention: the output is not [batch, time, heads, value]");
    assert_eq!(
        attention.log_sum_exp.len(),
        batch * heads * time,
        "attention: one log_sum_exp for each query"
    );
    let tasks = targets.zip(attention.log_sum_exp.chunks_exact(time)).enumerate();
    parallel::for_each(tasks, |(index, (target, log_sum_exp))| {
        let (batch, head) = (index / heads, index % heads);
        let mut operands = Operands::new(shape);
        let mut gradients = Operands::new(shape);
        let mut upstream = Upstream { grad: vec![0.0; time * value], mean: vec![0.0; time] };
        vectorized(
            #[inline(always)]
            || {
                load(batch, head, &mut operands);
                upstream.load(grad, attention.output, shape, batch, head);
            },
        );
        backward_head(&operands, &upstream, log_sum_exp, shape, scale, &mut gradients);
        vectorized(
            #[inline(always)]
            || store(target, &gradients),
        );
    });
}

/// One head's gradient from above.
struct Upstream {
    /// `[time, value]`.
    grad: Vec<f32>,
    /// `[time]`: grad · output, which is the mean of the probabilities' gradients under them.
    mean: Vec<f32>,
}

impl Upstream {
    #[inline(always)]
    fn load(&mut self, grad: &[f32], output: &[f32], shape: AttentionShape, batch: usize, head: usize) {
        let AttentionShape { time, heads, value, .. } = shape;
        let sequence = batch * time * heads * value..(batch + 1) * time * heads * value;
        let (grad, output) = (&grad[sequence.clone()], &output[sequence]);
        for t in 0..time {
            let grad = heads::row(grad, heads, value, t, head);
            self.grad[t * value..][..value].copy_from_slice(grad);
            self.mean[t] = simd::dot(grad, heads::row(output, heads, value, t, head));
        }
    }
}

/// Gradients of one head's operands. With P the probabilities and G the upstream gradient:
/// dV = Pᵀ·G, dS = P ∘ (G·Vᵀ − mean), dQ = scale · dS·K, dK = scale · dSᵀ·Q.
fn backward_head(
    operands: &Operands,
    upstream: &Upstream,
    log_sum_exp: &[f32],
    shape: AttentionShape,
    scale: f32,
    gradients: &mut Operands,
) {
    let AttentionShape { time, key, value, .. } = shape;
    let (keys, values) = (transpose(&operands.k, time, key), transpose(&operands.v, time, value));
    let size = QUERIES.min(time) * KEYS.min(time);
    let (mut probabilities, mut slopes) = (vec![0.0; size], vec![0.0; size]);
    for first_query in (0..time).step_by(QUERIES) {
        let queries = QUERIES.min(time - first_query);
        let own = first_query..first_query + queries;
        let grad = Matrix::new(&upstream.grad[first_query * value..], queries, value);
        let q = Matrix::new(&operands.q[first_query * key..], queries, key);
        for first_key in (0..first_query + queries).step_by(KEYS) {
            let block = Block { first_query, queries, first_key, time };
            let n = block.keys();
            let (probabilities, slopes) = (&mut probabilities[..queries * n], &mut slopes[..queries * n]);
            block.scores(&operands.q, &keys, key, probabilities);
            let values = Matrix::strided(&values[first_key..], value, n, time);
            multiply(1.0, grad, values, 0.0, MatrixMut::new(slopes, queries, n), Threads::One);
            vectorized(
                #[inline(always)]
                || {
                    block.probabilities(scale, probabilities, &log_sum_exp[own.clone()]);
                    score_slopes(probabilities, slopes, &upstream.mean[own.clone()]);
                },
            );
            let probabilities = Matrix::new(probabilities, queries, n);
            let dv = MatrixMut::new(&mut gradients.v[first_key * value..], n, value);
            multiply(1.0, probabilities.transposed(), grad, 1.0, dv, Threads::One);
            let slopes = Matrix::new(slopes, queries, n);
            let dq = MatrixMut::new(&mut gradients.q[first_query * key..], queries, key);
            multiply(
                scale,
                slopes,
                Matrix::new(&operands.k[first_key * key..], n, key),
                1.0,
                dq,
                Threads::One,
            );
            let dk = MatrixMut::new(&mut gradients.k[first_key * key..], n, key);
            multiply(scale, slopes.transposed(), q, 1.0, dk, Threads::One);
        }
    }
}

/// Turns the probabilities' gradients in `slopes` into those of the scores.
#[inline(always)]
fn score_slopes(probabilities: &[f32], slopes: &mut [f32], mean: &[f32]) {
    let n = slopes.len() / mean.len();
    let lines = slopes.chunks_exact_mut(n).zip(probabilities.chunks_exact(n)).zip(mean);
    for ((slopes, probabilities), &mean) in lines {
        for (s, &p) in slopes.iter_mut().zip(probabilities) {
            *s = p * (*s - mean);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotary;
    use crate::rotary::tests::table;
    use crate::testing::{assert_close, assert_gradient, random, weighted};
    use proptest::prelude::*;

    /// Attention as its definition states it, in f64.
    fn naive(q: &[f32], k: &[f32], v: &[f32], shape: AttentionShape, scale: f32) -> Attention {
        let AttentionShape { batch, time, heads, key, value } = shape;
        let mut output = vec![0.0; v.len()];
        let mut log_sum_exp = Vec::new();
        let at = |data: &[f32], b: usize, t: usize, h: usize, width: usize, i: usize| {
            f64::from(data[((b * time + t) * heads + h) * width + i])
        };
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            for t in 0..time {
                let weights: Vec<f64> = (0..=t)
                    .map(|s| (0..key).map(|i| at(q, b, t, h, key, i) * at(k, b, s, h, key, i)).sum::<f64>())
                    .map(|score| (score * f64::from(scale)).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                log_sum_exp.push(total.ln() as f32);
                for i in 0..value {
                    let mixed: f64 = (0..=t).map(|s| weights[s] * at(v, b, s, h, value, i)).sum();
                    output[((b * time + t) * heads + h) * value + i] = (mixed / total) as f32;
                }
            }
        }
        Attention { output, log_sum_exp }
    }

    fn plain_inputs(shape: AttentionShape, seed: u64) -> [Vec<f32>; 4] {
        let AttentionShape { batch, time, heads, key, value } = shape;
        let rows = batch * time * heads;
        [(key, 1), (key, 2), (value, 3), (value, 4)].map(|(width, i)| random(rows * width, seed ^ i))
    }

    fn check_plain_gradients(shape: AttentionShape, seed: u64) {
        let [q, k, v, grad] = plain_inputs(shape, seed);
        let found = causal_attention(&q, &k, &v, shape, 0.7);
        let expected = naive(&q, &k, &v, shape, 0.7);
        assert_close(&found.output, &expected.output, 1e-5);
        assert_close(&found.log_sum_exp, &expected.log_sum_exp, 1e-5);
        let gradients = causal_attention_backward(&grad, &q, &k, &v, found.view(), shape, 0.7);
        let loss =
            |q: &[f32], k: &[f32], v: &[f32]| weighted(&causal_attention(q, k, v, shape, 0.7).output, &grad);
        assert_gradient("q", &q, &gradients.q, |q| loss(q, &k, &v));
        assert_gradient("k", &k, &gradients.k, |k| loss(&q, k, &v));
        assert_gradient("v", &v, &gradients.v, |v| loss(&q, &k, v));
    }

    proptest! {
        #[test]
        fn plain(
            batch in 1_usize..3, time in 1_usize..12, heads in 1_usize..4,
            key in 1_usize..20, value in 1_usize..20, seed: u64,
        ) {
            check_plain_gradients(AttentionShape { batch, time, heads, key, value }, seed);
        }

        #[test]
        fn latent_is_plain_attention_on_assembled_operands(
            batch in 1_usize..3, time in 1_usize..12, heads in 1_usize..4,
            content in 1_usize..12, half in 0_usize..6, value in 1_usize..12, seed: u64,
        ) {
            check_latent(LatentShape { batch, time, heads, content, rotary: 2 * half, value }, seed);
        }
    }

    #[test]
    fn more_than_one_block_of_queries_and_of_keys() {
        for time in [QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 17, KEYS + QUERIES + 3] {
            check_plain_gradients(AttentionShape { batch: 1, time, heads: 2, key: 5, value: 3 }, time as u64);
        }
        check_latent(LatentShape { batch: 2, time: KEYS + 70, heads: 2, content: 8, rotary: 4, value: 8 }, 9);
    }

    /// Latent attention equals plain attention of operands concatenated by hand, and its gradients equal finite
    /// differences.
    fn check_latent(shape: LatentShape, seed: u64) {
        let LatentShape { batch, time, heads, content, rotary: turned, value } = shape;
        let rows = batch * time * heads;
        let q = random(rows * (content + turned), seed ^ 1);
        let kv = random(rows * (content + value), seed ^ 2);
        let k_rotary = random(batch * time * turned, seed ^ 3);
        let grad = random(rows * value, seed ^ 4);
        let (cos, sin) = table(time, turned);
        let angles = Angles { cos: &cos, sin: &sin };

        let (mut whole_q, mut whole_k, mut whole_v) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..rows {
            let (t, q, kv) = (
                row / heads % time,
                &q[row * (content + turned)..][..content + turned],
                &kv[row * (content + value)..][..content + value],
            );
            let turn = |x: &[f32]| {
                if turned == 0 {
                    return Vec::new();
                }
                let half = turned / 2;
                let angles = Angles { cos: &cos[t * half..][..half], sin: &sin[t * half..][..half] };
                rotary(x, angles, 1, turned)
            };
            whole_q.extend_from_slice(&q[..content]);
            whole_q.extend(turn(&q[content..]));
            whole_k.extend_from_slice(&kv[..content]);
            whole_k.extend(turn(&k_rotary[row / heads * turned..][..turned]));
            whole_v.extend_from_slice(&kv[content..]);
        }
        let found = latent_attention(&q, &kv, &k_rotary, angles, shape, 0.6);
        assert_eq!(found, causal_attention(&whole_q, &whole_k, &whole_v, shape.assembled(), 0.6));

        let gradients =
            latent_attention_backward(&grad, &q, &kv, &k_rotary, angles, found.view(), shape, 0.6);
        let loss = |q: &[f32], kv: &[f32], k_rotary: &[f32]| {
            weighted(&latent_attention(q, kv, k_rotary, angles, shape, 0.6).output, &grad)
        };
        assert_gradient("q", &q, &gradients.q, |q| loss(q, &kv, &k_rotary));
        assert_gradient("kv", &kv, &gradients.kv, |kv| loss(&q, kv, &k_rotary));
        assert_gradient("k_rotary", &k_rotary, &gradients.k_rotary, |k| loss(&q, &kv, k));
    }

    #[test]
    fn same_bits_twice() {
        let shape = LatentShape { batch: 3, time: 130, heads: 4, content: 32, rotary: 16, value: 32 };
        let rows = shape.batch * shape.time * shape.heads;
        let (q, kv, grad) = (random(rows * 48, 1), random(rows * 64, 2), random(rows * 32, 3));
        let k_rotary = random(shape.batch * shape.time * 16, 4);
        let (cos, sin) = table(shape.time, 16);
        let angles = Angles { cos: &cos, sin: &sin };
        let run = || {
            let found = latent_attention(&q, &kv, &k_rotary, angles, shape, 0.1);
            let gradients =
                latent_attention_backward(&grad, &q, &kv, &k_rotary, angles, found.view(), shape, 0.1);
            (found, gradients)
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let shape = AttentionShape { batch: 1, time: 3, heads: 1, key: 1, value: 1 };
        let found = causal_attention(&[1e4; 3], &[0.0, 1e4, -1e4], &[1.0, 2.0, 3.0], shape, 1.0);
        assert_eq!(found.output, [1.0, 2.0, 2.0]);
    }

    #[test]
    fn a_nan_is_not_hidden() {
        let shape = AttentionShape { batch: 1, time: 20, heads: 1, key: 1, value: 1 };
        let mut k = [0.5; 20];
        k[10] = f32::NAN;
        let found = causal_attention(&[1.0; 20], &k, &[1.0; 20], shape, 1.0).output;
        assert!(found[..10].iter().all(|v| *v == 1.0) && found[10..].iter().all(|v| v.is_nan()), "{found:?}");
    }
}
