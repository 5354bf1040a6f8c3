//! A table whose rows are all zero, and which takes no room.

use crate::error::{Result, check_rows};
use crate::header_page::content;
use crate::origin::{ContentHash, TableOrigin};
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, check_gather, check_read};
use crate::table_file::TableHeader;

/// Rows of zero: what a memory reads that has learned nothing yet. No file holds them.
///
/// Overlays lie on them as on the table file that they would be: [`header`](Self::header) and
/// [`content`](Self::content) are what [`Overlaid::new`](crate::Overlaid::new) and
/// [`OverlayWriter::new`](crate::OverlayWriter::new) take.
///
/// ```
/// use engram_store::{AddressIdentity, Overlaid, RowSource, TableOrigin, ZeroRows};
///
/// # let folder = tempfile::tempdir()?;
/// # let edits = folder.path().join("edits");
/// let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
/// let zeros = ZeroRows::new(1_000_000_007, 4, origin)?;
/// let (header, content) = (zeros.header().clone(), zeros.content());
/// let mut table = Overlaid::new(zeros, &header, content)?;
/// let mut writer = table.writer();
/// writer.set(256, &[1.0, 2.0, 3.0, 4.0])?;
/// writer.save(&edits)?;
///
/// table.push(&edits)?;
/// let mut rows = [9.0; 8];
/// table.gather(&[256, 255], &mut rows)?;
/// assert_eq!(rows, [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ZeroRows {
    header: TableHeader,
}

impl ZeroRows {
    /// `rows` rows of `width` zeros in f32, which belong to `origin`.
    ///
    /// # Errors
    /// When no table could have that shape.
    pub fn new(rows: u64, width: usize, origin: TableOrigin) -> Result<Self> {
        let header = TableHeader { rows, width, format: RowFormat::F32, origin, training: None };
        header.check()?;
        Ok(Self { header })
    }

    /// What the header of a table file of these rows would say.
    pub fn header(&self) -> &TableHeader {
        &self.header
    }

    /// What tells these rows from those of other shapes and origins, and from every table file.
    pub fn content(&self) -> ContentHash {
        // No list of checksums has this hash.
        content(&self.header.to_bytes(&[0; 32]))
    }
}

impl RowSource for ZeroRows {
    fn rows(&self) -> u64 {
        self.header.rows
    }

    fn width(&self) -> usize {
        self.header.width
    }

    fn format(&self) -> RowFormat {
        self.header.format
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        out.fill(0);
        Ok(())
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_gather(self, ids, out)?;
        out.fill(0.0);
        Ok(())
    }

    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows())
    }
}

#[cfg(test)]
mod tests {
    use engram_identity::AddressIdentity;

    use super::*;

    fn origin(layer: u64) -> TableOrigin {
        TableOrigin { identity: AddressIdentity::from_bytes([3; 32]), layer }
    }

    #[test]
    fn zeros_of_other_shapes_and_origins_are_others() {
        let content = |rows, width, layer| ZeroRows::new(rows, width, origin(layer)).unwrap().content();
        assert_eq!(content(10, 4, 1), content(10, 4, 1));
        for other in [content(11, 4, 1), content(10, 5, 1), content(10, 4, 2)] {
            assert_ne!(content(10, 4, 1), other);
        }
    }

    #[test]
    fn rows_that_are_not_there_are_refused() {
        let zeros = ZeroRows::new(10, 2, origin(0)).unwrap();
        let mut out = [1.0; 2];
        assert!(zeros.gather(&[10], &mut out).is_err());
        assert_eq!(out, [1.0; 2]);
        zeros.gather(&[9], &mut out).unwrap();
        assert_eq!(out, [0.0; 2]);
        assert!(ZeroRows::new(0, 2, origin(0)).is_err());
    }
}
