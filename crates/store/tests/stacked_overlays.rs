//! Overlays that were made apart from each other lie on one table, in any order.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_store::{
    AddressIdentity, Overlaid, RowFormat, RowSource, StoreError, Table, TableOrigin, TableReader, TableWriter,
};
use proptest::prelude::*;

const ROWS: u64 = 200;
const WIDTH: usize = 32;
const ORIGIN: TableOrigin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };

fn table(folder: &Path, format: RowFormat) -> Overlaid<Table> {
    let path = folder.join(format!("{format}.table"));
    let mut writer = TableWriter::create(&path, ROWS, WIDTH, format, ORIGIN).unwrap();
    let fill = |id: u64, row: &mut [f32]| {
        row.iter_mut().enumerate().for_each(|(i, v)| *v = (id as f32 + i as f32).sin())
    };
    writer.fill(fill, &mut |_| ControlFlow::Continue(())).unwrap();
    writer.finish().unwrap();
    let file = TableReader::open(&path).unwrap();
    Overlaid::new(Table::open(&path, &ORIGIN).unwrap(), file.header(), file.content()).unwrap()
}

/// An overlay for what is topmost on `table`, which sets the rows `ids` to `value`.
fn overlay(folder: &Path, name: &str, table: &Overlaid<Table>, ids: &[u64], value: f32) -> PathBuf {
    let mut writer = table.writer();
    ids.iter().for_each(|&id| writer.set(id, &[value; WIDTH]).unwrap());
    let path = folder.join(name);
    writer.save(&path).unwrap();
    path
}

fn stored(table: &Overlaid<Table>, id: u64) -> Vec<u8> {
    let mut row = vec![0; table.bytes_per_row()];
    table.read(&[id], &mut row).unwrap();
    row
}

#[test]
fn what_an_overlay_was_made_for_must_be_in_the_stack() {
    let folder = tempfile::tempdir().unwrap();
    let mut stack = table(folder.path(), RowFormat::F32);
    let one = overlay(folder.path(), "one", &stack, &[1, 2], 1.0);
    let two = overlay(folder.path(), "two", &stack, &[2, 3], 2.0);
    stack.push(&one).unwrap();
    let on_one = overlay(folder.path(), "on-one", &stack, &[3], 3.0);
    assert!(matches!(stack.push(&two), Err(StoreError::WrongBase { .. })), "it was made for the table alone");
    stack.stack(&two).unwrap();
    stack.stack(&on_one).unwrap();
    let first = |id| {
        let mut row = [0.0; WIDTH];
        stack.gather(&[id], &mut row).unwrap();
        row[0]
    };
    assert_eq!([first(1), first(2), first(3)], [1.0, 2.0, 3.0]);

    let mut other = table(folder.path(), RowFormat::F32);
    assert!(
        matches!(other.stack(&on_one), Err(StoreError::WrongBase { .. })),
        "what it was made for is missing"
    );
    let mut narrow = table(folder.path(), RowFormat::Bf16);
    assert!(matches!(narrow.stack(&one), Err(StoreError::WrongBase { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_row_that_no_overlay_has_is_the_tables_to_the_bit(
        format in prop::sample::select(vec![RowFormat::F32, RowFormat::Bf16, RowFormat::Fp8E4m3, RowFormat::Int4]),
        overlays in prop::collection::vec(prop::collection::btree_set(0_u64..ROWS, 0..20), 0..5),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let bare = table(folder.path(), format);
        let mut stack = table(folder.path(), format);
        for (number, ids) in overlays.iter().enumerate() {
            let ids: Vec<u64> = ids.iter().copied().collect();
            let path = overlay(folder.path(), &format!("{number}"), &bare, &ids, number as f32 + 1.0);
            stack.stack(&path).unwrap();
        }
        for id in 0..ROWS {
            match overlays.iter().rposition(|ids| ids.contains(&id)) {
                None => prop_assert_eq!(stored(&stack, id), stored(&bare, id)),
                Some(topmost) => {
                    let mut row = [0.0; WIDTH];
                    stack.gather(&[id], &mut row).unwrap();
                    prop_assert_eq!(row, [topmost as f32 + 1.0; WIDTH]);
                }
            }
        }
    }
}
