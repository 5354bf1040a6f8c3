//! Lines about requests, on standard error.
//!
//! A thread of its own writes them: where nobody reads the other end of a pipe, or the disk is full, requests are
//! answered all the same. Lines that find no room are counted, and the count is told as soon as lines can be written again.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Lines that wait to be written.
const ROOM: usize = 4096;

/// Takes lines and never waits.
#[derive(Debug)]
pub(crate) struct AccessLog {
    lines: SyncSender<String>,
    lost: Arc<AtomicUsize>,
}

impl AccessLog {
    /// A log that goes to `out`.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn start(out: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (lines, queue) = sync_channel(ROOM);
        let lost = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&lost);
        std::thread::Builder::new().name("access log".into()).spawn(move || write(&queue, out, &counted))?;
        Ok(Self { lines, lost })
    }

    /// Writes a line, or counts it as lost where too many wait.
    pub(crate) fn line(&self, line: String) {
        if self.lines.try_send(line).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }
}

/// Writes lines until no more can come. What cannot be written is lost: there is nowhere else to say so.
fn write(queue: &Receiver<String>, mut out: impl Write, lost: &AtomicUsize) {
    for line in queue {
        let _ = writeln!(out, "{line}");
        let lost = lost.swap(0, Relaxed);
        if lost > 0 {
            let _ =
                writeln!(out, "{lost} lines about requests are lost: standard error takes them too slowly");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Waits for leave before each line, and refuses the first.
    struct Slow {
        leave: Receiver<()>,
        written: Arc<Mutex<String>>,
        refused: bool,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if bytes.contains(&b'\n') {
                let _ = self.leave.recv();
            }
            if !std::mem::replace(&mut self.refused, true) {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            self.written.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_nobody_reads_keeps_nobody_waiting() {
        let written = Arc::new(Mutex::new(String::new()));
        let (allow, leave): (Sender<()>, _) = channel();
        let log = AccessLog::start(Slow { leave, written: Arc::clone(&written), refused: false }).unwrap();
        for number in 0..ROOM + 100 {
            log.line(format!("line {number}"));
        }
        let lost = log.lost.load(Relaxed);
        assert!((98..=100).contains(&lost), "{lost}");
        drop(allow);
        while !written.lock().unwrap().contains(&format!("line {}", ROOM - 1)) {
            std::thread::yield_now();
        }
        let written = written.lock().unwrap();
        assert!(written.contains(" lines about requests are lost"), "{written}");
        assert!(!written.contains("line 0\n"), "the first line met a full disk");
    }
}
