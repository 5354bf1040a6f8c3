//! A table's file that changes under its reader gives errors: no wrong row, and no dead process.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests
#![cfg(unix)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engram_store::{AddressIdentity, RowFormat, RowSource, Storage, StoreError, Table, TableOrigin};

const ROWS: u64 = 20_000;
const WIDTH: usize = 72;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([5; 32]), layer: 1 }
}

/// A table at `path` whose row `id` holds `id` everywhere, opened as a mapping.
fn mapped(path: &Path) -> Table {
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    Table::from_fn(ROWS, WIDTH, RowFormat::F32, origin(), &Storage::Ram, fill).unwrap().save(path).unwrap();
    Table::open(path, &origin()).unwrap()
}

fn gather(table: &Table, ids: &[u64]) -> Result<Vec<f32>, StoreError> {
    let mut out = vec![0.0; ids.len() * WIDTH];
    table.gather(ids, &mut out).map(|()| out)
}

#[test]
fn stored_rows_are_the_bytes_that_gathering_decodes() {
    let folder = tempfile::tempdir().unwrap();
    let table = mapped(&folder.path().join("table"));
    let ids = [7, 19_999, 7, 0];
    let mut stored = vec![0; ids.len() * table.bytes_per_row()];
    table.read(&ids, &mut stored).unwrap();
    let values: Vec<f32> = ids.iter().flat_map(|&id| [id as f32; WIDTH]).collect();
    assert_eq!(stored, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>());
    assert_eq!(gather(&table, &ids).unwrap(), values);
    assert!(matches!(table.read(&[ROWS], &mut stored[..288]), Err(StoreError::RowOutOfRange { .. })));
    assert!(matches!(table.read(&[1], &mut [0; 3]), Err(StoreError::WrongLength { .. })));
}

#[test]
fn a_shortened_file_is_named_with_what_happened_also_for_rows_that_it_still_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let table = mapped(&path);
    gather(&table, &[3]).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    for ids in [vec![19_999], vec![3], (0..ROWS).collect()] {
        let refused = gather(&table, &ids).unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()) && refused.contains("now has 100000"), "{refused}");
    }
    let copy = folder.path().join("copy");
    assert!(table.save(&copy).is_err(), "what is gone cannot be saved");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "and nothing is left of the attempt");
}

#[test]
fn a_file_shortened_and_put_back_is_still_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let table = mapped(&path);
    let good = std::fs::read(&path).unwrap();
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(100_000).unwrap();
    gather(&table, &[19_999]).unwrap_err();
    file.write_all_at(&good, 0).unwrap();
    file.set_modified(modified).unwrap();
    let refused = gather(&table, &[19_999]).unwrap_err();
    let StoreError::RowUnreadable { row, offset, .. } = &refused else { panic!("{refused}") };
    // The fault was in the row, which ends in the page where reading failed.
    assert!(*row <= 19_999 && *offset > 100_000, "{refused}");
    assert_eq!(gather(&Table::open(&path, &origin()).unwrap(), &[7]).unwrap(), [7.0; WIDTH]);
}

#[test]
fn a_file_rewritten_in_place_is_refused_and_one_renamed_over_is_not_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (path, other) = (folder.path().join("table"), folder.path().join("other"));
    let table = mapped(&path);
    mapped(&other);
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(gather(&table, &[11]).unwrap(), [11.0; WIDTH], "the old file is still there for us");

    let table = Table::open(&path, &origin()).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[1; 4], 4096 + 11 * 288).unwrap();
    let refused = gather(&table, &[11]).unwrap_err().to_string();
    assert!(refused.contains("it was written to"), "{refused}");
}

#[test]
fn readers_on_several_threads_get_true_rows_or_an_error_while_the_file_shrinks() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = folder.path().join(format!("table{round}"));
        let table = mapped(&path);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let table = &table;
                scope.spawn(move || {
                    for i in 0..200 {
                        let ids: Vec<u64> = (0..40).map(|k| (k * 499 + i * 31 + thread) % ROWS).collect();
                        let Ok(rows) = gather(table, &ids) else { continue };
                        for (id, row) in ids.iter().zip(rows.chunks(WIDTH)) {
                            assert!(row.iter().all(|&value| value == *id as f32), "row {id}: {row:?}");
                        }
                    }
                });
            }
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            std::thread::yield_now();
            file.set_len(1_000_000).unwrap();
        });
        assert!(gather(&table, &[1]).is_err());
    }
}
