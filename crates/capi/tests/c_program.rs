//! A program in C uses the library, under valgrind where there is one.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a panic is a test's failure")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use engram_store::{AddressIdentity, RowFormat, Storage, Table, TableOrigin};

/// The folder with the library that was built with this test.
fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let found = test.ancestors().skip(1).take(2).find(|folder| folder.join("libengram.a").exists());
    found.expect("libengram.a beside the test or above it").to_owned()
}

fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn skip(what: &str) {
    // Past the harness, which shows what a test prints only where it fails.
    std::io::stderr().write_all(format!("SKIPPED: {what}\n").as_bytes()).unwrap();
}

/// Compiles a program in C with the static library.
fn compile(source: &str, program: &Path) {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    succeeds(
        Command::new("cc")
            .args(["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-g", "-I"])
            .arg(own.join("include"))
            .arg(own.join(source))
            .arg(library().join("libengram.a"))
            .args(["-lpthread", "-ldl", "-lm", "-o"])
            .arg(program),
    );
}

#[test]
fn a_program_in_c_finds_its_rows_and_survives_its_mistakes() {
    if Command::new("cc").arg("--version").output().is_err() {
        return skip("there is no C compiler, so that the C interface is not tested");
    }
    let folder = tempfile::tempdir().unwrap();
    let (table, other, program) =
        (folder.path().join("rows.table"), folder.path().join("text"), folder.path().join("program"));
    let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
    let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
    Table::from_fn(1000, 4, RowFormat::F32, origin, &Storage::Ram, fill).unwrap().save(&table).unwrap();
    std::fs::write(&other, "no table".repeat(1000)).unwrap();
    let backend = folder.path().join("backend");
    compile("examples/backend.c", &backend);
    assert_eq!(succeeds(Command::new(&backend).arg(&table)), "row 0 begins with the bits 0000\n");
    compile("tests/c/program.c", &program);
    assert_eq!(succeeds(Command::new(&program).args([&table, &other])), "all is well\n");
    if Command::new("valgrind").arg("--version").output().is_err() {
        return skip("valgrind is not installed, so that the C interface's memory is not checked");
    }
    // Threads of rayon and for prefetching live as long as the process: what they hold is still reachable.
    let valgrind =
        ["--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite,indirect", "-q"];
    let said = succeeds(Command::new("valgrind").args(valgrind).arg(&program).args([&table, &other]));
    assert_eq!(said, "all is well\n");
}
