//! A table under overlays is the table with the topmost changes, and without them what it was.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engram_store::{
    AddressIdentity, ContentHash, Overlaid, Overlay, OverlayWriter, RowFormat, RowSource, StoreError, Table,
    TableOrigin, TableReader, TableWriter,
};
use proptest::prelude::*;

const WIDTH: usize = 40;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([4; 32]), layer: 3 }
}

fn value(id: u64, version: u64) -> [f32; WIDTH] {
    std::array::from_fn(|column| (id as f32 + column as f32) * (version as f32 + 1.0))
}

fn table(path: &Path, rows: u64, format: RowFormat) -> ContentHash {
    let mut writer = TableWriter::create(path, rows, WIDTH, format, origin()).unwrap();
    for id in 0..rows {
        writer.push(&value(id, 0)).unwrap();
    }
    writer.finish().unwrap()
}

fn overlaid(path: &Path) -> Overlaid<Table> {
    let file = TableReader::open(path).unwrap();
    Overlaid::new(Table::open(path, &origin()).unwrap(), file.header(), file.content()).unwrap()
}

fn stored(source: &impl RowSource, ids: &[u64]) -> Vec<u8> {
    let mut out = vec![0; ids.len() * source.bytes_per_row()];
    source.read(ids, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_stack_of_overlays_is_a_map_of_the_last_changes(
        rows in 1..300u64,
        changes in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..80), 0..5),
        wanted in prop::collection::vec(any::<u64>(), 0..100),
        format in prop::sample::select(vec![RowFormat::F32, RowFormat::Fp8E4m3, RowFormat::Int4]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        table(&path, rows, format);
        let before = fs::read(&path).unwrap();
        let mut source = overlaid(&path);
        let all: Vec<u64> = (0..rows).collect();
        let mut model: BTreeMap<u64, u64> = all.iter().map(|&id| (id, 0)).collect();
        let mut history = vec![stored(&source, &all)];
        for (version, changes) in (1..).zip(&changes) {
            let mut writer = source.writer();
            for id in changes.iter().map(|id| id % rows) {
                writer.set(id, &value(id, version)).unwrap();
                model.insert(id, version);
            }
            let file = folder.path().join(format!("overlay{version}"));
            let content = writer.save(&file).unwrap();
            prop_assert_eq!(source.push(&file).unwrap().ids().len(), writer.len());
            prop_assert_eq!(source.content(), content);
            history.push(stored(&source, &all));
        }

        let wanted: Vec<u64> = wanted.iter().map(|id| id % rows).collect();
        let mut found = vec![f32::NAN; wanted.len() * WIDTH];
        source.gather(&wanted, &mut found).unwrap();
        let (bytes, row_bytes) = (stored(&source, &wanted), format.bytes_per_row(WIDTH));
        for (i, id) in wanted.iter().enumerate() {
            let (mut row, mut values) = (vec![0; row_bytes], vec![0.0; WIDTH]);
            format.encode_row(&value(*id, model[id]), &mut row);
            format.decode_row(&row, &mut values);
            prop_assert_eq!(&bytes[i * row_bytes..][..row_bytes], row);
            prop_assert_eq!(&found[i * WIDTH..][..WIDTH], values);
        }

        let flat = folder.path().join("flat");
        let content = source.flatten(&flat, &mut |_| ControlFlow::Continue(())).unwrap();
        let flat = Table::open(&flat, &origin()).unwrap();
        flat.verify().unwrap();
        prop_assert_eq!(stored(&flat, &all), history.last().unwrap().clone());
        prop_assert!(content != source.content() || changes.is_empty());

        // Off again, one by one.
        for state in history.iter().rev() {
            prop_assert_eq!(&stored(&source, &all), state);
            source.pop();
        }
        prop_assert_eq!(fs::read(&path).unwrap(), before);
    }
}

/// A table, and an overlay on it.
fn example(folder: &Path) -> (PathBuf, PathBuf, ContentHash) {
    let (path, edits) = (folder.join("table"), folder.join("edits"));
    let base = table(&path, 50, RowFormat::F32);
    let mut writer = overlaid(&path).writer();
    for id in [3, 40, 49] {
        writer.set(id, &value(id, 1)).unwrap();
    }
    writer.save(&edits).unwrap();
    (path, edits, base)
}

#[test]
fn an_overlay_is_refused_on_anything_but_what_it_was_made_for() {
    let folder = tempfile::tempdir().unwrap();
    let (path, edits, base) = example(folder.path());
    let other = folder.path().join("other");
    let other_content = table(&other, 51, RowFormat::F32);
    let refused = overlaid(&other).push(&edits).unwrap_err();
    assert!(matches!(&refused, StoreError::WrongBase { expected, found, .. }
        if (*expected, *found) == (other_content, base)));
    let said = refused.to_string();
    assert!(said.contains(&base.to_string()) && said.contains(&other_content.to_string()), "{said}");

    // In the wrong order, and twice.
    let mut source = overlaid(&path);
    source.push(&edits).unwrap();
    let second = folder.path().join("second");
    source.writer().save(&second).unwrap();
    assert!(matches!(overlaid(&path).push(&second), Err(StoreError::WrongBase { .. })));
    assert!(matches!(source.push(&edits), Err(StoreError::WrongBase { .. })));
    assert_eq!(source.overlays().len(), 1, "a refused overlay changes nothing");

    // A file that claims the right base with other shapes or another layer.
    let mut header = TableReader::open(&path).unwrap().header().clone();
    header.width = 8;
    OverlayWriter::new(&header, source.content()).save(&second).unwrap();
    assert!(source.push(&second).unwrap_err().to_string().contains("50 rows of 8 values in f32"));
    header.width = WIDTH;
    header.origin.layer = 9;
    OverlayWriter::new(&header, source.content()).save(&second).unwrap();
    assert!(matches!(source.push(&second), Err(StoreError::WrongOrigin { .. })));
    header.rows = 51;
    assert!(Overlaid::new(Table::open(&path, &origin()).unwrap(), &header, base).is_err());
    assert!(Overlay::open(&path, base).unwrap_err().to_string().contains("ENGRAMOV"));
}

#[test]
fn every_changed_bit_and_every_length_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_, edits, base) = example(folder.path());
    let whole = fs::read(&edits).unwrap();
    let broken = folder.path().join("broken");
    let places = (0..200).chain(4000..whole.len());
    for place in places {
        let mut bytes = whole.clone();
        bytes[place] ^= 1 << (place % 8);
        fs::write(&broken, bytes).unwrap();
        assert!(Overlay::open(&broken, base).is_err(), "byte {place}");
    }
    for length in (0..whole.len()).step_by(7) {
        fs::write(&broken, &whole[..length]).unwrap();
        assert!(Overlay::open(&broken, base).is_err(), "{length} bytes");
    }
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(&broken, longer).unwrap();
    let refused = Overlay::open(&broken, base).unwrap_err().to_string();
    assert!(refused.contains("damaged at byte 4600") && refused.contains("promises 4600"), "{refused}");
    assert_eq!(Overlay::read(&edits).unwrap().ids(), [3, 40, 49]);
}

#[test]
fn rows_that_are_not_there_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, edits, _) = example(folder.path());
    let mut source = overlaid(&path);
    let mut writer = source.writer();
    assert!(matches!(writer.set(50, &value(0, 0)), Err(StoreError::RowOutOfRange { row: 50, .. })));
    assert!(matches!(writer.set(5, &[0.0; 3]), Err(StoreError::WrongLength { .. })));
    assert!(writer.is_empty());
    source.push(&edits).unwrap();
    let refused = source.gather(&[3, 50], &mut [0.0; 2 * WIDTH]).unwrap_err();
    assert!(matches!(refused, StoreError::RowOutOfRange { row: 50, position: 1, rows: 50 }));
    assert!(source.read(&[3], &mut [0; 7]).is_err());
    assert_eq!(source.overlays()[0].row(50), None);
}

#[test]
fn a_difference_on_top_gives_the_edited_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for format in [RowFormat::F32, RowFormat::Int8] {
        table(&path("base"), 5000, format);
        let mut edited = TableWriter::create(path("edited"), 5000, WIDTH, format, origin()).unwrap();
        for id in 0..5000 {
            edited.push(&value(id, u64::from(id % 700 == 3))).unwrap();
        }
        edited.finish().unwrap();
        let mut source = overlaid(&path("base"));
        // A change below that the edited table has not.
        let mut below = source.writer();
        below.set(10, &[7.0; WIDTH]).unwrap();
        below.save(path("below")).unwrap();
        source.push(path("below")).unwrap();
        let mut done = 0;
        let mut writer = source
            .difference(path("edited"), &mut |at| {
                done = at.done;
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!((writer.len(), done), (9, 5000));
        writer.save(path("edits")).unwrap();
        source.push(path("edits")).unwrap();
        source.flatten(path("flat"), &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(fs::read(path("flat")).unwrap() == fs::read(path("edited")).unwrap());

        // Some changes are taken back.
        let edits = source.pop().unwrap();
        assert!(writer.unset(703) && !writer.unset(704));
        let mut again = OverlayWriter::from_overlay(&edits);
        assert!(again.unset(703));
        again.save(path("again")).unwrap();
        writer.save(path("same")).unwrap();
        assert!(fs::read(path("again")).unwrap() == fs::read(path("same")).unwrap());
        assert_eq!(Overlay::read(path("again")).unwrap().ids(), [3, 10, 1403, 2103, 2803, 3503, 4203, 4903]);
    }
    table(&path("short"), 10, RowFormat::Int8);
    let go_on = &mut |_| ControlFlow::Continue(());
    let refused = overlaid(&path("base")).difference(path("short"), go_on).unwrap_err().to_string();
    assert!(refused.contains("10 rows of 40 values") && refused.contains("has 5000"), "{refused}");
}
