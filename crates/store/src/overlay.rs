//! Changed rows on top of a table that stays as it is.

#[cfg(feature = "write")]
use std::collections::BTreeMap;
use std::fs::File;
#[cfg(feature = "write")]
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_identity::AddressIdentity;

#[cfg(feature = "write")]
use crate::error::check_length;
use crate::error::{Result, StoreError, check_rows};
use crate::header_page::{FieldReader, HEADER_BYTES, HeaderPage, content, is_sealed};
#[cfg(feature = "write")]
use crate::header_page::{FieldWriter, Start};
#[cfg(feature = "write")]
use crate::new_file::NewFile;
use crate::origin::{ContentHash, TableOrigin};
use crate::positioned::read_exact_at;
#[cfg(feature = "write")]
use crate::progress::{Progress, report};
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, check_gather, check_read};
use crate::table_file::TableHeader;
#[cfg(feature = "write")]
use crate::table_reader::TableReader;
#[cfg(feature = "write")]
use crate::table_writer::{TableWriter, rows_per_chunk};

const MAGIC: [u8; 8] = *b"ENGRAMOV";
const VERSION: u32 = 1;

/// A few changed rows of one table, from a file: a fine-tuned or edited memory, as small as what it changes.
///
/// The file names what it was made for by its [`ContentHash`]: a table file, or another overlay on one. On
/// anything else it is refused. `docs/table-file.md` has its layout. It is read and checked whole when it is
/// opened, and kept in RAM.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    /// Shape, format and origin of the table below.
    header: TableHeader,
    below: ContentHash,
    content: ContentHash,
    /// Ascending.
    ids: Vec<u64>,
    /// \[ids, bytes per row\]
    rows: Vec<u8>,
    /// Where in `ids` each of equal ranges of ids begins, and the end: ids are hashed, thus spread evenly.
    ranges: Vec<usize>,
}

impl Overlay {
    /// Opens the overlay at `path` for what has the content `below`.
    ///
    /// # Errors
    /// If the file cannot be read, is no overlay, is damaged anywhere, or was made for something else.
    pub fn open(path: impl AsRef<Path>, below: ContentHash) -> Result<Self> {
        let overlay = Self::read(path.as_ref())?;
        if overlay.below == below {
            return Ok(overlay);
        }
        Err(StoreError::WrongBase { path: overlay.path, expected: below, found: overlay.below })
    }

    /// Reads and checks the overlay at `path`, whatever it was made for: see [`below`](Self::below).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |offset| StoreError::io(path, "read the overlay", offset);
        let file = File::open(path).map_err(StoreError::io(path, "open the overlay", 0))?;
        let found = file.metadata().map_err(failed(0))?.len();
        if found < HEADER_BYTES as u64 {
            let problem = format!("it ends within the header of {HEADER_BYTES} bytes");
            return Err(StoreError::not_an_overlay(path, found, problem));
        }
        let mut head = [0; HEADER_BYTES];
        read_exact_at(&file, &mut head, 0).map_err(failed(0))?;
        let OverlayHeader { table: header, changed, below, body: hash } = OverlayHeader::parse(&head, path)?;
        // Neither can overflow: a table has less than 2^60 bytes, and no overlay more rows than its table.
        let row_bytes = header.format.bytes_per_row(header.width);
        let (id_bytes, body) = (8 * changed, changed * (8 + row_bytes as u64));
        if found != HEADER_BYTES as u64 + body {
            let expected = HEADER_BYTES as u64 + body;
            let problem = format!("the file has {found} bytes, but its header promises {expected}");
            return Err(StoreError::damaged(path, found.min(expected), problem));
        }
        let mut rows = vec![0; body as usize];
        read_exact_at(&file, &mut rows, HEADER_BYTES as u64).map_err(failed(HEADER_BYTES as u64))?;
        if *blake3::hash(&rows).as_bytes() != hash {
            let problem = "ids and rows do not match their checksum";
            return Err(StoreError::damaged(path, HEADER_BYTES as u64, problem));
        }
        let stored = rows[..id_bytes as usize].as_chunks().0;
        let ids: Vec<u64> = stored.iter().map(|&id| u64::from_le_bytes(id)).collect();
        rows.drain(..id_bytes as usize);
        check_ids(&ids, header.rows, path)?;
        let ranges = ranges(&ids, header.rows);
        Ok(Self { path: path.to_owned(), header, below, content: content(&head), ids, rows, ranges })
    }

    /// What it was made for: the content of a table file or of another overlay.
    pub fn below(&self) -> ContentHash {
        self.below
    }

    /// The hash of all that the file holds, and by naming it of all that lies below: what an overlay on top
    /// of this one is made for.
    pub fn content(&self) -> ContentHash {
        self.content
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The changed rows, ascending.
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.header.origin
    }

    /// Shape and format of the table that it is for.
    pub fn header(&self) -> &TableHeader {
        &self.header
    }

    /// Row `id` as it is stored, if it is changed.
    pub fn row(&self, id: u64) -> Option<&[u8]> {
        if id >= self.header.rows {
            return None;
        }
        let range = range_of(id, self.ranges.len() - 1, self.header.rows);
        let (start, end) = (self.ranges[range], self.ranges[range + 1]);
        let place = start + self.ids[start..end].binary_search(&id).ok()?;
        let row_bytes = self.header.format.bytes_per_row(self.header.width);
        Some(&self.rows[place * row_bytes..][..row_bytes])
    }
}

/// The range, of `ranges` equal ones, that `id` lies in.
fn range_of(id: u64, ranges: usize, rows: u64) -> usize {
    (u128::from(id) * ranges as u128 / u128::from(rows)) as usize
}

/// Where each range of ids begins: about as many ranges as ids, so that one holds a few.
fn ranges(ids: &[u64], rows: u64) -> Vec<usize> {
    let count = ids.len().max(1);
    let mut starts = Vec::with_capacity(count + 1);
    for (place, &id) in ids.iter().enumerate() {
        starts.resize(starts.len().max(range_of(id, count, rows) + 1), place);
    }
    starts.resize(count + 1, ids.len());
    starts
}

fn check_ids(ids: &[u64], rows: u64, path: &Path) -> Result<()> {
    let offset = |place: usize| (HEADER_BYTES + 8 * place) as u64;
    if let Some(place) = ids.windows(2).position(|pair| pair[0] >= pair[1]) {
        let problem = format!("row {} does not come after row {}", ids[place + 1], ids[place]);
        return Err(StoreError::not_an_overlay(path, offset(place + 1), problem));
    }
    match ids.last() {
        Some(&last) if last >= rows => {
            let problem = format!("row {last} of a table of {rows} rows");
            Err(StoreError::not_an_overlay(path, offset(ids.len() - 1), problem))
        }
        _ => Ok(()),
    }
}

/// What an overlay's header says.
struct OverlayHeader {
    /// Of the table that it is for.
    table: TableHeader,
    changed: u64,
    below: ContentHash,
    /// BLAKE3 of ids and rows.
    body: [u8; 32],
}

impl OverlayHeader {
    fn parse(page: &HeaderPage, path: &Path) -> Result<Self> {
        let refuse = |at: u64, problem: String| Err(StoreError::not_an_overlay(path, at, problem));
        let (start, mut fields) = FieldReader::new(page);
        if start.magic != MAGIC {
            let problem = "it does not begin with ENGRAMOV; pass a file that an OverlayWriter saved";
            return refuse(0, problem.into());
        }
        if start.version != VERSION {
            let problem = format!("version {}, but this program reads version {VERSION}", start.version);
            return refuse(8, problem);
        }
        if !is_sealed(page) {
            return Err(StoreError::damaged(path, 0, "the header does not match its checksum"));
        }
        // From here on the bytes are those that were written, but not necessarily by a sane program.
        let changed = u64::from_le_bytes(fields.take());
        let (below, body) = (ContentHash::from_bytes(fields.take()), fields.take());
        let _zeros: [u8; 8] = fields.take();
        let format = match RowFormat::from_code(start.format, f32::from_le_bytes(fields.take())) {
            Ok(format) => format,
            Err(problem) => return refuse(12, problem),
        };
        let Ok(width) = usize::try_from(start.width) else {
            return refuse(24, format!("rows of {} values do not fit this machine", start.width));
        };
        let origin =
            TableOrigin { identity: AddressIdentity::from_bytes(start.identity), layer: start.layer };
        let table = TableHeader { rows: start.rows, width, format, origin, training: None };
        if let Err(impossible) = table.check() {
            return refuse(16, impossible.to_string());
        }
        if changed > table.rows {
            return refuse(72, format!("{changed} changed rows of a table of {}", table.rows));
        }
        Ok(Self { table, changed, below, body })
    }

    #[cfg(feature = "write")]
    fn to_page(&self) -> HeaderPage {
        let TableHeader { rows, width, format, origin, .. } = &self.table;
        let (code, scale) = format.to_code();
        let mut fields = FieldWriter::new(&Start {
            magic: MAGIC,
            version: VERSION,
            format: code,
            rows: *rows,
            width: *width as u64,
            layer: origin.layer,
            identity: *origin.identity.as_bytes(),
        });
        fields.put(self.changed.to_le_bytes()).put(*self.below.as_bytes()).put(self.body);
        fields.put([0; 8]).put(scale.to_le_bytes());
        fields.seal()
    }
}

/// Collects changed rows for an [`Overlay`]: [`Overlaid::writer`] makes one.
#[cfg(feature = "write")]
#[derive(Clone, Debug)]
pub struct OverlayWriter {
    header: TableHeader,
    below: ContentHash,
    rows: BTreeMap<u64, Vec<u8>>,
}

#[cfg(feature = "write")]
impl OverlayWriter {
    /// An overlay without rows for the table with this header and content, or for an overlay of this content
    /// on it.
    pub fn new(header: &TableHeader, below: ContentHash) -> Self {
        Self { header: TableHeader { training: None, ..header.clone() }, below, rows: BTreeMap::new() }
    }

    /// Changes row `id` to `values`, encoded in the table's format. The last change of a row counts.
    ///
    /// # Errors
    /// If there is no such row, or it has another width.
    pub fn set(&mut self, id: u64, values: &[f32]) -> Result<()> {
        check_length("values of a changed row", self.header.width, values.len())?;
        let mut bytes = vec![0; self.header.format.bytes_per_row(self.header.width)];
        self.header.format.encode_row(values, &mut bytes);
        self.set_encoded(id, &bytes)
    }

    /// Changes row `id` to `bytes`, which are already in the table's format.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn set_encoded(&mut self, id: u64, bytes: &[u8]) -> Result<()> {
        check_rows(&[id], self.header.rows)?;
        let row_bytes = self.header.format.bytes_per_row(self.header.width);
        check_length("bytes of a changed row", row_bytes, bytes.len())?;
        self.rows.insert(id, bytes.to_vec());
        Ok(())
    }

    /// The changes of `overlay`, to be changed themselves.
    pub fn from_overlay(overlay: &Overlay) -> Self {
        let row_bytes = overlay.header.format.bytes_per_row(overlay.header.width);
        let rows = overlay.ids.iter().zip(overlay.rows.chunks_exact(row_bytes));
        let rows = rows.map(|(&id, row)| (id, row.to_vec())).collect();
        Self { header: overlay.header.clone(), below: overlay.below, rows }
    }

    /// Takes the change of row `id` back; whether there was one.
    pub fn unset(&mut self, id: u64) -> bool {
        self.rows.remove(&id).is_some()
    }

    /// Rows changed.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no row is changed.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Writes the overlay to `path`, flushed to disk and put in place in one step.
    ///
    /// # Errors
    /// If the file system refuses; `path` then is as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<ContentHash> {
        let mut body: Vec<u8> = self.rows.keys().flat_map(|id| id.to_le_bytes()).collect();
        self.rows.values().for_each(|row| body.extend_from_slice(row));
        let (table, changed) = (self.header.clone(), self.rows.len() as u64);
        let body_hash = *blake3::hash(&body).as_bytes();
        let head = OverlayHeader { table, changed, below: self.below, body: body_hash }.to_page();
        let file = NewFile::create(path.as_ref())?;
        file.write_all_at(&head, 0)?;
        file.write_all_at(&body, HEADER_BYTES as u64)?;
        file.persist()?;
        Ok(content(&head))
    }
}

/// A table under a stack of overlays: of a row that several change, the topmost counts. The table below is
/// only read; without its overlays it is what it was.
///
/// ```
/// # use engram_store::{AddressIdentity, Overlaid, RowFormat, RowSource, Table, TableOrigin, TableReader, TableWriter};
/// # let folder = tempfile::tempdir()?;
/// # let (path, edits) = (folder.path().join("table"), folder.path().join("edits"));
/// # let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
/// # let mut writer = TableWriter::create(&path, 1000, 4, RowFormat::Bf16, origin)?;
/// # writer.fill(|id, row| row.fill(id as f32), &mut |_| std::ops::ControlFlow::Continue(()))?;
/// # writer.finish()?;
/// let file = TableReader::open_for(&path, &origin)?;
/// let mut table = Overlaid::new(Table::open(&path, &origin)?, file.header(), file.content())?;
/// let mut writer = table.writer();
/// writer.set(256, &[1.0, 2.0, 3.0, 4.0])?;
/// writer.save(&edits)?;
///
/// table.push(&edits)?;
/// let mut rows = [0.0; 8];
/// table.gather(&[256, 255], &mut rows)?;
/// assert_eq!(rows, [1.0, 2.0, 3.0, 4.0, 255.0, 255.0, 255.0, 255.0]);
///
/// table.pop();
/// table.gather(&[256, 255], &mut rows)?;
/// assert_eq!(rows[..4], [256.0; 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Overlaid<S> {
    base: S,
    header: TableHeader,
    content: ContentHash,
    /// From the lowest to the topmost.
    overlays: Vec<Overlay>,
}

impl<S: RowSource> Overlaid<S> {
    /// The rows `base` without overlays: those of the table file with this header and content, wherever they
    /// are kept. [`TableReader`](crate::TableReader) gives both.
    ///
    /// # Errors
    /// If `base` has not the shape and format that `header` says.
    pub fn new(base: S, header: &TableHeader, content: ContentHash) -> Result<Self> {
        let found = (base.rows(), base.width(), base.format());
        if found != (header.rows, header.width, header.format) {
            let value = format!("{} rows of {} values in {}", found.0, found.1, found.2);
            return Err(StoreError::setting("base", value, "the rows of the table whose header is given"));
        }
        Ok(Self { base, header: header.clone(), content, overlays: Vec::new() })
    }

    /// Puts the overlay at `path` on top.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or was made for anything but what is now topmost.
    pub fn push(&mut self, path: impl AsRef<Path>) -> Result<&Overlay> {
        let overlay = Overlay::open(path, self.content())?;
        self.put(overlay)
    }

    /// Puts the overlay at `path` on top, which may have been made for the table alone or for any overlay of the stack:
    /// its rows count, whatever lies between.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or was made for something that is not in the stack.
    pub fn stack(&mut self, path: impl AsRef<Path>) -> Result<&Overlay> {
        let overlay = Overlay::read(path)?;
        let made_for = overlay.below();
        if made_for != self.content && self.overlays.iter().all(|own| own.content() != made_for) {
            let (path, expected) = (overlay.path, self.content);
            return Err(StoreError::WrongBase { path, expected, found: made_for });
        }
        self.put(overlay)
    }

    fn put(&mut self, overlay: Overlay) -> Result<&Overlay> {
        let TableHeader { rows, width, format, origin, .. } = overlay.header;
        let TableHeader { rows: own_rows, width: own_width, format: own_format, .. } = self.header;
        if origin != self.header.origin {
            let (path, found) = (overlay.path, origin);
            return Err(StoreError::WrongOrigin { path, expected: self.header.origin, found });
        }
        if (rows, width, format) != (own_rows, own_width, own_format) {
            let problem = format!(
                "it is for {rows} rows of {width} values in {format}, but the table below has {own_rows} of \
                 {own_width} in {own_format}"
            );
            return Err(StoreError::not_an_overlay(&overlay.path, 12, problem));
        }
        let top = self.overlays.len();
        self.overlays.push(overlay);
        Ok(&self.overlays[top])
    }

    /// Takes the topmost overlay off.
    pub fn pop(&mut self) -> Option<Overlay> {
        self.overlays.pop()
    }

    /// The overlays, from the lowest to the topmost.
    pub fn overlays(&self) -> &[Overlay] {
        &self.overlays
    }

    /// What an overlay on top is made for: the content of the topmost one, or the table's.
    pub fn content(&self) -> ContentHash {
        self.overlays.last().map_or(self.content, Overlay::content)
    }

    /// Begins an overlay for the top of the stack.
    #[cfg(feature = "write")]
    pub fn writer(&self) -> OverlayWriter {
        OverlayWriter::new(&self.header, self.content())
    }

    /// An overlay with the rows in which the table file `edited` differs from this stack: on top, it gives the rows of
    /// `edited`. Every block is checked on the way. Progress is in rows.
    ///
    /// # Errors
    /// If `edited` has another shape, format or origin, is damaged, or rows cannot be read.
    #[cfg(feature = "write")]
    pub fn difference(
        &self,
        edited: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<OverlayWriter> {
        let mut edited = TableReader::open_for(edited, &self.header.origin)?;
        let TableHeader { rows: total, width, format, .. } = self.header;
        let found = edited.header();
        if (found.rows, found.width, found.format) != (total, width, format) {
            let problem = format!(
                "{} rows of {} values in {}, but the table that it is compared with has {total} of {width} in {format}",
                found.rows, found.width, found.format
            );
            return Err(StoreError::not_a_table(edited.path(), 12, problem));
        }
        let (mut writer, row_bytes) = (self.writer(), self.bytes_per_row());
        let (mut ids, mut own) = (Vec::new(), Vec::new());
        while let Some((first, rows)) = edited.next()? {
            let count = (rows.len() / row_bytes) as u64;
            ids.clear();
            ids.extend(first..first + count);
            own.resize(rows.len(), 0);
            self.read(&ids, &mut own)?;
            let pairs = rows.chunks_exact(row_bytes).zip(own.chunks_exact(row_bytes));
            for (id, (row, _)) in (first..).zip(pairs).filter(|(_, (row, own))| row != own) {
                writer.set_encoded(id, row)?;
            }
            report(progress, Progress { done: first + count, total })?;
        }
        Ok(writer)
    }

    /// The rows below.
    pub fn base(&self) -> &S {
        &self.base
    }

    /// Without its overlays.
    pub fn into_base(self) -> S {
        self.base
    }

    /// Writes table and overlays as one new table file, byte for byte, in memory that does not depend on its
    /// size. Progress is in rows.
    ///
    /// # Errors
    /// If rows cannot be read, or the file system refuses `target`, which then is as it was.
    #[cfg(feature = "write")]
    pub fn flatten(
        &self,
        target: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<ContentHash> {
        let TableHeader { rows: total, width, format, origin, .. } = self.header;
        let mut target = TableWriter::create(target, total, width, format, origin)?;
        let (mut ids, mut stored) = (Vec::new(), Vec::new());
        while target.rows_written() < total {
            let first = target.rows_written();
            ids.clear();
            ids.extend(first..total.min(first + rows_per_chunk(width) as u64));
            stored.resize(ids.len() * self.bytes_per_row(), 0);
            self.read(&ids, &mut stored)?;
            target.push_encoded(&stored)?;
            report(progress, Progress { done: target.rows_written(), total })?;
        }
        target.finish()
    }

    /// Row `id` as the topmost overlay that changes it has it.
    fn changed(&self, id: u64) -> Option<&[u8]> {
        self.overlays.iter().rev().find_map(|overlay| overlay.row(id))
    }

    /// Those of `ids` that no overlay changes.
    fn unchanged(&self, ids: &[u64]) -> Vec<u64> {
        ids.iter().copied().filter(|&id| self.changed(id).is_none()).collect()
    }

    /// Fills `out` \[ids, per row\]: changed rows by `put`, all others by `fetch`, which gets their ids.
    fn assemble<T: Copy + Default>(
        &self,
        ids: &[u64],
        out: &mut [T],
        per_row: usize,
        put: impl Fn(&[u8], &mut [T]),
        fetch: impl Fn(&[u64], &mut [T]) -> Result<()>,
    ) -> Result<()> {
        let rest = self.unchanged(ids);
        if rest.len() == ids.len() {
            return fetch(ids, out);
        }
        let mut fetched = vec![T::default(); rest.len() * per_row];
        fetch(&rest, &mut fetched)?;
        let mut fetched = fetched.chunks_exact(per_row);
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(per_row)) {
            if let Some(row) = self.changed(id) {
                put(row, out);
            } else if let Some(row) = fetched.next() {
                out.copy_from_slice(row);
            }
        }
        Ok(())
    }
}

impl<S: RowSource> RowSource for Overlaid<S> {
    fn rows(&self) -> u64 {
        self.base.rows()
    }

    fn width(&self) -> usize {
        self.base.width()
    }

    fn format(&self) -> RowFormat {
        self.base.format()
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        check_read(self, ids, out)?;
        let fetch = |ids: &[u64], out: &mut [u8]| self.base.read(ids, out);
        self.assemble(ids, out, self.bytes_per_row(), |row, out| out.copy_from_slice(row), fetch)
    }

    fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        check_gather(self, ids, out)?;
        let format = self.format();
        let fetch = |ids: &[u64], out: &mut [f32]| self.base.gather(ids, out);
        self.assemble(ids, out, self.width(), |row, out| format.decode_row(row, out), fetch)
    }

    /// Of the rows that are not changed: the others are in memory.
    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        check_rows(ids, self.rows())?;
        let rest = self.unchanged(ids);
        if rest.is_empty() { Ok(()) } else { self.base.prefetch(&rest) }
    }
}
