//! Rows selected from a table, with a backward pass that is parallel.
//!
//! On a GPU the backward pass of Burn's own `select` walks over the selected rows one after another, each column on a
//! thread of its own, because one row may be selected many times: half a million memory slots are half a million steps
//! in a row. Here the gradients of each row are added in pairs, then the sums in pairs, and so on: as many steps as the
//! commonest row's count has binary digits. Every step only reads from places known beforehand, so that sums come out
//! the same every time.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::function::{self, Function};
use crate::host::{column, int};

/// Rows `ids` of `table`, `[rows, width]` to `[ids, width]`.
pub(crate) fn select(table: Tensor<2>, ids: Arc<[u32]>) -> Tensor<2> {
    let rows = table.dims()[0];
    function::apply(Selection { ids, rows }, table)
}

/// What is selected of how many rows.
#[derive(Debug, Clone)]
struct Selection {
    ids: Arc<[u32]>,
    rows: usize,
}

impl Function<2> for Selection {
    type Kept = ();

    fn forward(&self, table: Tensor<2>) -> (Tensor<2>, ()) {
        let ids = int(&self.ids, &table.device());
        (table.select(0, ids), ())
    }

    fn backward(&self, (): (), gradient: Tensor<2>) -> Tensor<2> {
        sums_by_id(gradient, &self.ids, self.rows)
    }
}

/// For every id below `rows` the sum of the `values`, `[ids, width]`, that stand where it does: `[rows, width]`.
fn sums_by_id(mut values: Tensor<2>, ids: &[u32], rows: usize) -> Tensor<2> {
    let device = values.device();
    let (mut places, mut counts) = sorted(ids, rows);
    while counts.iter().any(|&count| count > 1) {
        let pairs = Pairs::of(&places, &counts);
        let first = values.clone().select(0, int(&pairs.first, &device));
        let second = values.select(0, int(&pairs.second, &device));
        values = first + second * column(&pairs.paired, &device);
        counts.iter_mut().for_each(|count| *count = count.div_ceil(2));
        places = (0..pairs.first.len() as u32).collect();
    }
    let mut places = places.into_iter();
    let there: Vec<bool> = counts.iter().map(|&count| count == 1).collect();
    let of_rows: Vec<u32> =
        there.iter().map(|&there| if there { places.next().unwrap_or_default() } else { 0 }).collect();
    let sums = values.select(0, int(&of_rows, &device));
    if there.iter().all(|&there| there) { sums } else { sums * column(&there, &device) }
}

/// The places of `ids` in the order of ids, and how often each id below `rows` occurs.
fn sorted(ids: &[u32], rows: usize) -> (Vec<u32>, Vec<u32>) {
    let mut counts = vec![0_u32; rows];
    ids.iter().for_each(|&id| counts[id as usize] += 1);
    let mut next: Vec<u32> = counts
        .iter()
        .scan(0, |sum, count| {
            let first = *sum;
            *sum += count;
            Some(first)
        })
        .collect();
    let mut places = vec![0; ids.len()];
    for (place, &id) in (0..).zip(ids) {
        let next = &mut next[id as usize];
        places[*next as usize] = place;
        *next += 1;
    }
    (places, counts)
}

/// Two and two of the places of each id; where one is left over, it stands on both sides, but is not paired.
struct Pairs {
    first: Vec<u32>,
    second: Vec<u32>,
    paired: Vec<bool>,
}

impl Pairs {
    /// Pairs of `places`, of which the first ids have `counts`.
    fn of(places: &[u32], counts: &[u32]) -> Self {
        let most = places.len();
        let mut pairs = Self {
            first: Vec::with_capacity(most),
            second: Vec::with_capacity(most),
            paired: Vec::with_capacity(most),
        };
        let mut left = places;
        for &count in counts {
            let (of_id, rest) = left.split_at(count as usize);
            for pair in of_id.chunks(2) {
                pairs.first.push(pair[0]);
                pairs.second.push(pair[pair.len() - 1]);
                pairs.paired.push(pair.len() == 2);
            }
            left = rest;
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::values;
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;

    proptest! {
        /// Whole numbers, so that sums are exact in any order.
        #[test]
        fn a_row_gets_the_gradients_of_all_its_places(
            ids in prop::collection::vec(0_u32..7, 1..60),
            width in 1_usize..4,
        ) {
            let device = Device::flex().autodiff();
            let numbers = |count: usize| -> Vec<f32> { (0..count).map(|i| (i * 7 % 31) as f32).collect() };
            let table = Tensor::<2>::from_data(TensorData::new(numbers(7 * width), [7, width]), &device);
            let table = table.require_grad();
            let factor = numbers(ids.len() * width);
            let factors = TensorData::new(factor.clone(), [ids.len(), width]);
            let selected = select(table.clone(), ids.clone().into());
            let gradients = (selected.clone() * Tensor::from_data(factors, &device)).sum().backward();
            let found = values(table.grad(&gradients).unwrap());
            let (mut sums, rows) = (vec![0.0; 7 * width], values(selected.inner()));
            for (place, &id) in ids.iter().enumerate() {
                for column in 0..width {
                    sums[id as usize * width + column] += factor[place * width + column];
                    prop_assert_eq!(rows[place * width + column], numbers(7 * width)[id as usize * width + column]);
                }
            }
            prop_assert_eq!(found, sums);
        }
    }
}
