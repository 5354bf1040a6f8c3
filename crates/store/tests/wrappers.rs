//! Sources around other sources pass on what they are asked for.
#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

use std::sync::{Arc, Mutex};

use engram_store::{
    AddressIdentity, Cached, Overlaid, Result, RowFormat, RowSource, Storage, Table, TableOrigin, TableReader,
};

const ROWS: u64 = 1000;

/// A table that notes what it is asked to bring near.
struct Noting {
    table: Table,
    asked: Mutex<Vec<u64>>,
}

impl RowSource for Noting {
    fn rows(&self) -> u64 {
        self.table.rows()
    }

    fn width(&self) -> usize {
        self.table.width()
    }

    fn format(&self) -> RowFormat {
        self.table.format()
    }

    fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
        self.table.read(ids, out)
    }

    fn prefetch(&self, ids: &[u64]) -> Result<()> {
        self.asked.lock().unwrap().extend(ids);
        self.table.prefetch(ids)
    }
}

impl Noting {
    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

#[test]
fn what_is_to_come_near_reaches_the_base() {
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([1; 32]), layer: 0 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    let table = Table::from_fn(ROWS, 4, RowFormat::F32, origin, &Storage::Ram, fill).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (path, edits) = (folder.path().join("table"), folder.path().join("edits"));
    table.save(&path).unwrap();
    let file = TableReader::open(&path).unwrap();
    let noting = Arc::new(Noting { table, asked: Mutex::default() });

    let mut overlaid = Overlaid::new(Arc::clone(&noting), file.header(), file.content()).unwrap();
    overlaid.prefetch(&[3, 5, 9]).unwrap();
    assert_eq!(noting.take(), [3, 5, 9]);
    let mut writer = overlaid.writer();
    writer.set(5, &[0.0; 4]).unwrap();
    writer.save(&edits).unwrap();
    overlaid.push(&edits).unwrap();
    overlaid.prefetch(&[3, 5, 9]).unwrap();
    assert_eq!(noting.take(), [3, 9], "a changed row is in memory");

    let cached = Cached::new(Arc::new(overlaid), 1 << 20).unwrap();
    cached.prefetch(&[3, 5, 9]).unwrap();
    assert_eq!(noting.take(), [3, 9]);
    cached.gather(&[9], &mut [0.0; 4]).unwrap();
    cached.prefetch(&[3, 5, 9]).unwrap();
    assert_eq!(noting.take(), [3], "a row that is kept is in memory");
    assert_eq!(cached.counts().misses, 1, "bringing rows near counts as no look-up");

    let boxed: Box<dyn RowSource> = Box::new(cached);
    (&boxed).prefetch(&[3]).unwrap();
    assert_eq!(noting.take(), [3]);
    assert!(boxed.prefetch(&[ROWS]).is_err() && noting.take().is_empty());
}
