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
use crate::table_file::{self, TableFile, TableHeader, TableOrigin};

/// A table of `f32` rows with the state of a row-sparse optimiser.
///
/// An update reads and writes the rows that it names and nothing else; no gradient, copy or temporary is ever
/// the size of the table. Reading needs `&self`, so that the next batch's rows can be gathered while this one
/// computes.
#[derive(Debug)]
pub struct TrainableTable {
    rows: u64,
    width: usize,
    origin: TableOrigin,
    optimizer: RowOptimizer,
    /// Updates made.
    step: u64,
    /// \[rows, width\]
    values: Region,
    /// Each \[rows, width of this state\]; see [`RowOptimizer::state_widths`].
    state: [Region; 2],
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
            let rows = table.values.values_mut().par_chunks_exact_mut(width).enumerate().with_min_len(256);
            rows.for_each(|(id, row)| init.fill(id as u64, row));
        }
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
        let chunks = table.values.values_mut().par_chunks_mut(width * COPIED_ROWS).enumerate();
        chunks.try_for_each(|(chunk, out)| {
            let first = (chunk * COPIED_ROWS) as u64;
            let ids: Vec<u64> = (first..first + (out.len() / width) as u64).collect();
            source.gather(&ids, out)
        })?;
        Ok(table)
    }

    fn zeroed(header: &TableHeader, optimizer: RowOptimizer, step: u64, storage: &Storage) -> Result<Self> {
        header.check()?;
        let &TableHeader { rows, width, origin, .. } = header;
        let region = |width: usize| Region::zeroed(4 * rows * width as u64, storage);
        let [first, second] = optimizer.state_widths(width);
        let state = [region(first)?, region(second)?];
        Ok(Self { rows, width, origin, optimizer, step, values: region(width)?, state })
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
        let Self { values, state: [first, second], .. } = &mut table;
        for (index, region) in [values, first, second].into_iter().enumerate().take(file.sections.len()) {
            file.read_section(index, region.bytes_mut())?;
        }
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
        let sections = [&self.values, &self.state[0], &self.state[1]].map(Region::bytes);
        self.check()?;
        table_file::write(path.as_ref(), &header, &sections)
    }

    /// Fails if a scratch file's disk did: values or state are then partly lost.
    fn check(&self) -> Result<()> {
        self.values.check()?;
        self.state.iter().try_for_each(Region::check)
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
        let [first, second] = &mut self.state;
        let [width1, width2] = self.optimizer.state_widths(self.width);
        let rows = RowsMut {
            first: 0,
            width: self.width,
            values: self.values.values_mut(),
            state: [(width1, first.values_mut()), (width2, second.values_mut())],
        };
        self.optimizer.step(self.step, rate).apply(rows, ids, grads);
        self.check()
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
        let row = &self.values.values()[id as usize * self.width..][..self.width];
        self.values.check()?;
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
        let stored = StoredRows { region: &self.values, start: 0, row_bytes: self.bytes_per_row() };
        stored.read(ids, out);
        self.values.check()
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_length("gathered rows", ids.len() * self.width, out.len())?;
        // An `f32` row is its bytes.
        self.read(ids, bytemuck::cast_slice_mut(out))
    }
}

/// Rows copied from another table at a time.
const COPIED_ROWS: usize = 256;

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
