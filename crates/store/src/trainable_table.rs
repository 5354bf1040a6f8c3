//! Tables whose rows learn.

use std::path::Path;

use rayon::prelude::*;

use crate::error::{Result, StoreError, check_length, check_rows};
use crate::memory::{Region, Storage};
use crate::row_format::RowFormat;
use crate::row_init::RowInit;
use crate::row_optimizer::{RowOptimizer, RowsMut};
use crate::row_source::{RowSource, check_read};
use crate::table::StoredRows;
use crate::table_file::{TableFile, TableHeader, TableOrigin};
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
    /// If a setting is outside its range, or the memory cannot be had.
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
            let record_width = table.record_width();
            let rows = table.records.values_mut().par_chunks_exact_mut(record_width).enumerate();
            rows.with_min_len(256).for_each(|(id, record)| init.fill(id as u64, &mut record[..width]));
        }
        table.records.check()?;
        Ok(table)
    }

    /// A new table at step 0 with the rows of `source`, decoded to `f32`: to train on what was
    /// imported or frozen.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if `source` cannot give its rows.
    pub fn from_rows(
        source: &dyn RowSource,
        optimizer: RowOptimizer,
        origin: TableOrigin,
        storage: &Storage,
    ) -> Result<Self> {
        let (rows, width) = (source.rows(), source.width());
        let mut table = Self::new(rows, width, RowInit::Zeros, optimizer, origin, storage)?;
        let record_width = table.record_width();
        let chunks = table.records.values_mut().par_chunks_mut(record_width * COPIED_ROWS).enumerate();
        chunks.try_for_each_init(Vec::new, |values, (chunk, records)| {
            let first = (chunk * COPIED_ROWS) as u64;
            let ids: Vec<u64> = (first..first + (records.len() / record_width) as u64).collect();
            values.resize(ids.len() * width, 0.0);
            source.gather(&ids, values)?;
            let rows = records.chunks_exact_mut(record_width).zip(values.chunks_exact(width));
            rows.for_each(|(record, values)| record[..width].copy_from_slice(values));
            Ok(())
        })?;
        table.records.check()?;
        Ok(table)
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
    /// another origin than `expected`, or if the memory cannot be had.
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
        for records in table.records.values_mut().chunks_mut(record_width * COPIED_ROWS) {
            let rows = records.len() / record_width;
            let mut start = 0;
            for (section, width) in sections.iter_mut().zip(widths) {
                let stored = section.take(4 * rows * width)?.chunks_exact(4 * width);
                for (record, stored) in records.chunks_exact_mut(record_width).zip(stored) {
                    bytemuck::cast_slice_mut(&mut record[start..start + width]).copy_from_slice(stored);
                }
                start += width;
            }
        }
        table.records.check()?;
        Ok(table)
    }

    /// Writes values, optimiser state and step to `path`: streamed, checksummed, flushed to disk, and put in
    /// place in one step when complete. [`Table::open`](crate::Table::open) reads the same file.
    ///
    /// # Errors
    /// If the file system refuses; `path` then is as it was.
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
        for (chunk, records) in self.records.values().chunks(record_width * COPIED_ROWS).enumerate() {
            self.read_on(chunk);
            let mut start = 0;
            for (index, width) in self.widths().into_iter().enumerate().filter(|&(_, width)| width > 0) {
                section.clear();
                for record in records.chunks_exact(record_width) {
                    section.extend_from_slice(&record[start..start + width]);
                }
                writer.put(index, bytemuck::cast_slice(&section))?;
                start += width;
            }
        }
        // What a failing disk gives must never be found under the final name.
        self.records.check()?;
        writer.finish().map(drop)
    }

    /// Asks for the chunk after next of [`COPIED_ROWS`], where somebody reads on from one to the next.
    fn read_on(&self, chunk: usize) {
        let (bytes, chunk_bytes) = (self.records.bytes().len(), 4 * self.record_width() * COPIED_ROWS);
        let start = bytes.min((chunk + 2) * chunk_bytes);
        self.records.will_need(start, chunk_bytes.min(bytes - start));
    }

    /// One optimiser step on the rows `ids`, distinct and ascending as
    /// [`DistinctRows::ids`](crate::DistinctRows::ids) has them, with their gradients `grads` \[ids, width\]
    /// at learning rate `rate`. Other rows stay as they are. An update without rows counts as a step too.
    ///
    /// # Errors
    /// If an id is not a row, or is not above the one before it; if `grads` has another length, or holds a
    /// value that is not finite; if `rate` is negative or not finite.
    /// The table is then untouched, its step too.
    pub fn update(&mut self, ids: &[u64], grads: &[f32], rate: f32) -> Result<()> {
        check_length("gradients of rows to update", ids.len() * self.width, grads.len())?;
        check_rows(ids, self.rows)?;
        check_ascending(ids)?;
        check_finite(ids, grads, self.width)?;
        if !(rate >= 0.0 && rate.is_finite()) {
            return Err(StoreError::setting("rate", rate, "finite and not negative"));
        }
        self.step += 1;
        let rows = RowsMut { first: 0, widths: self.widths(), records: self.records.values_mut() };
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
    /// If there is no such row.
    pub fn row(&self, id: u64) -> Result<&[f32]> {
        check_rows(&[id], self.rows)?;
        let row = &self.records.values()[id as usize * self.record_width()..][..self.width];
        self.records.check()?;
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

fn check_finite(ids: &[u64], grads: &[f32], width: usize) -> Result<()> {
    // A sum of zeros times values is zero if all values are finite; sixteen of them fill vector registers.
    let mut sums = [0.0f32; 16];
    let chunks = grads.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|value| value * 0.0).sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, value)| *sum += value * 0.0);
    }
    if sums.iter().sum::<f32>() + rest == 0.0 {
        return Ok(());
    }
    match grads.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let position = at / width;
            Err(StoreError::GradientNotFinite { row: ids[position], position, value: grads[at] })
        }
    }
}
