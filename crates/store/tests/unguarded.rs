//! A mapped table leaves the process's signal handlers alone where that is asked for.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]
#![cfg(unix)]

use engram_store::{AddressIdentity, MapOptions, RowFormat, RowSource, Storage, Table, TableOrigin};

/// The address of the process's handler of SIGBUS.
fn handler() -> usize {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call only writes the present one, to a place that is large enough.
    unsafe {
        assert_eq!(libc::sigaction(libc::SIGBUS, std::ptr::null(), action.as_mut_ptr()), 0);
        action.assume_init().sa_sigaction
    }
}

/// The only test of its file, hence of its process: a guard stays until the process ends.
#[test]
fn only_a_guarded_table_installs_a_signal_handler() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([5; 32]), layer: 1 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    Table::from_fn(100, 8, RowFormat::F32, origin, &Storage::Ram, fill).unwrap().save(&path).unwrap();

    let before = handler();
    let table = Table::open_with(&path, &origin, &MapOptions::new().guarded(false)).unwrap();
    let mut rows = [0.0; 16];
    table.gather(&[7, 99], &mut rows).unwrap();
    assert_eq!(rows.map(|value| value as u64), [[7; 8], [99; 8]].concat()[..]);
    assert_eq!(handler(), before, "an unguarded table installed a handler");

    Table::open(&path, &origin).unwrap();
    assert_eq!(handler() != before, cfg!(feature = "sigbus"), "a guarded table is guarded");
}
