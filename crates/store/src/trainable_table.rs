//! Tables whose rows learn.

use std::path::Path;

use crate::error::{Result, StoreError, check_length, check_rows};
use crate::memory::{Buffer, Region, Storage};
use crate::origin::TableOrigin;
use crate::records::RecordsMut;
use crate::row_format::RowFormat;
use crate::row_init::RowInit;
use crate::row_optimizer::RowOptimizer;
use crate::row_source::{RowSource, check_read};
use crate::table::StoredRows;
use crate::table_file::{TableFile, TableHeader};
use crate::table_writer::TableWriter;

/// A table of `f32` rows with the state of a row-sparse optimiser.
///
/// An update reads and writes the rows that it names and nothing else; no gradient, copy or temporary is ever
/// the size of the table. Reading needs `&self`, so that the next batch's rows can be gathered while this one
/// computes.
///
/// A row's state lies behind its values, so that an update touches one place of the memory or disk and not
/// three. In a table larger than memory, call [`prefetch`](RowSource::prefetch) for the next batch before computing
/// this one.
#[derive(Debug)]
pub struct TrainableTable {
    rows: u64,
    width: usize,
    origin: TableOrigin,
    optimizer: RowOptimizer,
    /// Updates made.
    step: u64,
    /// \[rows, width + widths of both kinds of state\]; see [`RowOptimizer::state_widths`].
    records: Region,
}

impl TrainableTable {
    /// A new table at step 0, its rows as `init` says and its optimiser state zero.
    ///
    /// # Errors
    /// If a setting is outside its range, or the memory is unavailable.
    pub fn new(
        rows: u64,
        width: usize,
        init: RowInit,
        optimizer: RowOptimizer,
        origin: TableOrigin,
        storage: &Storage,
    ) -> Result<Self> {
        init.check()?;
        let header =
            TableHeader { rows, width, format: RowFormat::F32, origin, training: Some((optimizer, 0)) };
        let mut table = Self::zeroed(&header, optimizer, 0, storage)?;
        if init != RowInit::Zeros {
            table.fill(|first, records, record_width| {
                for (id, record) in (first..).zip(records.chunks_exact_mut(record_width)) {
                    init.fill(id, &mut record[..width]);
                }
                Ok(())
            })?;
        }
        Ok(table)
    }

    /// A new table at step 0 with the rows of `source`, decoded to `f32`: to train on what was
    /// imported or frozen.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if `source` cannot give its rows, or has values that are not finite.
    pub fn from_rows(
        source: &dyn RowSource,
        optimizer: RowOptimizer,
        origin: TableOrigin,
        storage: &Storage,
    ) -> Result<Self> {
        let (rows, width) = (source.rows(), source.width());
        let mut table = Self::new(rows, width, RowInit::Zeros, optimizer, origin, storage)?;
        table.fill(|first, records, record_width| {
            let ids: Vec<u64> = (first..first + (records.len() / record_width) as u64).collect();
            let mut values = vec![0.0; ids.len() * width];
            source.gather(&ids, &mut values)?;
            check_state(VALUES, first, &values, width)?;
            let rows = records.chunks_exact_mut(record_width).zip(values.chunks_exact(width));
            rows.for_each(|(record, values)| record[..width].copy_from_slice(values));
            Ok(())
        })?;
        Ok(table)
    }

    /// Calls `each(first, records, width)` for stretches of records from row `first` on, each of `width` values and zero
    /// at first, from several threads.
    fn fill(&mut self, each: impl Fn(u64, &mut [f32], usize) -> Result<()> + Sync) -> Result<()> {
        let record_width = self.record_width();
        self.records.fill(4 * record_width * COPIED_ROWS, |start, bytes| {
            each((start / (4 * record_width)) as u64, bytemuck::cast_slice_mut(bytes), record_width)
        })?;
        self.records.check()
    }

    fn zeroed(header: &TableHeader, optimizer: RowOptimizer, step: u64, storage: &Storage) -> Result<Self> {
        header.check()?;
        let &TableHeader { rows, width, origin, .. } = header;
        let [first, second] = optimizer.state_widths(width);
        let records = Region::zeroed(4 * rows * (width + first + second) as u64, storage)?;
        Ok(Self { rows, width, origin, optimizer, step, records })
    }

    /// Values per row, and of each kind of state.
    fn widths(&self) -> [usize; 3] {
        let [first, second] = self.optimizer.state_widths(self.width);
        [self.width, first, second]
    }

    fn record_width(&self) -> usize {
        self.widths().iter().sum()
    }

    /// Reads a table saved by [`save`](Self::save), values, optimiser state and step, into `storage`,
    /// checking every block on the way.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged anywhere, holds a table without optimiser state, belongs to
    /// another origin than `expected`, has values or state that are not finite, or if the memory is unavailable.
    pub fn load(path: impl AsRef<Path>, expected: &TableOrigin, storage: &Storage) -> Result<Self> {
        let file = TableFile::open(path.as_ref())?;
        file.require(expected)?;
        let (RowFormat::F32, Some((optimizer, step))) = (file.header.format, file.header.training) else {
            let problem = format!(
                "it holds {} rows without optimiser state, which cannot be trained; open it as a Table",
                file.header.format
            );
            return Err(StoreError::not_a_table(&file.path, 80, problem));
        };
        let mut table = Self::zeroed(&file.header, optimizer, step, storage)?;
        let (widths, record_width) = (table.widths(), table.record_width());
        let mut sections: Vec<_> = (0..file.sections.len()).map(|index| file.section(index)).collect();
        let (mut records, mut part, mut buffer) = (Vec::new(), Vec::new(), Buffer::default());
        let mut all = table.records.stretch();
        for first in (0..file.header.rows).step_by(COPIED_ROWS) {
            let rows = (file.header.rows - first).min(COPIED_ROWS as u64) as usize;
            records.resize(rows * record_width, 0.0);
            let mut start = 0;
            for ((section, width), what) in sections.iter_mut().zip(widths).zip(PARTS) {
                part.resize(rows * width, 0.0);
                bytemuck::cast_slice_mut(&mut part).copy_from_slice(section.take(4 * rows * width)?);
                check_state(what, first, &part, width)?;
                for (record, part) in records.chunks_exact_mut(record_width).zip(part.chunks_exact(width)) {
                    record[start..start + width].copy_from_slice(part);
                }
                start += width;
            }
            let (place, bytes) = (4 * first as usize * record_width, bytemuck::cast_slice(&records));
            all.change(place, bytes.len(), &mut buffer, |stored| stored.copy_from_slice(bytes));
        }
        table.records.check()?;
        Ok(table)
    }

    /// Writes values, optimiser state and step to `path`: streamed, checksummed, flushed to disk, and put in
    /// place in one step when complete. [`Table::open`](crate::Table::open) reads the same file.
    ///
    /// # Errors
    /// If the file system refuses, or a value or its state is not finite; `path` then is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let header = TableHeader {
            rows: self.rows,
            width: self.width,
            format: RowFormat::F32,
            origin: self.origin,
            training: Some((self.optimizer, self.step)),
        };
        let mut writer = TableWriter::with_header(path.as_ref(), header)?;
        let record_width = self.record_width();
        let mut section = Vec::new();
        for first in (0..self.rows).step_by(COPIED_ROWS) {
            self.read_on(first);
            let rows = (self.rows - first).min(COPIED_ROWS as u64) as usize;
            let mut start = first as usize * record_width;
            for (index, width) in self.widths().into_iter().enumerate().filter(|&(_, width)| width > 0) {
                section.resize(rows * width, 0.0);
                for (row, part) in section.chunks_exact_mut(width).enumerate() {
                    self.records.copy(4 * (start + row * record_width), bytemuck::cast_slice_mut(part));
                }
                check_state(PARTS[index], first, &section, width)?;
                writer.put(index, bytemuck::cast_slice(&section))?;
                start += width;
            }
        }
        // What a failing disk gives must never be found under the final name.
        self.records.check()?;
        writer.finish().map(drop)
    }

    /// Asks for the chunk after next of [`COPIED_ROWS`], where somebody reads on from row `first`.
    fn read_on(&self, first: u64) {
        let record_bytes = 4 * self.record_width();
        let start = self.records.len().min((first as usize + 2 * COPIED_ROWS) * record_bytes);
        self.records.will_need(start, (COPIED_ROWS * record_bytes).min(self.records.len() - start));
    }

    /// One optimiser step on the rows `ids`, distinct and ascending as
    /// [`DistinctRows::ids`](crate::DistinctRows::ids) has them, with their gradients `grads` \[ids, width\]
    /// at learning rate `rate`. Other rows stay as they are. An update without rows counts as a step too.
    ///
    /// # Errors
    /// If an id is not a row, or is not above the one before it; if `grads` has another length, or holds a
    /// value that is not finite, or so large that its row's squares do not sum up to a finite number (9e18 over
    /// the root of the width); if `rate` is negative or not finite. The table is then untouched, its step too.
    pub fn update(&mut self, ids: &[u64], grads: &[f32], rate: f32) -> Result<()> {
        check_length("gradients of rows to update", ids.len() * self.width, grads.len())?;
        check_rows(ids, self.rows)?;
        check_ascending(ids)?;
        check_gradients(ids, grads, self.width)?;
        if !(rate >= 0.0 && rate.is_finite()) {
            return Err(StoreError::setting("rate", rate, "finite and not negative"));
        }
        self.step += 1;
        let rows = RecordsMut::all(self.widths(), self.records.stretch());
        self.optimizer.step(self.step, rate).apply(rows, ids, grads);
        self.records.check()
    }

    /// Updates made so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The optimiser.
    pub fn optimizer(&self) -> RowOptimizer {
        self.optimizer
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.origin
    }

    /// Row `id`.
    ///
    /// # Errors
    /// If there is no such row, or its disk fails.
    pub fn row(&self, id: u64) -> Result<Vec<f32>> {
        let mut row = vec![0.0; self.width];
        self.gather(&[id], &mut row)?;
        Ok(row)
    }
}

impl RowSource for TrainableTable {
    fn rows(&self) -> u64 {
        self.rows
    }

    fn width(&self) -> usize {
        self.width
    }

    fn format(&self) -> RowFormat {
        RowFormat::F32
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        let (row_bytes, stride) = (4 * self.width, 4 * self.record_width());
        StoredRows { region: &self.records, start: 0, row_bytes, stride }.read(ids, out);
        self.records.check()
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_length("gathered rows", ids.len() * self.width, out.len())?;
        // An `f32` row is its bytes.
        self.read(ids, bytemuck::cast_slice_mut(out))
    }

    /// With their state: [`update`](Self::update) then finds them in memory too.
    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows)?;
        let record_bytes = 4 * self.record_width();
        StoredRows { region: &self.records, start: 0, row_bytes: record_bytes, stride: record_bytes }
            .prefetch(ids);
        Ok(())
    }
}

/// Rows copied at a time from or to a file or another table.
const COPIED_ROWS: usize = 1024;

fn check_ascending(ids: &[u64]) -> Result<()> {
    match ids.windows(2).position(|pair| pair[0] >= pair[1]) {
        None => Ok(()),
        Some(at) => Err(StoreError::RowsNotAscending { row: ids[at + 1], position: at + 1, before: ids[at] }),
    }
}

/// What a record holds, in this order.
const PARTS: [&str; 3] = [VALUES, "the first state", "the second state"];
const VALUES: &str = "a value";

/// Fails on the first of `grads` \[ids, width\] that is not finite or too large to be squared.
fn check_gradients(ids: &[u64], grads: &[f32], width: usize) -> Result<()> {
    let largest = RowOptimizer::largest_gradient(width);
    if all_within(grads, largest) {
        return Ok(());
    }
    // NaN is within nothing.
    let Some(at) = grads.iter().position(|value| !within(*value, largest)) else { return Ok(()) };
    let (position, value) = (at / width, grads[at]);
    let row = ids[position];
    Err(match value.is_finite() {
        true => StoreError::GradientTooLarge { row, position, value, largest },
        false => StoreError::GradientNotFinite { row, position, value },
    })
}

/// Fails unless all of `values` \[rows from `first` on, width\] are finite.
fn check_state(what: &'static str, first: u64, values: &[f32], width: usize) -> Result<()> {
    if all_within(values, f32::MAX) {
        return Ok(());
    }
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let row = first + (at / width) as u64;
            Err(StoreError::StateNotFinite { what, row, value: values[at] })
        }
    }
}

/// Whether no magnitude is above `largest`, and none is NaN.
fn all_within(values: &[f32], largest: f32) -> bool {
    // Without a branch for each value, so that it runs in vector registers.
    let beyond =
        |values: &[f32]| values.iter().fold(0u32, |all, &value| all | u32::from(!within(value, largest)));
    values.chunks(4096).all(|values| beyond(values) == 0)
}

#[inline(always)]
fn within(value: f32, largest: f32) -> bool {
    value.abs() <= largest
}
