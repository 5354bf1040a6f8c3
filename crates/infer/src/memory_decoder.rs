//! The Engram module (arXiv 2601.07372, section 2.3), for decoding.
//!
//! The short convolution looks a few positions back. What it sees there, the normalised u of every stream, is the
//! value that all streams share times one number of each stream, and so that is what the cache keeps: a stream's
//! width and a few numbers, not as much as all streams.

use engram_config::{MemoryConfig, MemoryForm, ModelConfig};
use engram_kernels::{MemoryGateInput, PackedMatrix, WeightFormat, memory_gate};
use engram_model::{Memory, Projection};

use crate::cache::{Cache, Place};
use crate::weights::values;

/// Reads one layer's memory into the residual streams.
#[derive(Debug)]
pub(crate) struct MemoryDecoder {
    /// `[d_mem, streams · width]`
    key: PackedMatrix,
    /// `[d_mem, width]`
    value: PackedMatrix,
    /// `[streams · width]`, `[width]`; zeros in V4.1's form.
    key_bias: Vec<f32>,
    value_bias: Vec<f32>,
    /// `[streams, width]`
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    epsilon: f32,
    convolution: Option<Convolution>,
    streams: usize,
    width: usize,
}

/// The short convolution over time.
#[derive(Debug)]
struct Convolution {
    /// Filter times norm weight, `[kernel, streams, width]`, the oldest position first.
    taps: Vec<f32>,
    kernel: usize,
    dilation: usize,
    /// Part of the cache that keeps a position's value `[width]` and its factors `[streams]`.
    part: usize,
}

/// f32 machine epsilon, in the gate's norms of the demonstration code.
const PAPER_EPSILON: f32 = f32::EPSILON;
/// Epsilon of the gate's norms in V4.1.
const V41_EPSILON: f32 = 1e-20;
/// Epsilon of the norm before the convolution.
const CONVOLUTION_EPSILON: f32 = 1e-5;

impl MemoryDecoder {
    /// Of a memory that [departs](MemoryConfig::departs) from neither published form.
    ///
    /// `part` is where in the cache the convolution's past is kept, if there is one.
    pub(crate) fn new(
        memory: &Memory,
        config: &MemoryConfig,
        model: &ModelConfig,
        part: usize,
        format: WeightFormat,
    ) -> Self {
        let (streams, width, inputs) = (model.streams(), model.width, config.width());
        let keys = streams * width;
        let (key, value, key_bias, value_bias) = match &memory.projection {
            Projection::Separate(separate) => (
                values(&separate.key),
                values(&separate.value),
                values(&separate.key_bias),
                values(&separate.value_bias),
            ),
            Projection::Fused(weight) => {
                let both = values(weight);
                let columns = |first: usize, count: usize| -> Vec<f32> {
                    both.chunks_exact(keys + width)
                        .flat_map(|row| &row[first..first + count])
                        .copied()
                        .collect()
                };
                (columns(0, keys), columns(keys, width), vec![0.0; keys], vec![0.0; width])
            }
            Projection::Value(_) => unreachable!("a memory of a published form has keys"),
        };
        let Some(norms) = &memory.norms else { unreachable!("a memory of a published form has gates") };
        let query_norm = values(&norms.query);
        let key_norm = norms.key.as_ref().map_or_else(|| vec![1.0; query_norm.len()], values);
        let convolution = memory.convolution.as_ref().map(|convolution| {
            let (norm, filter) = (values(&convolution.norm), values(&convolution.weight));
            let kernel = config.kernel;
            let taps = (0..kernel).flat_map(|tap| {
                norm.iter().zip(filter.iter().skip(tap).step_by(kernel)).map(|(norm, weight)| norm * weight)
            });
            Convolution { taps: taps.collect(), kernel, dilation: config.max_order, part }
        });
        Self {
            key: PackedMatrix::new(&key, inputs, keys, format),
            value: PackedMatrix::new(&value, inputs, width, format),
            key_bias,
            value_bias,
            query_norm,
            key_norm,
            epsilon: if config.form == MemoryForm::V41 { V41_EPSILON } else { PAPER_EPSILON },
            convolution,
            streams,
            width,
        }
    }

    /// Values kept of a position, if any are.
    pub(crate) fn entry(&self) -> Option<usize> {
        self.convolution.as_ref().map(|_| self.width + self.streams)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.key.bytes() + self.value.bytes()
    }

    /// Adds to the streams `x` `[rows, streams · width]`, at the rows `on`, what the memory has for them: `e`
    /// `[on, d_mem]` are their memory rows. Gives all rows' gates `[rows, streams]`.
    pub(crate) fn add(
        &self,
        x: &mut [f32],
        e: &[f32],
        on: &[usize],
        places: &[Place<'_>],
        cache: &mut Cache,
    ) -> Vec<f32> {
        let all = self.streams * self.width;
        let mut gates = vec![0.0; places.len() * self.streams];
        if on.is_empty() {
            return gates;
        }
        let hidden: Vec<f32> = on.iter().flat_map(|&row| &x[row * all..][..all]).copied().collect();
        let key = biased(self.key.product(e), &self.key_bias);
        let value = biased(self.value.product(e), &self.value_bias);
        let gated = memory_gate(&MemoryGateInput {
            hidden: &hidden,
            key: &key,
            value: &value,
            query_weight: &self.query_norm,
            key_weight: &self.key_norm,
            streams: self.streams,
            epsilon: self.epsilon,
        });
        let mut y = gated.output;
        if let Some(convolution) = &self.convolution {
            for (index, &row) in on.iter().enumerate() {
                let value = &value[index * self.width..][..self.width];
                let gates = &gated.gates[index * self.streams..][..self.streams];
                convolution.keep(places[row], value, gates, cache);
            }
            for (y, &row) in y.chunks_exact_mut(all).zip(on) {
                convolution.add(y, places[row], self.width, cache);
            }
        }
        let rows = on.iter().zip(y.chunks_exact(all)).zip(gated.gates.chunks_exact(self.streams));
        for ((&row, y), of_row) in rows {
            x[row * all..][..all].iter_mut().zip(y).for_each(|(x, y)| *x += y);
            gates[row * self.streams..][..self.streams].copy_from_slice(of_row);
        }
        gates
    }
}

impl Convolution {
    /// Keeps a position's value v, and for each stream a/rms(a·v).
    fn keep(&self, place: Place<'_>, value: &[f32], gates: &[f32], cache: &mut Cache) {
        let square = value.iter().map(|v| v * v).sum::<f32>() / value.len() as f32;
        let entry = cache.position_mut(place.pages, self.part, place.position);
        let (kept, factors) = entry.split_at_mut(value.len());
        kept.copy_from_slice(value);
        for (factor, gate) in factors.iter_mut().zip(gates) {
            *factor = gate / (gate * gate * square + CONVOLUTION_EPSILON).sqrt();
        }
    }

    /// Adds the silu of the convolution at `place` to `y` `[streams, width]`.
    fn add(&self, y: &mut [f32], place: Place<'_>, width: usize, cache: &Cache) {
        let mut sums = vec![0.0; y.len()];
        for (tap, weights) in self.taps.chunks_exact(y.len()).enumerate() {
            let back = (self.kernel - 1 - tap) * self.dilation;
            let Some(position) = place.position.checked_sub(back) else { continue };
            let (value, factors) = cache.position(place.pages, self.part, position).split_at(width);
            let streams = sums.chunks_exact_mut(width).zip(weights.chunks_exact(width)).zip(factors);
            for ((sums, weights), factor) in streams {
                for ((sum, weight), value) in sums.iter_mut().zip(weights).zip(value) {
                    *sum += weight * (factor * value);
                }
            }
        }
        y.iter_mut().zip(&sums).for_each(|(y, sum)| *y += sum / (1.0 + (-sum).exp()));
    }
}

/// Adds `bias` to every row.
fn biased(mut rows: Vec<f32>, bias: &[f32]) -> Vec<f32> {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
    rows
}
