//! Rows read straight from disk are the rows of the file, or an error that names them.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests
#![cfg(unix)]

use std::fs::OpenOptions;
use std::ops::ControlFlow::Continue;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engram_store::{
    AddressIdentity, DirectOptions, DirectTable, QueueKind, RowFormat, RowInit, RowSource, StoreError, Table,
    TableOrigin, TableWriter,
};
use proptest::prelude::*;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([5; 32]), layer: 1 }
}

fn write(path: &Path, rows: u64, width: usize, format: RowFormat) {
    let mut writer = TableWriter::create(path, rows, width, format, origin()).unwrap();
    let init = RowInit::Normal { deviation: 0.02, seed: 3 };
    writer.fill(|id, row| init.fill(id, row), &mut |_| Continue(())).unwrap();
    writer.finish().unwrap();
}

fn open(path: &Path, queue: QueueKind, depth: usize) -> DirectTable {
    let options = DirectOptions::default().depth(depth).queue(queue);
    DirectTable::open(path, &origin(), &options).unwrap()
}

const QUEUES: [QueueKind; 2] = [QueueKind::IoUring, QueueKind::Threads];

/// Reads and gathers `ids` from both and compares.
fn compare(direct: &DirectTable, table: &Table, ids: &[u64]) {
    let mut stored = [0, 1].map(|fill| vec![fill; ids.len() * table.bytes_per_row()]);
    direct.read(ids, &mut stored[0]).unwrap();
    table.read(ids, &mut stored[1]).unwrap();
    assert!(stored[0] == stored[1]);
    let mut values = [0.0, 1.0].map(|fill| vec![fill; ids.len() * table.width()]);
    direct.gather(ids, &mut values[0]).unwrap();
    table.gather(ids, &mut values[1]).unwrap();
    assert!(values[0] == values[1]);
}

#[test]
fn rows_of_any_size_are_those_of_the_mapped_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    // 264 bytes; a page; more than a page; more than the usual buffer; one byte.
    for (format, rows, width) in [
        (RowFormat::Fp8E4m3, 20_000, 256),
        (RowFormat::F32, 700, 1024),
        (RowFormat::F32, 500, 1500),
        (RowFormat::Bf16, 40, 30_001),
        ("fp8e4m3:0.01".parse().unwrap(), 9_000, 1),
    ] {
        write(&path, rows, width, format);
        let table = Table::open(&path, &origin()).unwrap();
        for queue in QUEUES {
            for depth in [1, 7, 128] {
                let direct = open(&path, queue, depth);
                assert_eq!((direct.rows(), direct.width(), direct.format()), (rows, width, format));
                compare(&direct, &table, &[rows - 1, 0, 0, rows / 2, rows - 1, 1]);
                let many: Vec<u64> = (0..2 * rows.min(2_000)).map(|i| i * 7_919 % rows).collect();
                compare(&direct, &table, &many);
                compare(&direct, &table, &[]);
            }
        }
    }
}

#[test]
fn what_is_in_use_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    write(&path, 100, 8, RowFormat::F32);
    let direct = open(&path, QueueKind::Threads, 4);
    assert_eq!(direct.path_in_use().queue, QueueKind::Threads);
    assert!(direct.path_in_use().to_string().starts_with("threads"));
    let direct = open(&path, QueueKind::IoUring, 4);
    let used = direct.path_in_use();
    // Where this runs may refuse either, and then says so.
    assert!(used.queue == QueueKind::IoUring && used.direct || !used.refused.is_empty(), "{used}");
    // Where the kernel gives a ring to anyone, the table has one.
    #[cfg(all(target_os = "linux", feature = "io-uring"))]
    if io_uring::IoUring::new(4).is_ok() {
        assert_eq!(used.queue, QueueKind::IoUring, "{used}");
    }
}

#[test]
fn wrong_ids_lengths_and_options_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    write(&path, 100, 8, RowFormat::F32);
    for queue in QUEUES {
        let direct = open(&path, queue, 4);
        let refused = direct.gather(&[3, 100], &mut [0.0; 16]).unwrap_err();
        assert!(matches!(refused, StoreError::RowOutOfRange { row: 100, position: 1, rows: 100 }));
        assert!(matches!(direct.read(&[3], &mut [0; 31]), Err(StoreError::WrongLength { .. })));
    }
    let options = DirectOptions::default().depth(0);
    assert!(DirectTable::open(&path, &origin(), &options).unwrap_err().to_string().contains("depth"));
    let other = TableOrigin { layer: 2, ..origin() };
    let refused = DirectTable::open(&path, &other, &DirectOptions::default()).unwrap_err();
    assert!(matches!(refused, StoreError::WrongOrigin { .. }));
}

#[test]
fn a_file_that_is_shortened_or_rewritten_is_an_error_and_one_renamed_over_is_not_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("table"), folder.path().join("other"));
    for queue in QUEUES {
        write(&path, 20_000, 72, RowFormat::F32);
        let direct = open(&path, queue, 16);
        write(&other, 20_000, 72, RowFormat::F32);
        std::fs::rename(&other, &path).unwrap();
        let mut row = [0.0; 72];
        direct.gather(&[11], &mut row).unwrap();

        let direct = open(&path, queue, 16);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();
        for ids in [vec![19_999], vec![3], (0..20_000).collect::<Vec<_>>()] {
            let refused = direct.gather(&ids, &mut vec![0.0; ids.len() * 72]).unwrap_err().to_string();
            assert!(refused.contains(path.to_str().unwrap()), "{refused}");
            assert!(refused.contains("now has 100000"), "{refused}");
        }
        write(&path, 20_000, 72, RowFormat::F32);
        let direct = open(&path, queue, 16);
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[1; 4], 4096 + 11 * 288).unwrap();
        let refused = direct.gather(&[11], &mut row).unwrap_err().to_string();
        assert!(refused.contains("it was written to"), "{refused}");
    }
}

#[test]
fn a_damaged_block_is_found_when_a_row_of_it_is_first_read_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    write(&path, 20_000, 72, RowFormat::F32);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1; 4], 4096 + 19_000 * 288).unwrap();
    let options = DirectOptions::default().checked(true);
    let direct = DirectTable::open(&path, &origin(), &options).unwrap();
    direct.gather(&[11], &mut [0.0; 72]).unwrap();
    let refused = direct.gather(&[11, 19_900], &mut [0.0; 144]).unwrap_err().to_string();
    assert!(refused.contains("damaged at byte 5246976") && refused.contains("rows"), "{refused}");
    assert!(direct.verify(&mut |_| Continue(())).is_err());
}

#[test]
fn many_threads_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    write(&path, 20_000, 256, RowFormat::Fp8E4m3);
    let table = Table::open(&path, &origin()).unwrap();
    for queue in QUEUES {
        let direct = open(&path, queue, 8);
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (direct, table) = (&direct, &table);
                scope.spawn(move || {
                    for i in 0..20 {
                        let ids: Vec<u64> = (0..50).map(|k| (k * 499 + i * 31 + thread) % 20_000).collect();
                        compare(direct, table, &ids);
                    }
                });
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_batch_of_any_table(
        rows in 1..3000u64, width in 1..3000usize, depth in 1..40usize, threads in any::<bool>(),
        picks in prop::collection::vec(any::<u64>(), 0..300),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        write(&path, rows, width, RowFormat::Bf16);
        let table = Table::open(&path, &origin()).unwrap();
        let ids: Vec<u64> = picks.iter().map(|pick| pick % rows).collect();
        let queue = if threads { QueueKind::Threads } else { QueueKind::IoUring };
        compare(&open(&path, queue, depth), &table, &ids);
    }
}
