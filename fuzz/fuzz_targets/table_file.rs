//! Table files: any bytes are a table or an error, and no changed bit or length passes for the table.
//!
//! Input: a byte of what to do to the file, two bytes where, the header's first 160 bytes, and rows.
#![no_main]

use std::ops::ControlFlow;
use engram_fuzz::{PAGE, file, folder, seal, sealed_table, take};
use engram_store::{RowSource, Storage, Table, TableHeader, TableReader, TrainableTable};
use libfuzzer_sys::fuzz_target;

const LIMIT: usize = 5 << 18; // a block of 1 MiB and a shorter one

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [what, low, high] = take(&mut rest);
    let place = usize::from(u16::from_le_bytes([low, high]));
    if what % 4 == 3 {
        return as_it_is(rest);
    }
    let header: [u8; 160] = take(&mut rest);
    let Some(mut bytes) = sealed_table(&header, rest, LIMIT) else {
        // Too large for this file, or for any: a header that promises more than the file holds.
        let mut bytes = header.to_vec();
        bytes.resize(PAGE, 0);
        seal(&mut bytes);
        bytes.extend_from_slice(rest);
        let path = file("table", &bytes);
        return assert!(TableHeader::read(path).is_err(), "a table without its rows");
    };
    match what % 4 {
        0 => any(&bytes),
        1 => {
            let place = place * 8 % bytes.len();
            bytes[place] ^= 1 << (what >> 5);
            refused(&bytes);
        }
        _ => {
            bytes.truncate(place % bytes.len());
            refused(&bytes);
        }
    }
});

fn as_it_is(bytes: &[u8]) {
    let path = file("table", bytes);
    let Ok(header) = TableHeader::read(&path) else { return };
    assert!(bytes.len() > 4096, "a header without rows");
    let read = TableReader::open(&path).and_then(|reader| reader.verify(&mut |_| ControlFlow::Continue(())));
    let mapped = Table::open(&path, &header.origin).and_then(|table| table.verify());
    assert_eq!(read.is_ok(), mapped.is_ok(), "readers do not agree");
}

fn refused(bytes: &[u8]) {
    let path = file("table", bytes);
    let read = TableReader::open(&path).and_then(|reader| reader.verify(&mut |_| ControlFlow::Continue(())));
    assert!(read.is_err(), "a changed file passed");
    if let Ok(header) = TableHeader::read(&path) {
        let rows = Table::read(&path, &header.origin, &Storage::Ram);
        let trained = TrainableTable::load(&path, &header.origin, &Storage::Ram);
        assert!(trained.is_err(), "a changed table would learn");
        let table = Table::open(&path, &header.origin).expect("the header was right");
        assert!(table.verify().is_err());
        drop(rows);
    }
}

/// A file whose checksums are right and whose header may say anything.
fn any(bytes: &[u8]) {
    let path = file("table", bytes);
    let header = match TableHeader::read(&path) {
        Ok(header) => header,
        Err(error) => {
            assert!(Table::open(&path, &engram_fuzz::origin()).is_err());
            drop(error.to_string());
            return;
        }
    };
    let mut reader = TableReader::open(&path).expect("as its header");
    reader.verify(&mut |_| ControlFlow::Continue(())).expect("all checksums are right");
    let table = Table::read(&path, &header.origin, &Storage::Ram).expect("all checksums are right");
    let checked = Table::open_checked(&path, &header.origin).expect("as its header");
    let row_bytes = header.format.bytes_per_row(header.width);
    while let Some((first, rows)) = reader.next().expect("all checksums are right") {
        for (id, row) in (first..).zip(rows.chunks_exact(row_bytes)) {
            assert_eq!(row, table.row_bytes(id).expect("a row of the table"));
        }
    }
    let ids = [header.rows - 1, 0, header.rows / 2];
    let (mut rows, mut again) = (vec![0.0; 3 * header.width], vec![0.0; 3 * header.width]);
    table.gather(&ids, &mut rows).expect("rows of the table");
    checked.gather(&ids, &mut again).expect("rows of the table");
    assert!(rows.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()));
    assert!(table.gather(&[header.rows], &mut rows[..header.width]).is_err());

    let mut other = header.origin;
    other.layer ^= 1;
    assert!(Table::open(&path, &other).is_err());
    if let Ok(trained) = TrainableTable::load(&path, &header.origin, &Storage::Ram) {
        let copy = folder().join("copy");
        trained.save(&copy).expect("room for a copy");
        assert_eq!(TableHeader::read(&copy).expect("just written"), header);
    } else {
        assert!(header.training.is_none() || header.format != engram_store::RowFormat::F32);
    }
}
