//! A weight of whole numbers in panels: packed from a file's blocks or rounded from f32, multiplied by rounded rows.

use std::ops::Range;

use super::dot::Instructions;
use super::layout::{COLUMNS, GROUP, Kind, Layout, QUAD, Scales, Tile, WithKind};
use super::line::Line;
use super::rounded_rows::{LARGEST, RoundedRows, inverse, round};
use super::{PANEL, Strided};
use crate::block_format::{BlockFormat, SUPER};
use crate::parallel;
use crate::simd::vectorized;

/// Groups unpacked at once for several rows: they stay in the first-level cache.
const PART: usize = 16;
/// Rows whose sums are kept during that, and whose values stay in the second-level cache.
const SUMS: usize = 512;
/// Rows that are multiplied together: their sums and a panel's values fit the registers of AVX-512.
const ROWS: usize = 4;
/// Added to signed bytes, because one side of the product of bytes is unsigned.
const OFFSET: i32 = 128;

/// A weight `[inputs, outputs]` in panels; inputs and columns past the last are zeros.
#[derive(Debug, Clone)]
pub(super) struct BlockPanels {
    layout: Layout,
    /// The offset subtracted from a stored number.
    offset: i32,
    /// Records of a panel.
    records: usize,
    /// `[panels, records, lines]`
    lines: Vec<Line>,
}

/// Buffers that a task reuses from panel to panel.
#[derive(Default)]
pub(super) struct Scratch {
    tiles: Vec<Line>,
    sums: Vec<[f32; PANEL]>,
    /// Panels in f32, `[panels, inputs, PANEL]`.
    pub(super) panels: Vec<f32>,
}

impl BlockPanels {
    /// Panels of a quantised format, to which rows are [pushed](Self::push).
    pub(super) fn with_format(format: BlockFormat, inputs: usize, outputs: usize) -> Option<Self> {
        let layout = Layout::of(format)?;
        let records = inputs / format.block_values();
        let lines = Vec::with_capacity(outputs.div_ceil(PANEL) * records * layout.lines());
        Some(Self { layout, offset: format.offset().into(), records, lines })
    }

    /// Packs the blocks of further outputs, `[outputs, inputs]`. Only the last ones may be less than a whole panel.
    pub(super) fn push(&mut self, format: BlockFormat, bytes: &[u8]) {
        let row = self.records * format.block_bytes();
        let (size, start) = (self.records * self.layout.lines(), self.lines.len());
        let panels = bytes.len().div_ceil(PANEL * row);
        self.lines.resize(start + panels * size, Line::ZERO);
        let layout = self.layout;
        let panels = self.lines[start..].chunks_exact_mut(size).zip(bytes.chunks(PANEL * row));
        parallel::for_each(panels, |(lines, bytes)| pack_panel(&layout, format, lines, bytes, row));
    }

    /// Rounds f32 panels `[panels, inputs, PANEL]` to eight bits and a scale for every 32 inputs.
    pub(super) fn rounded(panels: &[f32], inputs: usize) -> Self {
        let of_panels = parallel::map(panels.chunks_exact(inputs * PANEL), |panel| {
            vectorized(
                #[inline(always)]
                || {
                    panel
                        .chunks(GROUP * PANEL)
                        .flat_map(|group| round_group(group.as_chunks().0))
                        .collect::<Vec<_>>()
                },
            )
        });
        let lines = of_panels.into_iter().flatten().collect();
        Self { layout: Tile::LAYOUT, offset: OFFSET, records: inputs.div_ceil(GROUP), lines }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// What decides how rows are rounded: weights in which it is the same share rounded rows.
    pub(super) fn rounding(&self) -> (usize, i32) {
        (self.layout.halves, self.offset)
    }

    /// Rounds the rows of `x` for products with this weight.
    pub(super) fn rows(&self, x: Strided<'_>, share: bool) -> RoundedRows {
        RoundedRows::new(x, &self.layout, self.offset, share)
    }

    fn panel(&self, panel: usize) -> &[Line] {
        let size = self.records * self.layout.lines();
        &self.lines[panel * size..][..size]
    }

    /// Passes every row's sums of one panel to `each`.
    pub(super) fn rows_by_panel(
        &self,
        panel: usize,
        rows: &RoundedRows,
        scratch: &mut Scratch,
        each: &mut impl FnMut(usize, &[f32; PANEL]),
    ) {
        let instructions = Instructions::best();
        for first in (0..rows.count()).step_by(SUMS) {
            let rows = Rows { all: rows, first, count: (rows.count() - first).min(SUMS) };
            scratch.sums.clear();
            scratch.sums.resize(rows.count, [0.0; PANEL]);
            if rows.count == 1 {
                rows.add(instructions, &self.layout, self.panel(panel), 0, &mut scratch.sums);
            } else {
                self.add_in_parts(instructions, panel, &rows, scratch);
            }
            scratch.sums.iter().enumerate().for_each(|(row, sums)| each(first + row, sums));
        }
    }

    /// Adds the products of many rows, one part of the panel after another.
    fn add_in_parts(&self, instructions: Instructions, panel: usize, rows: &Rows<'_>, scratch: &mut Scratch) {
        let (layout, tile) = (&self.layout, self.layout.tile());
        let records = (PART / layout.groups).max(1);
        for (part, lines) in self.panel(panel).chunks(records * layout.lines()).enumerate() {
            let group = part * records * layout.groups;
            if layout.numbers == tile.numbers {
                rows.add(instructions, layout, lines, group, &mut scratch.sums);
            } else {
                unpack(layout, lines, &mut scratch.tiles);
                rows.add(instructions, &tile, &scratch.tiles, group, &mut scratch.sums);
            }
        }
    }

    /// Writes some panels in f32 to [`Scratch::panels`].
    pub(super) fn dequantize_panels(&self, panels: Range<usize>, scratch: &mut Scratch) {
        let size = self.records * self.layout.groups * GROUP * PANEL;
        // Every value is written, so that older ones need not be cleared.
        scratch.panels.resize(panels.len() * size, 0.0);
        for (panel, values) in panels.zip(scratch.panels.chunks_exact_mut(size)) {
            unpack(&self.layout, self.panel(panel), &mut scratch.tiles);
            vectorized(
                #[inline(always)]
                || {
                    let tiles = scratch.tiles.chunks_exact(self.layout.tile().lines());
                    for (tile, values) in tiles.zip(values.chunks_exact_mut(GROUP * PANEL)) {
                        for (input, values) in values.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                            self.dequantize_input(tile, input, values);
                        }
                    }
                },
            );
        }
    }

    /// An input of all columns of a tile.
    #[inline(always)]
    fn dequantize_input(&self, tile: &[Line], input: usize, values: &mut [f32; PANEL]) {
        let layout = self.layout.tile();
        let half = input / (GROUP / layout.halves);
        let shift = 8 * (input % QUAD);
        for (v, values) in values.as_chunks_mut::<COLUMNS>().0.iter_mut().enumerate() {
            let numbers = &tile[input / QUAD * (PANEL / COLUMNS) + v];
            let scales = &tile[layout.scales_at() + 2 * half + v];
            // Computed as a whole before anything is written, and from whole quads: so sixteen columns fit one vector.
            let stored: [u32; COLUMNS] = std::array::from_fn(
                #[inline(always)]
                |column| numbers.u32(column) >> shift & 0xff,
            );
            let mut exact: [f32; COLUMNS] = std::array::from_fn(
                #[inline(always)]
                |column| (stored[column] as i32 - self.offset) as f32 * scales.f32(column),
            );
            // Without a minimum nothing is added: −0 + 0 would be 0.
            if layout.minima != Scales::None {
                let minima = &tile[layout.minima_at() + 2 * half + v];
                exact = std::array::from_fn(
                    #[inline(always)]
                    |column| exact[column] + minima.f32(column),
                );
            }
            *values = exact;
        }
    }

    /// The weights of one output, `[inputs]`.
    pub(super) fn dequantize_output(&self, output: usize, values: &mut [f32]) {
        let mut tile = vec![Line::ZERO; self.layout.tile().lines()];
        let records = self.panel(output / PANEL).chunks_exact(self.layout.lines());
        let groups = records.flat_map(|record| (0..self.layout.groups).map(move |group| (record, group)));
        for ((record, group), values) in groups.zip(values.chunks_mut(GROUP)) {
            self.layout.unpack(record, group, &mut tile);
            for (input, value) in values.iter_mut().enumerate() {
                let mut columns = [0.0; PANEL];
                self.dequantize_input(&tile, input, &mut columns);
                *value = columns[output % PANEL];
            }
        }
    }
}

/// Some rows of many.
struct Rows<'a> {
    all: &'a RoundedRows,
    first: usize,
    count: usize,
}

impl Rows<'_> {
    /// Adds to `sums` the products with records that begin at `group`.
    fn add(
        &self,
        instructions: Instructions,
        layout: &Layout,
        records: &[Line],
        group: usize,
        sums: &mut [[f32; PANEL]],
    ) {
        let groups = records.len() / layout.lines() * layout.groups;
        let row = |index: usize| &self.all.row(self.first + index)[group..][..groups];
        let (whole, rest) = sums.as_chunks_mut::<ROWS>();
        let done = ROWS * whole.len();
        for (index, sums) in whole.iter_mut().enumerate() {
            let rows = std::array::from_fn(|r| row(index * ROWS + r));
            instructions.add(layout, records, rows, sums);
        }
        // Three rows are computed as two and one, because each number of rows is a kernel to compile for every layout.
        let (pairs, rest) = rest.as_chunks_mut::<2>();
        let one = done + 2 * pairs.len();
        for sums in pairs {
            instructions.add(layout, records, [row(done), row(done + 1)], sums);
        }
        for sums in rest.as_chunks_mut::<1>().0 {
            instructions.add(layout, records, [row(one)], sums);
        }
    }
}

/// Unpacks records to tiles.
fn unpack(layout: &Layout, records: &[Line], tiles: &mut Vec<Line>) {
    let (count, size) = (records.len() / layout.lines() * layout.groups, layout.tile().lines());
    tiles.resize(count * size, Line::ZERO);
    let work = Unpack { records, tiles };
    layout.with(work);
}

struct Unpack<'a> {
    records: &'a [Line],
    tiles: &'a mut [Line],
}

impl WithKind for Unpack<'_> {
    type Output = ();

    fn run<K: Kind>(self) {
        vectorized(
            #[inline(always)]
            || {
                let size = K::LAYOUT.tile().lines();
                let records = self.records.chunks_exact(K::LINES);
                for (record, tiles) in records.zip(self.tiles.chunks_exact_mut(size * K::LAYOUT.groups)) {
                    for (group, tile) in tiles.chunks_exact_mut(size).enumerate() {
                        K::LAYOUT.unpack(record, group, tile);
                    }
                }
            },
        );
    }
}

/// Packs the blocks of at most [`PANEL`] outputs, `row` bytes each.
fn pack_panel(layout: &Layout, format: BlockFormat, lines: &mut [Line], bytes: &[u8], row: usize) {
    let mut numbers = [0; SUPER];
    let numbers = &mut numbers[..format.block_values()];
    for (column, bytes) in bytes.chunks_exact(row).enumerate() {
        let blocks = bytes.chunks_exact(format.block_bytes());
        for (block, record) in blocks.zip(lines.chunks_exact_mut(layout.lines())) {
            format.numbers(block, numbers);
            for (group, numbers) in numbers.as_chunks().0.iter().enumerate() {
                layout.set_numbers(record, group, column, numbers);
            }
            layout.set_scales(record, column, &format.scales(block));
        }
    }
}

/// A group of inputs of a panel, at most [`GROUP`] rows, rounded to a tile.
#[inline(always)]
fn round_group(rows: &[[f32; PANEL]]) -> [Line; Tile::LAYOUT.lines()] {
    let mut most = [0; PANEL];
    for row in rows {
        for (most, weight) in most.iter_mut().zip(row) {
            *most = weight.abs().to_bits().max(*most);
        }
    }
    let scales = most.map(|most| f32::from_bits(most) / LARGEST);
    let inverses = scales.map(inverse);
    let mut tile = [Line([OFFSET as u8; 64]); Tile::LAYOUT.lines()];
    for (input, row) in rows.iter().enumerate() {
        for (column, (&weight, &inverse)) in row.iter().zip(&inverses).enumerate() {
            let number = (i32::from(round(weight, inverse)) + OFFSET) as u8;
            tile[input / QUAD * 2 + column / 16].0[column % 16 * QUAD + input % QUAD] = number;
        }
    }
    for (column, &scale) in scales.iter().enumerate() {
        tile[Tile::LAYOUT.scales_at() + column / 16].set_f32(column % 16, scale);
    }
    tile
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::rounded_rows::RoundedGroup;
    use crate::testing::{blocks, random};
    use proptest::prelude::*;

    fn quantized() -> impl Strategy<Value = BlockFormat> {
        let all = BlockFormat::ALL.into_iter().filter(|format| format.is_quantized());
        prop::sample::select(all.collect::<Vec<_>>())
    }

    fn panels(
        format: BlockFormat,
        blocks_of_row: usize,
        outputs: usize,
        seed: u64,
    ) -> (BlockPanels, Vec<u8>, usize) {
        let inputs = blocks_of_row * format.block_values();
        let bytes = blocks(format, blocks_of_row * outputs, seed);
        let mut panels = BlockPanels::with_format(format, inputs, outputs).unwrap();
        panels.push(format, &bytes);
        (panels, bytes, inputs)
    }

    /// The definition: groups in their order, each one multiply-add, and one for its minimum.
    fn defined(format: BlockFormat, weights: &[u8], x: &[RoundedGroup]) -> f32 {
        let mut sum = 0.0_f32;
        let mut numbers = vec![0; format.block_values()];
        let halves = GROUP / format.group();
        for (index, block) in weights.chunks(format.block_bytes()).enumerate() {
            format.numbers(block, &mut numbers);
            let scales = format.scales(block);
            for (group, numbers) in numbers.chunks(format.group()).enumerate() {
                let x = &x[index * format.block_values() / GROUP + group / halves];
                let x_values = &x.values.as_flattened()[group % halves * format.group()..][..format.group()];
                let stored = |q: u8| match format {
                    BlockFormat::IQ4_NL | BlockFormat::IQ4_XS => {
                        i32::from(crate::block_format::numbers::IQ4[usize::from(q)])
                    }
                    _ => i32::from(q) - i32::from(format.offset()),
                };
                let exact: i32 = numbers.iter().zip(x_values).map(|(&q, &x)| stored(q) * i32::from(x)).sum();
                let scale = scales.d.to_f32() * f32::from(scales.scales[group]);
                sum = (exact as f32).mul_add(scale * x.scale, sum);
                if let Some(minimum) = scales.minimum(group) {
                    let total: i32 = x_values.iter().map(|&x| i32::from(x)).sum();
                    sum = minimum.mul_add(x.scale * total as f32, sum);
                }
            }
        }
        sum
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    proptest! {
        /// Every instruction set gives the same bits, for few rows and for many.
        #[test]
        fn every_way_gives_the_bits_of_the_definition(
            format in quantized(), blocks_of_row in 1_usize..7, outputs in 1_usize..40, rows in 1_usize..18, seed: u64,
        ) {
            let (panels, bytes, inputs) = panels(format, blocks_of_row, outputs, seed);
            let x = random(rows * inputs, seed ^ 1);
            let rounded = panels.rows(Strided::rows(&x, inputs), false);
            let row_bytes = bytes.len() / outputs;
            for panel in 0..outputs.div_ceil(PANEL) {
                let columns = PANEL.min(outputs - panel * PANEL);
                let expected: Vec<f32> = (0..rows).flat_map(|row| {
                    let weights = bytes.chunks(row_bytes).skip(panel * PANEL).take(columns);
                    weights.map(|weights| defined(format, weights, rounded.row(row))).collect::<Vec<_>>()
                }).collect();
                for instructions in Instructions::available() {
                    let some = Rows { all: &rounded, first: 0, count: rows };
                    let mut scratch = Scratch { sums: vec![[0.0; PANEL]; rows], ..Scratch::default() };
                    panels.add_in_parts(instructions, panel, &some, &mut scratch);
                    let mut direct = vec![[0.0; PANEL]; rows];
                    some.add(instructions, &panels.layout, panels.panel(panel), 0, &mut direct);
                    for (way, sums) in [("parts", &scratch.sums), ("direct", &direct)] {
                        let found: Vec<f32> = sums.iter().flat_map(|sums| &sums[..columns]).copied().collect();
                        prop_assert_eq!(bits(&found), bits(&expected), "{:?} {} {:?}", format, way, instructions);
                    }
                }
            }
        }

        /// Unpacked values equal the file's.
        #[test]
        fn values_are_the_blocks(format in quantized(), blocks_of_row in 1_usize..4, outputs in 1_usize..70, seed: u64) {
            let (panels, bytes, inputs) = panels(format, blocks_of_row, outputs, seed);
            let expected = format.dequantize(&bytes).unwrap();
            let mut row = vec![0.0; inputs];
            let mut scratch = Scratch::default();
            for (output, expected) in expected.chunks(inputs).enumerate() {
                panels.dequantize_output(output, &mut row);
                prop_assert_eq!(bits(&row), bits(expected));
                if output % PANEL == 0 {
                    let panel = output / PANEL;
                    panels.dequantize_panels(panel..panel + 1, &mut scratch);
                }
                let column: Vec<f32> = scratch.panels.iter().skip(output % PANEL).step_by(PANEL).copied().collect();
                prop_assert_eq!(bits(&column), bits(expected));
            }
        }

        /// A NaN is preserved.
        #[test]
        fn nan_stays_nan(format in quantized(), at: prop::sample::Index, infinite: bool, rows in 1_usize..15) {
            let (panels, _, inputs) = panels(format, 2, PANEL, 1);
            let mut x = random(rows * inputs, 2);
            let at = at.index(x.len());
            x[at] = if infinite { f32::INFINITY } else { f32::NAN };
            let rounded = panels.rows(Strided::rows(&x, inputs), false);
            panels.rows_by_panel(0, &rounded, &mut Scratch::default(), &mut |row, sums| {
                assert!(sums.iter().all(|sum| sum.is_nan() == (row == at / inputs)), "row {row} {sums:?}");
            });
        }
    }

    /// Six-bit scales take eight bits; everything else takes no more than in the file.
    #[test]
    fn panels_are_hardly_larger_than_the_file() {
        for format in BlockFormat::ALL.into_iter().filter(|format| format.is_quantized()) {
            let (panels, bytes, _) = panels(format, 2, 64, 1);
            let ratio = panels.bytes() as f64 / bytes.len() as f64;
            assert!((1.0..1.04).contains(&ratio), "{}: {ratio}", format.name());
        }
    }
}
