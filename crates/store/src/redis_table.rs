//! Rows in a Redis Cluster: tables beyond one machine's memory.
//!
//! | key | holds |
//! |---|---|
//! | `engram:tables` | a set: the origin of every table in the cluster |
//! | `engram:IDENTITY:LAYER` | the header of the table file with that origin, written last |
//! | `engram:IDENTITY:LAYER:contents` | a set: `CONTENT VALUES` of every file of that origin whose rows are here, in part or whole; written first |
//! | `engram:CONTENT:N` | rows N·R … of the file with that content hash, each with a checksum behind it |
//!
//! Several rows share a value, as many (R) as fit 16 KiB: Redis spends some 60 to 100 bytes on a key, which for rows
//! of 264 bytes alone would be a third of the memory. A row is read by `GETRANGE`. Rows of another table cannot be
//! meant, as their keys have another name; that the bytes are this row's is what the checksum says.
//!
//! A table that replaces another of its origin leaves the old rows where they are, for those who still read them, until
//! they are [removed](RedisTable::remove).

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::time::Duration;

use redis::Value;

use crate::deadline::Deadline;
use crate::distinct_rows::DistinctRows;
use crate::error::{Result, StoreError};
use crate::header_page::{HEADER_BYTES, content};
use crate::origin::{ContentHash, TableOrigin};
use crate::progress::{Progress, report};
use crate::redis_cluster::{Batch, Cluster, slot};
use crate::redis_connection::Node;
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, check_read};
use crate::table_file::TableHeader;
use crate::table_reader::TableReader;

/// Bytes of a value, at most, unless one row has more. Redis's allocator has a class of 16 KiB, of which the
/// string's own header takes a little.
const VALUE_BYTES: usize = (16 << 10) - 32;
/// CRC-32 of the row's id and bytes.
const CHECKSUM_BYTES: usize = 4;
const TABLES: &str = "engram:tables";

/// A table in a Redis Cluster. Reading is safe from any number of threads, each of which has its own connections.
///
/// A batch takes at most about the time limit, whatever happens to the cluster and however slowly it answers: it either
/// has all of its rows, or an error. A master that dies is waited for, within the limit, until one of its replicas has
/// taken over.
#[derive(Debug)]
pub struct RedisTable {
    cluster: Cluster,
    header: TableHeader,
    content: ContentHash,
}

impl RedisTable {
    /// Opens the table of `origin` in the cluster that `nodes` belong to, such as `redis://127.0.0.1:7000`; one
    /// that answers is enough. Opening takes at most about `limit`, and so does each batch.
    ///
    /// # Errors
    /// If no node answers, or the cluster holds no complete table of this origin (the error names those it has).
    pub fn open(nodes: &[&str], origin: &TableOrigin, limit: Duration) -> Result<Self> {
        let deadline = Deadline::after(limit);
        let cluster = Cluster::open(nodes, limit, deadline)?;
        let calls = Calls { cluster: &cluster, deadline };
        match calls.header(origin)? {
            Some((header, content)) => Ok(Self { cluster, header, content }),
            None => {
                let (answer, node) = calls.call(TABLES, &["SMEMBERS", TABLES])?;
                let problem =
                    format!("holds {}, but {origin} is needed; load its table first", tables(&answer));
                Err(StoreError::cluster(node, problem))
            }
        }
    }

    /// Copies the rows of the table file at `path` to the cluster that `nodes` belong to, checking them on the way,
    /// in memory that does not depend on the table's size. Until all are there, the cluster offers what it had of
    /// this origin before, if anything. Loading the same file again changes nothing. Progress is in rows.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged, or the cluster does not take a row within `limit`.
    pub fn load(
        path: impl AsRef<Path>,
        nodes: &[&str],
        limit: Duration,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self> {
        let cluster = Cluster::open(nodes, limit, Deadline::after(limit))?;
        let mut file = TableReader::open(path)?;
        let (header, content) = (file.header().clone(), file.content());
        let table = Self { cluster, header, content };
        // Before any row, so that what is given up on is found, too.
        let contents = contents_key(&table.header.origin);
        table.calls().call(&contents, &["SADD", &contents, &member(&content, values(&table.header))])?;
        let row_bytes = table.bytes_per_row();
        let (per_value, total) = (rows_per_value(row_bytes) as u64, table.header.rows);
        let mut values = Values { content, first: 0, values: vec![Vec::new()] };
        while let Some((first, rows)) = file.next()? {
            for (id, row) in (first..).zip(rows.chunks_exact(row_bytes)) {
                if id % per_value == 0 && id > 0 {
                    values.values.push(Vec::new());
                }
                let value = values.values.last_mut().expect("there is always one");
                value.extend_from_slice(row);
                value.extend_from_slice(&checksum(id, row));
            }
            let done = first + (rows.len() / row_bytes) as u64;
            // The last value may still grow, unless the table ends with it.
            let growing = (done < total).then(|| values.values.pop()).flatten();
            table.cluster.run(&mut values)?;
            values.first += values.values.len() as u64;
            values.values.clear();
            values.values.extend(growing);
            report(progress, Progress { done, total })?;
        }
        table.announce(&file.header_bytes())?;
        Ok(table)
    }

    /// Makes the rows known that are now all there.
    fn announce(&self, header: &[u8]) -> Result<()> {
        let origin = self.header.origin;
        let key = header_key(&origin);
        let mut packed = redis::cmd("SET");
        packed.arg(&key).arg(header);
        self.calls().call_packed(&key, packed.get_packed_command())?;
        self.calls().call(TABLES, &["SADD", TABLES, &origin.to_string()])?;
        Ok(())
    }

    /// One command at a time, each within the limit.
    fn calls(&self) -> Calls<'_> {
        Calls { cluster: &self.cluster, deadline: Deadline::after(self.cluster.limit()) }
    }

    /// The contents whose rows of `origin` the cluster that `nodes` belong to holds: the one that it offers, those that
    /// others replaced, and those whose loading was given up on.
    ///
    /// # Errors
    /// If the cluster does not answer within `limit`.
    pub fn contents(nodes: &[&str], origin: &TableOrigin, limit: Duration) -> Result<Vec<StoredContent>> {
        let deadline = Deadline::after(limit);
        let cluster = Cluster::open(nodes, limit, deadline)?;
        Calls { cluster: &cluster, deadline }.contents(origin)
    }

    /// Removes rows of `origin` from the cluster that `nodes` belong to: all of them, or those of the contents that
    /// `which` wants. The table that is offered ends to be offered before its rows go; whoever has it open gets errors
    /// from then on, never wrong rows. Interrupted, it can be begun again. Progress is in values of up to 16 KiB.
    ///
    /// Gives the contents removed.
    ///
    /// # Errors
    /// If the cluster does not answer a batch within `limit`, or `progress` stops it.
    pub fn remove(
        nodes: &[&str],
        origin: &TableOrigin,
        which: impl Fn(&StoredContent) -> bool,
        limit: Duration,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Vec<StoredContent>> {
        let cluster = Cluster::open(nodes, limit, Deadline::after(limit))?;
        let calls = || Calls { cluster: &cluster, deadline: Deadline::after(limit) };
        let removed: Vec<StoredContent> = calls().contents(origin)?.into_iter().filter(which).collect();
        if removed.iter().any(|content| content.offered) {
            let key = header_key(origin);
            calls().call(&key, &["DEL", &key])?;
            calls().call(TABLES, &["SREM", TABLES, &origin.to_string()])?;
        }
        let total = removed.iter().map(|content| content.values).sum();
        let (mut done, key) = (0, contents_key(origin));
        for StoredContent { content, values, .. } in &removed {
            for first in (0..*values).step_by(VALUES_REMOVED_AT_A_TIME as usize) {
                let count = (values - first).min(VALUES_REMOVED_AT_A_TIME);
                cluster.run(&mut Removal { content: *content, first, count: count as usize })?;
                done += count;
                report(progress, Progress { done, total })?;
            }
            calls().call(&key, &["SREM", &key, &member(content, *values)])?;
        }
        Ok(removed)
    }

    /// What the rows belong to.
    pub fn origin(&self) -> TableOrigin {
        self.header.origin
    }

    /// The hash of the table file that was loaded.
    pub fn content(&self) -> ContentHash {
        self.content
    }
}

impl RowSource for RedisTable {
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
        let row_bytes = self.bytes_per_row();
        let distinct = DistinctRows::of(ids);
        if distinct.len() == ids.len() && distinct.ids() == ids {
            return self.cluster.run(&mut Rows { content: self.content, row_bytes, ids, out });
        }
        let mut rows = vec![0; distinct.len() * row_bytes];
        let mut batch = Rows { content: self.content, row_bytes, ids: distinct.ids(), out: &mut rows };
        self.cluster.run(&mut batch)?;
        for (out, &row) in out.chunks_exact_mut(row_bytes).zip(distinct.index()) {
            out.copy_from_slice(&rows[row as usize * row_bytes..][..row_bytes]);
        }
        Ok(())
    }
}

/// Rows to read.
struct Rows<'a> {
    content: ContentHash,
    row_bytes: usize,
    ids: &'a [u64],
    /// \[ids, row bytes\]
    out: &'a mut [u8],
}

impl Rows<'_> {
    /// The key of row `id`, and where it lies in its value.
    fn place(&self, id: u64) -> (String, Range<usize>) {
        let per_value = rows_per_value(self.row_bytes) as u64;
        let stored = self.row_bytes + CHECKSUM_BYTES;
        let start = (id % per_value) as usize * stored;
        (value_key(&self.content, id / per_value), start..start + stored)
    }
}

impl Batch for Rows<'_> {
    fn len(&self) -> usize {
        self.ids.len()
    }

    fn slot(&self, i: usize) -> u16 {
        slot(&self.place(self.ids[i]).0)
    }

    fn pack(&self, i: usize, out: &mut Vec<u8>) {
        let (key, range) = self.place(self.ids[i]);
        pack(
            out,
            &[b"GETRANGE", key.as_bytes(), text(range.start).as_bytes(), text(range.end - 1).as_bytes()],
        );
    }

    fn take(&mut self, i: usize, answer: Value, node: &Node) -> Result<()> {
        let id = self.ids[i];
        let wrong = |problem: &str| {
            let key = self.place(id).0;
            let problem = format!("row {id} (key {key}): {problem}; load the table again");
            Err(StoreError::cluster(node, problem))
        };
        let Value::BulkString(stored) = answer else { return wrong("the answer is no string") };
        if stored.is_empty() {
            return wrong("it is missing; was it evicted, or did its node lose it?");
        }
        if stored.len() != self.row_bytes + CHECKSUM_BYTES {
            let needed = self.row_bytes + CHECKSUM_BYTES;
            return wrong(&format!("{} bytes where {needed} are needed", stored.len()));
        }
        let (row, sum) = stored.split_at(self.row_bytes);
        if *sum != checksum(id, row) {
            return wrong("its bytes do not match its checksum");
        }
        self.out[i * self.row_bytes..][..self.row_bytes].copy_from_slice(row);
        Ok(())
    }
}

/// Values to write.
struct Values {
    content: ContentHash,
    /// The number of the first.
    first: u64,
    values: Vec<Vec<u8>>,
}

impl Batch for Values {
    fn len(&self) -> usize {
        self.values.len()
    }

    fn slot(&self, i: usize) -> u16 {
        slot(&value_key(&self.content, self.first + i as u64))
    }

    fn pack(&self, i: usize, out: &mut Vec<u8>) {
        let key = value_key(&self.content, self.first + i as u64);
        pack(out, &[b"SET", key.as_bytes(), &self.values[i]]);
    }

    fn take(&mut self, _: usize, answer: Value, node: &Node) -> Result<()> {
        match answer {
            Value::Okay => Ok(()),
            other => Err(StoreError::cluster(node, format!("did not store a value: {other:?}"))),
        }
    }
}

/// Rows of one table file in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredContent {
    /// The hash of the table file.
    pub content: ContentHash,
    /// Values that hold its rows, each of up to 16 KiB, or of one row; fewer are there if its loading was given up on.
    pub values: u64,
    /// Whether it is what the cluster offers under its origin.
    pub offered: bool,
}

/// Values that are removed between two reports of progress.
const VALUES_REMOVED_AT_A_TIME: u64 = 16_384;

/// Values to remove.
struct Removal {
    content: ContentHash,
    first: u64,
    count: usize,
}

impl Batch for Removal {
    fn len(&self) -> usize {
        self.count
    }

    fn slot(&self, i: usize) -> u16 {
        slot(&value_key(&self.content, self.first + i as u64))
    }

    fn pack(&self, i: usize, out: &mut Vec<u8>) {
        // Memory is freed by another thread of the node, so that it goes on answering.
        pack(out, &[b"UNLINK", value_key(&self.content, self.first + i as u64).as_bytes()]);
    }

    fn take(&mut self, _: usize, answer: Value, node: &Node) -> Result<()> {
        match answer {
            Value::Int(_) => Ok(()),
            other => Err(StoreError::cluster(node, format!("did not remove a value: {other:?}"))),
        }
    }
}

/// One command.
struct Call {
    slot: u16,
    packed: Vec<u8>,
    answer: Option<(Value, Node)>,
}

impl Batch for Call {
    fn len(&self) -> usize {
        1
    }

    fn slot(&self, _: usize) -> u16 {
        self.slot
    }

    fn pack(&self, _: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.packed);
    }

    fn take(&mut self, _: usize, answer: Value, node: &Node) -> Result<()> {
        self.answer = Some((answer, node.clone()));
        Ok(())
    }
}

/// Commands that have one deadline together.
#[derive(Clone, Copy)]
struct Calls<'a> {
    cluster: &'a Cluster,
    deadline: Deadline,
}

impl Calls<'_> {
    fn call(self, key: &str, words: &[&str]) -> Result<(Value, Node)> {
        let mut packed = Vec::new();
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        pack(&mut packed, &words);
        self.call_packed(key, packed)
    }

    fn call_packed(self, key: &str, packed: Vec<u8>) -> Result<(Value, Node)> {
        let mut call = Call { slot: slot(key), packed, answer: None };
        self.cluster.run_by(self.deadline, &mut call)?;
        Ok(call.answer.expect("a batch that ran has all its answers"))
    }

    /// The header of the table that is offered under `origin`, if one is.
    fn header(self, origin: &TableOrigin) -> Result<Option<(TableHeader, ContentHash)>> {
        let key = header_key(origin);
        let (answer, node) = self.call(&key, &["GET", &key])?;
        let bytes = match answer {
            Value::Nil => return Ok(None),
            Value::BulkString(bytes) => <[u8; HEADER_BYTES]>::try_from(bytes).ok(),
            _ => None,
        };
        let Some(bytes) = bytes else {
            let problem = format!("key {key} does not hold a table's header; load the table again");
            return Err(StoreError::cluster(node, problem));
        };
        let (header, _) = TableHeader::from_bytes(&bytes, Path::new(&key))?;
        if header.origin != *origin {
            let (path, expected, found) = (key.into(), *origin, header.origin);
            return Err(StoreError::WrongOrigin { path, expected, found });
        }
        Ok(Some((header, content(&bytes))))
    }

    fn contents(self, origin: &TableOrigin) -> Result<Vec<StoredContent>> {
        let offered = self.header(origin)?.map(|(header, content)| (content, values(&header)));
        let key = contents_key(origin);
        let (answer, node) = self.call(&key, &["SMEMBERS", &key])?;
        let wrong = || {
            let problem = format!(
                "key {key} does not hold the contents of a table; remove it and load the table again"
            );
            StoreError::cluster(&node, problem)
        };
        let Value::Array(members) = answer else { return Err(wrong()) };
        let mut found = Vec::new();
        for text in members {
            let Value::BulkString(text) = text else { return Err(wrong()) };
            let (content, values) = parse_member(&text).ok_or_else(wrong)?;
            found.push(StoredContent {
                content,
                values,
                offered: offered.is_some_and(|own| own.0 == content),
            });
        }
        // Loaded by a version that kept no list.
        if let Some((content, values)) =
            offered.filter(|own| found.iter().all(|other| other.content != own.0))
        {
            found.push(StoredContent { content, values, offered: true });
        }
        found.sort_by_key(|content| (!content.offered, content.content));
        Ok(found)
    }
}

/// How many values hold the rows of a table.
fn values(header: &TableHeader) -> u64 {
    header.rows.div_ceil(rows_per_value(header.format.bytes_per_row(header.width)) as u64)
}

/// A member of the set of contents.
fn member(content: &ContentHash, values: u64) -> String {
    format!("{content} {values}")
}

fn parse_member(text: &[u8]) -> Option<(ContentHash, u64)> {
    let (content, values) = std::str::from_utf8(text).ok()?.split_once(' ')?;
    Some((content.parse().ok()?, values.parse().ok()?))
}

fn contents_key(origin: &TableOrigin) -> String {
    format!("{}:contents", header_key(origin))
}

/// Appends a command as the protocol has it: its number of words, then each with its length.
fn pack(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

fn text(number: usize) -> String {
    number.to_string()
}

fn rows_per_value(row_bytes: usize) -> usize {
    (VALUE_BYTES / (row_bytes + CHECKSUM_BYTES)).max(1)
}

fn checksum(id: u64, row: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&id.to_le_bytes());
    sum.update(row);
    sum.finalize().to_le_bytes()
}

fn header_key(origin: &TableOrigin) -> String {
    let identity: String =
        origin.identity.as_bytes()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("engram:{identity}:{}", origin.layer)
}

fn value_key(content: &ContentHash, value: u64) -> String {
    let [a, b, c, d, e, f, g, h, ..] = *content.as_bytes();
    format!("engram:{:016x}:{value}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

/// The tables of a cluster, for an error.
fn tables(members: &Value) -> String {
    let Value::Array(members) = members else { return "no table".into() };
    let names = members.iter().filter_map(|member| match member {
        Value::BulkString(name) => Some(String::from_utf8_lossy(name).into_owned()),
        _ => None,
    });
    match names.collect::<Vec<_>>() {
        names if names.is_empty() => "no table".into(),
        names => format!("rows of {}", names.join(", and of ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_packed_as_the_client_packs_them() {
        let mut packed = Vec::new();
        pack(&mut packed, &[b"GETRANGE", b"engram:1:2", b"0", b"267"]);
        let expected = redis::cmd("GETRANGE").arg("engram:1:2").arg(0).arg(267).get_packed_command();
        assert_eq!(packed, expected);
    }

    #[test]
    fn a_content_is_listed_and_read_back() {
        let content = ContentHash::from_bytes([0xa7; 32]);
        assert_eq!(parse_member(member(&content, 61).as_bytes()), Some((content, 61)));
        for wrong in ["", "a7 61", &"a7".repeat(32), &format!("{content} -1"), &format!("{content} 1 2")] {
            assert_eq!(parse_member(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn values_fill_what_the_allocator_gives() {
        assert_eq!(rows_per_value(264), 61);
        assert_eq!(rows_per_value(1 << 20), 1);
    }
}
