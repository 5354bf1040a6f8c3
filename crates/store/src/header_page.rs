//! The first page of a table file or an overlay: fields one after another, zeros, and the hash of them.

use crate::origin::ContentHash;

pub(crate) const HEADER_BYTES: usize = 4096;
const HASHED: usize = HEADER_BYTES - 32;

pub(crate) type HeaderPage = [u8; HEADER_BYTES];

/// The first fields of both kinds of file, as they are stored: 72 bytes.
pub(crate) struct Start {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    /// The number of the row format.
    pub(crate) format: u32,
    pub(crate) rows: u64,
    pub(crate) width: u64,
    pub(crate) layer: u64,
    pub(crate) identity: [u8; 32],
}

/// Writes a page from its first field to its last.
pub(crate) struct FieldWriter {
    page: HeaderPage,
    at: usize,
}

impl FieldWriter {
    pub(crate) fn new(start: &Start) -> Self {
        let mut writer = Self { page: [0; HEADER_BYTES], at: 0 };
        writer.put(start.magic).put(start.version.to_le_bytes()).put(start.format.to_le_bytes());
        for number in [start.rows, start.width, start.layer] {
            writer.put(number.to_le_bytes());
        }
        writer.put(start.identity);
        writer
    }

    /// The next field.
    pub(crate) fn put<const N: usize>(&mut self, field: [u8; N]) -> &mut Self {
        self.page[self.at..self.at + N].copy_from_slice(&field);
        self.at += N;
        self
    }

    /// The page, with its hash.
    pub(crate) fn seal(mut self) -> HeaderPage {
        let hash = blake3::hash(&self.page[..HASHED]);
        self.page[HASHED..].copy_from_slice(hash.as_bytes());
        self.page
    }
}

/// Reads a page from its first field to its last.
pub(crate) struct FieldReader<'a> {
    page: &'a HeaderPage,
    at: usize,
}

impl<'a> FieldReader<'a> {
    /// The first fields, and what reads those after them.
    pub(crate) fn new(page: &'a HeaderPage) -> (Start, Self) {
        let mut reader = Self { page, at: 0 };
        let start = Start {
            magic: reader.take(),
            version: u32::from_le_bytes(reader.take()),
            format: u32::from_le_bytes(reader.take()),
            rows: u64::from_le_bytes(reader.take()),
            width: u64::from_le_bytes(reader.take()),
            layer: u64::from_le_bytes(reader.take()),
            identity: reader.take(),
        };
        (start, reader)
    }

    /// The next field.
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let field = std::array::from_fn(|i| self.page[self.at + i]);
        self.at += N;
        field
    }
}

/// Whether the fields of a page are those that were hashed.
pub(crate) fn is_sealed(page: &HeaderPage) -> bool {
    blake3::hash(&page[..HASHED]).as_bytes()[..] == page[HASHED..]
}

/// The hash of a page, which is that of all its file.
pub(crate) fn content(page: &HeaderPage) -> ContentHash {
    ContentHash::from_bytes(std::array::from_fn(|i| page[HASHED + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_from_their_places() {
        let start = Start {
            magic: *b"ENGRAMTB",
            version: 1,
            format: 2,
            rows: 3,
            width: 4,
            layer: 5,
            identity: std::array::from_fn(|i| i as u8),
        };
        let mut writer = FieldWriter::new(&start);
        writer.put(7.5f64.to_le_bytes());
        let mut page = writer.seal();
        assert_eq!(
            (&page[8..12], &page[12..16], &page[16..24]),
            (&[1, 0, 0, 0][..], &[2, 0, 0, 0][..], &[3, 0, 0, 0, 0, 0, 0, 0][..])
        );
        assert_eq!(
            (page[24], page[32], page[41], page[72..80].to_vec()),
            (4, 5, 1, 7.5f64.to_le_bytes().to_vec())
        );
        let (read, mut fields) = FieldReader::new(&page);
        assert_eq!((read.magic, read.rows, read.identity), (start.magic, 3, start.identity));
        assert_eq!(f64::from_le_bytes(fields.take()), 7.5);
        assert!(is_sealed(&page));
        page[100] = 1;
        assert!(!is_sealed(&page));
    }
}
