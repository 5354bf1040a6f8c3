//! A plain gate without norms and weights, for decoding: `σ(⟨h, k⟩/√width)`.

/// Gates `[rows, G]`, and the value times each `[rows, G · width]`, from queries and keys of that shape and a value
/// `[rows, width]`.
pub(crate) fn sigmoid_gate(hidden: &[f32], key: &[f32], value: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let pairs = hidden.chunks_exact(width).zip(key.chunks_exact(width));
    let score = |(h, k): (&[f32], &[f32])| h.iter().zip(k).map(|(h, k)| h * k).sum::<f32>();
    let gate = |score: f32| 1.0 / (1.0 + (-score / (width as f32).sqrt()).exp());
    let gates: Vec<f32> = pairs.map(|pair| gate(score(pair))).collect();
    let per_row = gates.len() / (value.len() / width);
    let rows = gates.chunks_exact(per_row).zip(value.chunks_exact(width));
    let scaled = rows.flat_map(|(gates, value)| {
        gates.iter().flat_map(move |gate| value.iter().map(move |value| gate * value))
    });
    let scaled = scaled.collect();
    (gates, scaled)
}
