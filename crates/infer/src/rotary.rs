//! Rotary positions (RoPE, arXiv 2104.09864), for decoding: the angles of the rows of a step.
//!
//! Angles are computed when they are needed. A table of a long context would take more memory than a small model.

use engram_config::BlockRotary;
use engram_kernels::Angles;
use rayon::prelude::*;

use crate::cache::Place;

/// Cosines and sines of rows, `[rows, width/2]`.
#[derive(Debug)]
pub(crate) struct RowAngles {
    width: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RowAngles {
    /// Of the rows that stand at `places`.
    pub(crate) fn new(rotary: &BlockRotary, places: &[Place<'_>]) -> Self {
        let amplitude = f64::from(rotary.amplitude);
        let angles = places.iter().flat_map(|place| {
            rotary.frequencies.iter().map(move |frequency| place.position as f64 * frequency)
        });
        let turned = |angle: f64| ((amplitude * angle.cos()) as f32, (amplitude * angle.sin()) as f32);
        let (cos, sin) = angles.map(turned).unzip();
        Self { width: rotary.width, cos, sin }
    }

    /// Writes the vector `input` of row `row` to `output`, its first values turned.
    pub(crate) fn turn(&self, row: usize, input: &[f32], output: &mut [f32]) {
        let (turned, rest) = input.split_at(self.width);
        let (output, output_rest) = output.split_at_mut(self.width);
        Angles { cos: &self.cos, sin: &self.sin }.turn(row, turned, output);
        output_rest.copy_from_slice(rest);
    }

    /// Turns all heads of `x` `[rows, heads, head width]`.
    pub(crate) fn turn_heads(&self, x: &mut [f32], heads: usize) {
        let rows = 2 * self.cos.len() / self.width;
        if rows == 0 {
            return;
        }
        let head_width = x.len() / rows / heads;
        let of_row = heads * head_width;
        // Whole rows, of some ten thousand values together.
        let rows = (1_usize << 14).div_ceil(of_row);
        x.par_chunks_mut(rows * of_row).enumerate().for_each(|(block, x)| {
            let mut turned = vec![0.0; self.width];
            for (row, heads) in x.chunks_exact_mut(of_row).enumerate() {
                for head in heads.chunks_exact_mut(head_width) {
                    let head = &mut head[..self.width];
                    self.turn(block * rows + row, head, &mut turned);
                    head.copy_from_slice(&turned);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More rows than one thread takes at once.
    #[test]
    fn every_row_is_turned_by_its_own_angles() {
        let (rows, heads, head_width, width) = (3000, 2, 6, 4);
        let angle = |index: usize| index as f32 * 0.1;
        let angles = RowAngles {
            width,
            cos: (0..rows * width / 2).map(|index| angle(index).cos()).collect(),
            sin: (0..rows * width / 2).map(|index| angle(index).sin()).collect(),
        };
        let x: Vec<f32> = (0..rows * heads * head_width).map(|index| (index as f32).sin()).collect();
        let mut all = x.clone();
        angles.turn_heads(&mut all, heads);
        let mut expected = vec![0.0; head_width];
        for (head, (x, found)) in x.chunks(head_width).zip(all.chunks(head_width)).enumerate() {
            angles.turn(head / heads, x, &mut expected);
            assert_eq!(found, expected, "head {head}");
        }
    }
}
