//! Tables from one row format to another, and what it costs in precision.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;

use crate::error::Result;
use crate::origin::TableOrigin;
use crate::progress::{Progress, report};
use crate::row_format::{RowFormat, TableScale};
use crate::row_source::RowSource;
use crate::table_reader::{TableReader, decode};
use crate::table_writer::{TableWriter, rows_per_chunk};

/// Writes the rows of the table file `source` to the table file `target` in `format`, and says how far they
/// moved. Streams: memory does not depend on the table's size. Every block is checked on the way; rows that
/// already have the format are copied byte for byte. Optimiser state is left behind. Progress is in rows.
///
/// # Errors
/// If `source` cannot be read, is not a table or is damaged, or the file system refuses `target`, which then is
/// as it was.
pub fn convert(
    source: impl AsRef<Path>,
    target: impl AsRef<Path>,
    format: RowFormat,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Quality> {
    let mut source = TableReader::open(source)?;
    let header = source.header().clone();
    let width = header.width;
    let mut meter = QualityMeter::new(width);
    let mut target = TableWriter::create(target, header.rows, width, format, header.origin)?;
    let (mut values, mut kept) = (Vec::new(), Vec::new());
    while let Some((first, bytes)) = source.next()? {
        decode(header.format, width, bytes, &mut values);
        if header.format == format {
            target.push_encoded(bytes)?;
            meter.add(first, &values, &values);
        } else {
            push_measured(&mut target, first, &values, &mut kept, &mut meter)?;
        }
        report(progress, Progress { done: target.rows_written(), total: header.rows })?;
    }
    target.finish()?;
    Ok(meter.quality())
}

/// Writes all rows of any source, with its overlays for instance, to the table file `target` in `format`, and
/// says how far they moved. Progress is in rows.
///
/// # Errors
/// If `source` cannot give its rows, or the file system refuses `target`, which then is as it was.
pub fn save_rows(
    source: &dyn RowSource,
    origin: TableOrigin,
    target: impl AsRef<Path>,
    format: RowFormat,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Quality> {
    let (rows, width) = (source.rows(), source.width());
    let mut meter = QualityMeter::new(width);
    let mut target = TableWriter::create(target, rows, width, format, origin)?;
    let (mut ids, mut values, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    while target.rows_written() < rows {
        let first = target.rows_written();
        ids.clear();
        ids.extend(first..rows.min(first + rows_per_chunk(width) as u64));
        values.resize(ids.len() * width, 0.0);
        source.gather(&ids, &mut values)?;
        push_measured(&mut target, first, &values, &mut kept, &mut meter)?;
        report(progress, Progress { done: target.rows_written(), total: rows })?;
    }
    target.finish()?;
    Ok(meter.quality())
}

/// The scale for [`RowFormat::Fp8E4m3OneScale`] that holds the largest value of the table file `source`, which
/// is read through once. Progress is in rows.
///
/// # Errors
/// If `source` cannot be read, is not a table or is damaged.
pub fn table_scale(
    source: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<TableScale> {
    let mut source = TableReader::open(source)?;
    let (total, width) = (source.header().rows, source.header().width);
    let (mut values, mut largest) = (Vec::new(), 0f32);
    while let Some(first) = source.next_values(&mut values)? {
        let magnitudes = values.par_iter().map(|value| value.abs()).filter(|value| value.is_finite());
        largest = largest.max(magnitudes.reduce(|| 0.0, f32::max));
        report(progress, Progress { done: first + (values.len() / width) as u64, total })?;
    }
    Ok(TableScale::for_largest(largest))
}

/// Writes `values` (rows from `first` on) and measures what the target's format keeps of them in `kept`.
fn push_measured(
    target: &mut TableWriter,
    first: u64,
    values: &[f32],
    kept: &mut Vec<f32>,
    meter: &mut QualityMeter,
) -> Result<()> {
    let (format, width) = (target.header().format, target.header().width);
    decode(format, width, target.push(values)?, kept);
    meter.add(first, values, kept);
    Ok(())
}

/// How far rows are from those they were made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Rows compared.
    pub rows: u64,
    /// The largest absolute error, and the row that has it.
    pub largest_error: (f64, u64),
    /// The mean absolute error.
    pub mean_error: f64,
    /// The root mean square error over the root mean square of the values.
    pub relative_rms_error: f64,
    /// The mean over the rows of the cosine between a row and what became of it: 1 where both are zero, 0
    /// where one is.
    pub mean_cosine: f64,
    /// The least such cosine, and the row that has it.
    pub least_cosine: (f64, u64),
    /// Values that were finite and no longer are: too large for the format. The errors leave them out.
    pub lost: u64,
    /// Values that were NaN or infinite before. The errors leave them out.
    pub not_finite: u64,
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((largest, at), (least, least_at)) = (self.largest_error, self.least_cosine);
        writeln!(f, "absolute error     mean {:.3e}, largest {largest:.3e} (row {at})", self.mean_error)?;
        writeln!(f, "relative RMS error {:.3e}", self.relative_rms_error)?;
        write!(f, "cosine             mean {:.7}, least {least:.7} (row {least_at})", self.mean_cosine)?;
        if self.lost > 0 {
            write!(f, "\nlost               {} values are too large for the format", self.lost)?;
        }
        if self.not_finite > 0 {
            write!(f, "\nnot finite         {} values were NaN or infinite before", self.not_finite)?;
        }
        Ok(())
    }
}

/// Adds up a [`Quality`], rows in any pieces. The result does not depend on threads.
#[derive(Clone, Debug)]
pub struct QualityMeter {
    width: usize,
    sums: Sums,
}

impl QualityMeter {
    /// Rows of `width` values, none yet.
    pub fn new(width: usize) -> Self {
        Self { width, sums: Sums::default() }
    }

    /// Compares the rows `before` and `after`, each \[rows, width\], which are numbered from `first`.
    ///
    /// # Panics
    /// If the two are not as long as each other.
    pub fn add(&mut self, first: u64, before: &[f32], after: &[f32]) {
        const ROWS: usize = 256;
        assert_eq!(before.len(), after.len(), "rows to compare");
        let width = self.width;
        let chunks = before.par_chunks(ROWS * width).zip(after.par_chunks(ROWS * width)).enumerate();
        let sums = chunks.map(|(chunk, (before, after))| {
            let mut sums = Sums::default();
            let rows = before.chunks(width).zip(after.chunks(width));
            for (id, (before, after)) in (first + (chunk * ROWS) as u64..).zip(rows) {
                sums.add_row(id, before, after);
            }
            sums
        });
        // In order, whichever thread was first.
        sums.collect::<Vec<_>>().iter().for_each(|sums| self.sums.add(sums));
    }

    /// The quality of all rows so far; without rows, that of a perfect copy.
    pub fn quality(&self) -> Quality {
        let Sums { rows, values, absolute, squared, squares, cosines, largest, least, lost, not_finite } =
            self.sums;
        let share = |sum: f64, of: f64| if sum == 0.0 { 0.0 } else { sum / of };
        Quality {
            rows,
            largest_error: largest,
            mean_error: share(absolute, values as f64),
            relative_rms_error: share(squared, squares).sqrt(),
            mean_cosine: if rows == 0 { 1.0 } else { cosines / rows as f64 },
            least_cosine: least,
            lost,
            not_finite,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Sums {
    rows: u64,
    /// Compared values: finite before and after.
    values: u64,
    absolute: f64,
    squared: f64,
    squares: f64,
    cosines: f64,
    largest: (f64, u64),
    least: (f64, u64),
    lost: u64,
    not_finite: u64,
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            rows: 0,
            values: 0,
            absolute: 0.0,
            squared: 0.0,
            squares: 0.0,
            cosines: 0.0,
            largest: (0.0, 0),
            least: (1.0, 0),
            lost: 0,
            not_finite: 0,
        }
    }
}

impl Sums {
    fn add_row(&mut self, id: u64, before: &[f32], after: &[f32]) {
        let (mut dot, mut before_squares, mut after_squares) = (0.0, 0.0, 0.0);
        for (&before, &after) in before.iter().zip(after) {
            if !(before.is_finite() && after.is_finite()) {
                *(if before.is_finite() { &mut self.lost } else { &mut self.not_finite }) += 1;
                continue;
            }
            let (before, after) = (f64::from(before), f64::from(after));
            let error = (after - before).abs();
            self.values += 1;
            self.absolute += error;
            self.squared += error * error;
            if error > self.largest.0 {
                self.largest = (error, id);
            }
            dot += before * after;
            before_squares += before * before;
            after_squares += after * after;
        }
        // Squares of f32 neither underflow nor overflow in f64.
        let cosine = match (before_squares > 0.0, after_squares > 0.0) {
            (true, true) => (dot / (before_squares.sqrt() * after_squares.sqrt())).clamp(-1.0, 1.0),
            (false, false) => 1.0,
            _ => 0.0,
        };
        self.rows += 1;
        self.squares += before_squares;
        self.cosines += cosine;
        if cosine < self.least.0 {
            self.least = (cosine, id);
        }
    }

    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.values += other.values;
        self.absolute += other.absolute;
        self.squared += other.squared;
        self.squares += other.squares;
        self.cosines += other.cosines;
        self.lost += other.lost;
        self.not_finite += other.not_finite;
        if other.largest.0 > self.largest.0 {
            self.largest = other.largest;
        }
        if other.least.0 < self.least.0 {
            self.least = other.least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_is_what_its_words_say() {
        let mut meter = QualityMeter::new(2);
        // Cosines: 1, 24/25, 1 (both zero), 0 (one zero).
        meter.add(10, &[3.0, 4.0, 3.0, 4.0], &[3.0, 4.0, 4.0, 3.0]);
        meter.add(12, &[0.0, 0.0, 0.0, 2.0], &[0.0, 0.0, 0.0, 0.0]);
        let quality = meter.quality();
        assert_eq!(quality.rows, 4);
        assert_eq!(quality.largest_error, (2.0, 13));
        assert_eq!(quality.mean_error, 4.0 / 8.0);
        assert!((quality.relative_rms_error - (6f64 / 54.0).sqrt()).abs() < 1e-15);
        assert!((quality.mean_cosine - (1.0 + 0.96 + 1.0) / 4.0).abs() < 1e-15);
        assert_eq!(quality.least_cosine, (0.0, 13));
        assert_eq!((quality.lost, quality.not_finite), (0, 0));
    }

    #[test]
    fn values_that_are_not_finite_are_counted_and_left_out() {
        let mut meter = QualityMeter::new(4);
        meter.add(0, &[1.0, f32::NAN, 1e30, f32::INFINITY], &[1.0, f32::NAN, f32::INFINITY, 7.0]);
        let quality = meter.quality();
        assert_eq!((quality.lost, quality.not_finite), (1, 2));
        assert_eq!((quality.mean_error, quality.mean_cosine), (0.0, 1.0));
        let said = quality.to_string();
        assert!(said.contains("1 values are too large") && said.contains("2 values were NaN"), "{said}");
    }
}
