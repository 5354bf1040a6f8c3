//! The Engram module (arXiv 2601.07372, section 2.3), for decoding.
//!
//! The short convolution looks a few positions back. What it sees there, the normalised u of every stream, is the
//! value that all streams share times one number of each stream, and so that is what the cache keeps: a stream's
//! width and a few numbers, not as much as all streams.

use engram_config::{Gate, GateForm, MemoryConfig, MemoryForm, ModelConfig};
use engram_kernels::{MemoryGateInput, PackedMatrix, memory_gate};

use crate::cache::{Cache, Place};
use crate::rows;
use crate::sigmoid_gate::sigmoid_gate;
use crate::weights::{Loader, WeightError};

/// Reads one layer's memory into the residual streams.
#[derive(Debug)]
pub(crate) struct GatedMemory {
    /// Keys, where there are gates.
    gates: Option<Gates>,
    /// `[d_mem, width]`
    value: PackedMatrix,
    /// `[width]`; zeros in V4.1's form.
    value_bias: Vec<f32>,
    /// Whether rows of zero read nothing: the value has no bias.
    silent: bool,
    convolution: Option<Convolution>,
    streams: usize,
    width: usize,
}

/// What decides how far the memory is read: G gates, one for each stream or one for all.
#[derive(Debug)]
struct Gates {
    count: usize,
    /// `[d_mem, G · width]`
    key: PackedMatrix,
    /// `[G · width]`; zeros in V4.1's form.
    key_bias: Vec<f32>,
    form: Form,
}

/// What a gate computes of a query and a key.
#[derive(Debug)]
enum Form {
    /// The published gate, with the weights of its norms, `[G, width]` each.
    SignedRoot {
        query_norm: Vec<f32>,
        key_norm: Vec<f32>,
        epsilon: f32,
    },
    Sigmoid,
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

impl GatedMemory {
    /// `part` is where in the cache the convolution's past is kept, if there is one.
    pub(crate) fn load(
        loader: &Loader<'_>,
        memory: &MemoryConfig,
        model: &ModelConfig,
        part: usize,
    ) -> Result<Self, WeightError> {
        let (streams, width, inputs) = (model.streams(), model.width, memory.width());
        let count = match memory.gate {
            Gate::PerStream => streams,
            Gate::Shared => 1,
            Gate::None => 0,
        };
        let keys = count * width;
        let paper = memory.form == MemoryForm::Paper;
        let projection = loader.child("projection");
        let (key, value, [key_bias, value_bias]) = if paper {
            let key = (count > 0).then(|| projection.matrix("key", inputs, keys)).transpose()?;
            let key_bias = if count > 0 { projection.vector("key_bias", keys)? } else { Vec::new() };
            let value = projection.matrix("value", inputs, width)?;
            (key, value, [key_bias, projection.vector("value_bias", width)?])
        } else {
            let both = loader.values("projection", &[inputs, keys + width])?;
            let columns = |first: usize, count: usize| -> Vec<f32> {
                both.chunks_exact(keys + width).flat_map(|row| &row[first..first + count]).copied().collect()
            };
            let key = (count > 0).then(|| loader.computed(&columns(0, keys), inputs, keys));
            let value = loader.computed(&columns(keys, width), inputs, width);
            (key, value, [vec![0.0; keys], vec![0.0; width]])
        };
        let norms = loader.child("norms");
        let form = || -> Result<Form, WeightError> {
            if memory.gate_form == GateForm::Sigmoid {
                return Ok(Form::Sigmoid);
            }
            let query_norm = norms.values("query", &[count, width])?;
            // V4.1 keeps only the product of both.
            let key_norm = if paper { norms.values("key", &[count, width])? } else { vec![1.0; keys] };
            let epsilon = if paper { PAPER_EPSILON } else { V41_EPSILON };
            Ok(Form::SignedRoot { query_norm, key_norm, epsilon })
        };
        let gates = key.map(|key| Ok(Gates { count, key, key_bias, form: form()? }));
        let convolution = memory
            .has_convolution()
            .then(|| Convolution::load(&loader.child("convolution"), memory, [streams, width], part));
        Ok(Self {
            gates: gates.transpose()?,
            value,
            silent: value_bias.iter().all(|&bias| bias == 0.0),
            value_bias,
            convolution: convolution.transpose()?,
            streams,
            width,
        })
    }

    /// Values kept of a position, if any are.
    pub(crate) fn entry(&self) -> Option<usize> {
        self.convolution.as_ref().map(|_| self.width + self.streams)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.value.bytes() + self.gates.as_ref().map_or(0, |gates| gates.key.bytes())
    }

    /// Adds to the streams `x` `[rows, streams · width]`, at the rows `on`, what the memory has for them: `e` `[on, d_mem]`
    /// are their memory rows. Gives all rows' gates `[rows, streams]`: 1 where the memory has none, and 0 at the other
    /// rows.
    ///
    /// Where all of a token's rows are zero and the value has no bias, nothing is read and the gate is 0: the token is
    /// computed as without a memory, bit for bit, but for what a convolution still sees of tokens before.
    pub(crate) fn add(
        &self,
        x: &mut [f32],
        e: &[f32],
        places: &[Place<'_>],
        on: &[usize],
        cache: &mut Cache,
    ) -> Vec<f32> {
        let all = self.streams * self.width;
        let mut of_rows = vec![0.0; places.len() * self.streams];
        if on.is_empty() {
            return of_rows;
        }
        let inputs = self.value.inputs();
        let reads = |index: &usize| !self.silent || e[index * inputs..][..inputs].iter().any(|&v| v != 0.0);
        let read: Vec<usize> = (0..on.len()).filter(reads).collect();
        let reading: Vec<usize> = read.iter().map(|&index| on[index]).collect();
        let e = rows::select(e, inputs, read.iter().copied());
        let (value, (gates, mut y)) = if reading.is_empty() {
            (Vec::new(), (Vec::new(), Vec::new()))
        } else {
            let value = biased(self.value.product(&e), &self.value_bias);
            let gated = self.gated(x, &e, &value, &reading);
            (value, gated)
        };
        if let Some(convolution) = &self.convolution {
            y = self.convolved(convolution, (&read, on), (&value, &gates, y), places, cache);
            add_to_rows(x, &y, on, all);
        } else {
            add_to_rows(x, &y, &reading, all);
        }
        for (&row, gates) in reading.iter().zip(gates.chunks_exact(self.streams)) {
            of_rows[row * self.streams..][..self.streams].copy_from_slice(gates);
        }
        of_rows
    }

    /// Keeps what the convolution will see of the rows `on`, and adds what it sees at each: `[on, streams · width]`.
    /// `value`, `gates` and `y` are those of `read`, the places in `on` of rows that read something.
    fn convolved(
        &self,
        convolution: &Convolution,
        (read, on): (&[usize], &[usize]),
        (value, gates, y): (&[f32], &[f32], Vec<f32>),
        places: &[Place<'_>],
        cache: &mut Cache,
    ) -> Vec<f32> {
        let all = self.streams * self.width;
        let mut of_on = vec![0.0; on.len() * all];
        let (no_value, no_gates) = (vec![0.0; self.width], vec![0.0; self.streams]);
        let mut next = 0;
        for (index, &row) in on.iter().enumerate() {
            if read.get(next) == Some(&index) {
                let value = &value[next * self.width..][..self.width];
                let gates = &gates[next * self.streams..][..self.streams];
                convolution.keep(places[row], value, gates, cache);
                of_on[index * all..][..all].copy_from_slice(&y[next * all..][..all]);
                next += 1;
            } else {
                convolution.keep(places[row], &no_value, &no_gates, cache);
            }
        }
        for (y, &row) in of_on.chunks_exact_mut(all).zip(on) {
            convolution.add(y, places[row], self.width, cache);
        }
        of_on
    }

    /// The gate of every stream `[on, streams]`, and the value times it `[on, streams · width]`.
    fn gated(&self, x: &[f32], e: &[f32], value: &[f32], on: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let (streams, width, all) = (self.streams, self.width, self.streams * self.width);
        let Some(gates) = &self.gates else {
            return (vec![1.0; on.len() * streams], rows::repeat(value, width, streams));
        };
        let mut hidden = rows::select(x, all, on.iter().copied());
        if gates.count != streams {
            hidden = hidden.chunks_exact(all).flat_map(|row| mean_of_streams(row, streams)).collect();
        }
        let key = biased(gates.key.product(e), &gates.key_bias);
        let (found, y) = match &gates.form {
            Form::Sigmoid => sigmoid_gate(&hidden, &key, value, width),
            Form::SignedRoot { query_norm, key_norm, epsilon } => {
                let gated = memory_gate(&MemoryGateInput {
                    hidden: &hidden,
                    key: &key,
                    value,
                    query_weight: query_norm,
                    key_weight: key_norm,
                    streams: gates.count,
                    epsilon: *epsilon,
                });
                (gated.gates, gated.output)
            }
        };
        let each = streams / gates.count;
        if each == 1 {
            return (found, y);
        }
        let y = rows::repeat(&y, width, each);
        (found.iter().flat_map(|&gate| std::iter::repeat_n(gate, each)).collect(), y)
    }
}

impl Convolution {
    fn load(
        loader: &Loader<'_>,
        memory: &MemoryConfig,
        [streams, width]: [usize; 2],
        part: usize,
    ) -> Result<Self, WeightError> {
        let kernel = memory.kernel;
        let norm = loader.values("norm", &[streams, width])?;
        let filter = loader.values("weight", &[streams, width, kernel])?;
        let taps = (0..kernel).flat_map(|tap| {
            norm.iter().zip(filter.iter().skip(tap).step_by(kernel)).map(|(norm, weight)| norm * weight)
        });
        Ok(Self { taps: taps.collect(), kernel, dilation: memory.max_order, part })
    }

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

/// The mean of a row's streams `[streams, width]`.
fn mean_of_streams(row: &[f32], streams: usize) -> Vec<f32> {
    let width = row.len() / streams;
    (0..width).map(|i| row.iter().skip(i).step_by(width).sum::<f32>() / streams as f32).collect()
}

/// Adds `bias` to every row.
fn biased(mut rows: Vec<f32>, bias: &[f32]) -> Vec<f32> {
    for row in rows.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
    }
    rows
}

/// Adds `y` `[on, all]` to the rows `on` of `x`. A zero adds nothing, not even to a zero's sign.
fn add_to_rows(x: &mut [f32], y: &[f32], on: &[usize], all: usize) {
    for (&row, y) in on.iter().zip(y.chunks_exact(all)) {
        for (x, &y) in x[row * all..][..all].iter_mut().zip(y) {
            *x = if y == 0.0 { *x } else { *x + y };
        }
    }
}
