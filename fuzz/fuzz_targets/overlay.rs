//! Overlay files: any bytes are an overlay or an error, what is one has the rows that it says, and no changed
//! bit or length passes for it.
//!
//! Input: a byte of what to do to the file, two bytes where, the header's first 156 bytes, then ids and rows.
#![no_main]

use engram_fuzz::{PAGE, file, seal, take};
use engram_store::{Overlay, StoreError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let [what, low, high] = take(&mut rest);
    let place = usize::from(u16::from_le_bytes([low, high]));
    let header: [u8; 156] = take(&mut rest);
    let mut bytes = header.to_vec();
    bytes.resize(PAGE, 0);
    bytes.extend_from_slice(rest);
    bytes[112..144].copy_from_slice(blake3::hash(rest).as_bytes());
    if what % 4 != 3 {
        seal(&mut bytes);
    }
    let whole = Overlay::read(file("overlay", &bytes));
    match what % 4 {
        1 => {
            let place = place % bytes.len();
            bytes[place] ^= 1 << (what >> 5);
            assert!(Overlay::read(file("overlay", &bytes)).is_err(), "a changed bit passed");
        }
        2 => {
            bytes.truncate(place % bytes.len());
            assert!(Overlay::read(file("overlay", &bytes)).is_err(), "a shortened file passed");
        }
        _ => {}
    }
    match whole {
        Ok(overlay) => agrees(&overlay, rest),
        Err(error) => drop(error.to_string()),
    }
});

fn agrees(overlay: &Overlay, body: &[u8]) {
    let (ids, rows) = body.split_at(8 * overlay.ids().len());
    let row_bytes = rows.len() / overlay.ids().len().max(1);
    for (place, (&id, stored)) in overlay.ids().iter().zip(ids.chunks_exact(8)).enumerate() {
        assert_eq!(id.to_le_bytes(), stored);
        assert_eq!(overlay.row(id).expect("one of its rows"), &rows[place * row_bytes..][..row_bytes]);
        for near in [id.wrapping_sub(1), id.wrapping_add(1), id / 2, u64::MAX] {
            assert_eq!(overlay.row(near).is_some(), overlay.ids().binary_search(&near).is_ok());
        }
    }
    let mut other = *overlay.below().as_bytes();
    other[0] ^= 1;
    let wrong = Overlay::open(overlay.path(), engram_store::ContentHash::from_bytes(other));
    assert!(
        matches!(wrong, Err(StoreError::WrongBase { .. }) | Err(StoreError::Damaged { .. }))
            || Overlay::read(overlay.path()).is_err()
    );
}
