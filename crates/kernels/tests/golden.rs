//! Compares memory gate and short convolution with the published demonstration of Engram's module: output and every
//! gradient, for random weights.
//!
//! The files in `tests/golden` hold what the published code computed (PyTorch, f32).

#![allow(clippy::unwrap_used, reason = "all of this is a test")]

use engram_kernels::{
    MemoryGateInput, ShortConvolutionShape, ShortConvolutionWeights, memory_gate, memory_gate_backward,
    short_convolution, short_convolution_backward,
};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::Path;

const GATE_EPSILON: f32 = f32::EPSILON;
const CONVOLUTION_EPSILON: f32 = 1e-5;

/// The tensors of one layer, by the rest of their names.
struct Layer {
    shapes: HashMap<String, Vec<usize>>,
    floats: HashMap<String, Vec<f32>>,
    integers: HashMap<String, Vec<i64>>,
}

impl Layer {
    fn read(file: &SafeTensors<'_>, prefix: &str) -> Self {
        let mut layer = Self { shapes: HashMap::new(), floats: HashMap::new(), integers: HashMap::new() };
        for (name, view) in file.tensors() {
            let Some(name) = name.strip_prefix(prefix) else { continue };
            layer.shapes.insert(name.to_string(), view.shape().to_vec());
            let bytes = view.data();
            match view.dtype() {
                Dtype::F32 => {
                    let values = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    layer.floats.insert(name.to_string(), values);
                }
                Dtype::I64 => {
                    let values = bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
                    layer.integers.insert(name.to_string(), values);
                }
                other => panic!("{name} has the type {other:?}"),
            }
        }
        layer
    }

    fn get(&self, name: &str) -> &[f32] {
        self.floats.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// One tensor for each stream, one after another.
    fn streams(&self, streams: usize, name: impl Fn(usize) -> String) -> Vec<f32> {
        (0..streams).flat_map(|m| self.get(&name(m)).to_vec()).collect()
    }
}

/// x·Wᵀ + b for x `[rows, inputs]`, W `[outputs, inputs]` (as PyTorch stores it).
fn project(x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let inputs = weight.len() / bias.len();
    let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
    let outputs = |x: &[f32]| -> Vec<f32> {
        weight.chunks(inputs).zip(bias).map(|(w, &b)| (f64::from(b) + dot(w, x)) as f32).collect()
    };
    x.chunks(inputs).flat_map(outputs).collect()
}

/// Gradients of [`project`]: of the weight and of the bias; adds that of x to `dx`.
fn project_backward(
    grad: &[f32],
    x: &[f32],
    weight: &[f32],
    outputs: usize,
    dx: &mut [f64],
) -> [Vec<f32>; 2] {
    let inputs = weight.len() / outputs;
    let (mut dw, mut db) = (vec![0.0_f64; weight.len()], vec![0.0_f64; outputs]);
    for (row, (grad, x)) in grad.chunks(outputs).zip(x.chunks(inputs)).enumerate() {
        for (o, &g) in grad.iter().enumerate() {
            db[o] += f64::from(g);
            for i in 0..inputs {
                dw[o * inputs + i] += f64::from(g) * f64::from(x[i]);
                dx[row * inputs + i] += f64::from(g) * f64::from(weight[o * inputs + i]);
            }
        }
    }
    [dw, db].map(|values| values.iter().map(|&v| v as f32).collect())
}

#[track_caller]
fn check(name: &str, found: &[f32], expected: &[f32]) {
    check_within(1.0, name, found, expected);
}

/// Compares with `factor` times 1e-5 + 1e-4·|expected|.
#[track_caller]
fn check_within(factor: f32, name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= factor * (1e-5 + 1e-4 * e.abs()), "{name}[{i}]: {f}, published code {e}");
    }
}

/// How far gradients may be that a score passes on, in tolerances.
#[derive(Clone, Copy)]
struct NearZero {
    keys: f32,
    rows: f32,
}

/// For files whose scores are not near 0.
const USUAL: NearZero = NearZero { keys: 2.0, rows: 1.0 };

/// Where a score is near 0 its root is steep and amplifies f32's rounding. `module_n3_conv` has a score of -0.00227. From
/// keys that are exact but for their last bit, PyTorch's f32 and ours both give it with an error of 1.6e-7; the published
/// keys have errors that happen to cancel it. So gradients are up to 3.5 tolerances from the published ones, which are up
/// to 1.4 from the same formulas in f64.
const STEEP: NearZero = NearZero { keys: 4.0, rows: 2.0 };

fn check_layer(layer: &Layer, dilation: usize, near_zero: NearZero) {
    let [batch, time, streams, width]: [usize; 4] = layer.shapes["hidden_in"][..].try_into().unwrap();
    let kernel = layer.shapes["param.short_conv.conv.weight"][2];
    let rows = batch * time;

    // The rows each token looks up, side by side.
    let ids = &layer.integers["unique_row_ids"];
    let row_width = layer.shapes["unique_rows"][1];
    let index: Vec<usize> =
        layer.integers["row_ids"].iter().map(|id| ids.binary_search(id).unwrap()).collect();
    let memory: Vec<f32> = index
        .iter()
        .flat_map(|&row| layer.get("unique_rows")[row * row_width..][..row_width].to_vec())
        .collect();

    let parameter = |name: &str| layer.get(&format!("param.{name}"));
    let value = project(&memory, parameter("value_proj.weight"), parameter("value_proj.bias"));
    let keys: Vec<Vec<f32>> = (0..streams)
        .map(|m| {
            let part = |part: &str| parameter(&format!("key_projs.{m}.{part}"));
            project(&memory, part("weight"), part("bias"))
        })
        .collect();
    let key: Vec<f32> =
        (0..rows).flat_map(|r| keys.iter().flat_map(move |k| k[r * width..][..width].to_vec())).collect();

    let key_weight = layer.streams(streams, |m| format!("param.norm1.{m}.weight"));
    let query_weight = layer.streams(streams, |m| format!("param.norm2.{m}.weight"));
    let input = MemoryGateInput {
        hidden: layer.get("hidden_in"),
        key: &key,
        value: &value,
        query_weight: &query_weight,
        key_weight: &key_weight,
        streams,
        epsilon: GATE_EPSILON,
    };
    let gate = memory_gate(&input);
    let norm = layer.streams(streams, |m| format!("param.short_conv.norms.{m}.weight"));
    let weights = ShortConvolutionWeights { norm: &norm, filter: parameter("short_conv.conv.weight") };
    let shape =
        ShortConvolutionShape { time, streams, width, kernel, dilation, epsilon: CONVOLUTION_EPSILON };
    let convolution = short_convolution(&gate.output, weights, shape);
    check("out", &convolution.output, layer.get("out"));

    let grad = layer.get("grad_out");
    let d = short_convolution_backward(grad, &gate.output, weights, shape, &convolution.inverse_rms);
    check("conv.weight", &d.filter, layer.get("grad.short_conv.conv.weight"));
    check("conv norms", &d.norm, &layer.streams(streams, |m| format!("grad.short_conv.norms.{m}.weight")));
    let d = memory_gate_backward(&d.input, &input, &gate);
    check("norm1", &d.key_weight, &layer.streams(streams, |m| format!("grad.norm1.{m}.weight")));
    check("norm2", &d.query_weight, &layer.streams(streams, |m| format!("grad.norm2.{m}.weight")));
    check("hidden", &d.hidden, layer.get("grad_hidden"));

    let mut dmemory = vec![0.0; memory.len()];
    let weight = parameter("value_proj.weight");
    let [dw, db] = project_backward(&d.value, &memory, weight, width, &mut dmemory);
    check("value weight", &dw, layer.get("grad.value_proj.weight"));
    check("value bias", &db, layer.get("grad.value_proj.bias"));
    for m in 0..streams {
        let dkey: Vec<f32> =
            (0..rows).flat_map(|r| d.key[(r * streams + m) * width..][..width].to_vec()).collect();
        let weight = parameter(&format!("key_projs.{m}.weight"));
        let [dw, db] = project_backward(&dkey, &memory, weight, width, &mut dmemory);
        check_within(near_zero.keys, "key weight", &dw, layer.get(&format!("grad.key_projs.{m}.weight")));
        check_within(near_zero.keys, "key bias", &db, layer.get(&format!("grad.key_projs.{m}.bias")));
    }
    let mut drows = vec![0.0; layer.get("unique_rows").len()];
    for (&row, part) in index.iter().zip(dmemory.chunks(row_width)) {
        drows[row * row_width..][..row_width].iter_mut().zip(part).for_each(|(total, part)| *total += part);
    }
    let drows: Vec<f32> = drows.iter().map(|&v| v as f32).collect();
    check_within(near_zero.rows, "rows", &drows, layer.get("grad_unique_rows"));
}

fn check_file(path: &Path, near_zero: NearZero) {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    let dilation: usize = metadata["max_ngram_size"].parse().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let layers: Vec<usize> =
        metadata["layer_ids"].trim_matches(['[', ']']).split(", ").map(|id| id.parse().unwrap()).collect();
    for layer in layers {
        check_layer(&Layer::read(&file, &format!("layer{layer}.")), dilation, near_zero);
        println!("{}: layer {layer} agrees", path.display());
    }
}

#[test]
fn agrees_with_the_published_module() {
    let files = [("module_n3_conv_zero", USUAL), ("module_n3_conv", STEEP), ("module_n4_seed7", USUAL)];
    for (name, near_zero) in files {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.safetensors"));
        check_file(&path, near_zero);
    }
}
