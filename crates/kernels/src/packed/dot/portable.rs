//! A group is unpacked to a tile, which is then multiplied: for processors without an unpacking kernel here.
//!
//! Without instructions for bytes and fused multiply-add, this is slow and gives the same bits.

use crate::packed::PANEL;
use crate::packed::layout::{COLUMNS, Kind, QUAD, QUADS, Scales};
use crate::packed::line::Line;
use crate::packed::rounded_rows::RoundedGroup;

/// Lines of the largest tile.
const TILE_LINES: usize = 24;

/// Adds to `sums` the products of rows with the columns of `records`.
pub(super) fn add<K: Kind>(records: &[Line], rows: &[&[RoundedGroup]], sums: &mut [[f32; PANEL]]) {
    add_with::<K>(records, rows, sums, exact);
}

/// Like [`add`], with a given multiplication of the whole numbers of 16 columns of a tile (all of a group, or the half
/// whose index comes next).
#[inline(always)]
pub(super) fn add_with<K: Kind>(
    records: &[Line],
    rows: &[&[RoundedGroup]],
    sums: &mut [[f32; PANEL]],
    exact: impl Fn(&[Line], std::ops::Range<usize>, usize, &RoundedGroup) -> [i32; COLUMNS],
) {
    let (layout, tile_layout) = (K::LAYOUT, K::LAYOUT.tile());
    let mut tile = [Line::ZERO; TILE_LINES];
    let tile = &mut tile[..tile_layout.lines()];
    let quads = QUADS / layout.halves;
    for (index, record) in records.chunks_exact(K::LINES).enumerate() {
        for group in 0..layout.groups {
            layout.unpack(record, group, tile);
            for (row, sums) in rows.iter().zip(&mut *sums) {
                let x = &row[index * layout.groups + group];
                for half in 0..layout.halves {
                    for v in 0..PANEL / COLUMNS {
                        let exact = exact(&tile[v..], half * quads..(half + 1) * quads, half, x);
                        add_scaled::<K>(tile, half, v, x, &exact, &mut sums[v * COLUMNS..][..COLUMNS]);
                    }
                }
            }
        }
    }
}

fn exact(tile: &[Line], quads: std::ops::Range<usize>, half: usize, x: &RoundedGroup) -> [i32; COLUMNS] {
    let mut exact = [x.corrections[half]; COLUMNS];
    for quad in quads {
        let numbers = tile[quad * (PANEL / COLUMNS)].0.as_chunks::<QUAD>().0;
        for (exact, numbers) in exact.iter_mut().zip(numbers) {
            for (&number, &x) in numbers.iter().zip(&x.values[quad]) {
                *exact += i32::from(number) * i32::from(x);
            }
        }
    }
    exact
}

#[inline(always)]
fn add_scaled<K: Kind>(
    tile: &[Line],
    half: usize,
    v: usize,
    x: &RoundedGroup,
    exact: &[i32; COLUMNS],
    sums: &mut [f32],
) {
    let layout = K::LAYOUT.tile();
    let scales = &tile[layout.scales_at() + 2 * half + v];
    for (column, (sum, &exact)) in sums.iter_mut().zip(exact).enumerate() {
        *sum = (exact as f32).mul_add(scales.f32(column) * x.scale, *sum);
    }
    if layout.minima != Scales::None {
        let minima = &tile[layout.minima_at() + 2 * half + v];
        for (column, sum) in sums.iter_mut().enumerate() {
            *sum = minima.f32(column).mul_add(x.sums[half], *sum);
        }
    }
}
