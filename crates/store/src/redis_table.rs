//! Rows in a Redis Cluster: tables beyond one machine's memory.
//!
//! | key | holds |
//! |---|---|
//! | `engram:tables` | a set: the origin of every table in the cluster |
//! | `engram:IDENTITY:LAYER` | the header of the table file with that origin, written last |
//! | `engram:CONTENT:N` | rows N·R … of the file with that content hash, each with a checksum behind it |
//!
//! Several rows share a value, as many (R) as fit 16 KiB: Redis spends some 60 to 100 bytes on a key, which for rows
//! of 264 bytes alone would be a third of the memory. A row is read by `GETRANGE`. Rows of another table cannot be
//! meant, as their keys have another name; that the bytes are this row's is what the checksum says.

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::time::Duration;

use redis::Value;

use crate::distinct_rows::DistinctRows;
use crate::error::{Result, StoreError};
use crate::new_file::{Progress, go_on};
use crate::redis_cluster::{Batch, Cluster, Node, slot};
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, check_read};
use crate::table_file::{ContentHash, HEADER_BYTES, TableHeader, TableOrigin};
use crate::table_reader::TableReader;

/// Bytes of a value, at most, unless one row has more. Redis's allocator has a class of 16 KiB, of which the
/// string's own header takes a little.
const VALUE_BYTES: usize = (16 << 10) - 32;
/// CRC-32 of the row's id and bytes.
const CHECKSUM_BYTES: usize = 4;
const TABLES: &str = "engram:tables";

/// A table in a Redis Cluster. Reading is safe from any number of threads, each of which has its own connections.
///
/// A batch takes at most about the time limit, whatever happens to the cluster: it either has all of its rows, or
/// an error. A master that dies is waited for, within the limit, until one of its replicas has taken over.
#[derive(Debug)]
pub struct RedisTable {
    cluster: Cluster,
    header: TableHeader,
    content: ContentHash,
}

impl RedisTable {
    /// Opens the table of `origin` in the cluster that `nodes` belong to, such as `redis://127.0.0.1:7000`; one
    /// that answers is enough. Nothing takes longer than about `limit`.
    ///
    /// # Errors
    /// If no node answers, or the cluster holds no complete table of this origin (the error names those it has).
    pub fn open(nodes: &[&str], origin: &TableOrigin, limit: Duration) -> Result<Self> {
        let cluster = Cluster::open(nodes, limit)?;
        let key = header_key(origin);
        let (answer, node) = call(&cluster, &key, &["GET", &key])?;
        let Value::BulkString(bytes) = answer else {
            let (answer, _) = call(&cluster, TABLES, &["SMEMBERS", TABLES])?;
            return Err(StoreError::cluster(
                node,
                format!("holds {}, but {origin} is needed; load its table first", tables(&answer)),
            ));
        };
        let Ok(bytes) = <[u8; HEADER_BYTES]>::try_from(bytes) else {
            let problem = format!("key {key} does not hold a table's header; load the table again");
            return Err(StoreError::cluster(node, problem));
        };
        let (header, _) = TableHeader::from_bytes(&bytes, Path::new(&key))?;
        if header.origin != *origin {
            return Err(StoreError::WrongOrigin {
                path: key.into(),
                expected: *origin,
                found: header.origin,
            });
        }
        Ok(Self { cluster, header, content: ContentHash::of_header(&bytes) })
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
        let cluster = Cluster::open(nodes, limit)?;
        let mut file = TableReader::open(path)?;
        let (header, content) = (file.header().clone(), file.content());
        let table = Self { cluster, header, content };
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
            go_on(progress, Progress { done, total })?;
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
        call_packed(&self.cluster, &key, packed.get_packed_command())?;
        call(&self.cluster, TABLES, &["SADD", TABLES, &origin.to_string()])?;
        Ok(())
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

fn call(cluster: &Cluster, key: &str, words: &[&str]) -> Result<(Value, Node)> {
    let mut packed = Vec::new();
    let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
    pack(&mut packed, &words);
    call_packed(cluster, key, packed)
}

fn call_packed(cluster: &Cluster, key: &str, packed: Vec<u8>) -> Result<(Value, Node)> {
    let mut call = Call { slot: slot(key), packed, answer: None };
    cluster.run(&mut call)?;
    Ok(call.answer.expect("a batch that ran has all its answers"))
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
    fn values_fill_what_the_allocator_gives() {
        assert_eq!(rows_per_value(264), 61);
        assert_eq!(rows_per_value(1 << 20), 1);
    }
}
