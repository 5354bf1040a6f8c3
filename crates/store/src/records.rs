//! The rows of a table that learns, each with its optimiser state behind it.

use crate::cache_line::{prefetch, rows_ahead};
use crate::memory::{Buffer, Stretch};

/// Values below which handing work to another thread costs more than it saves.
pub(crate) const VALUES_PER_TASK: usize = 1 << 15;

/// A stretch of consecutive records of a table, to change: each row's values, then its first and second kind of state.
pub(crate) struct RecordsMut<'a> {
    /// The table's id of the first row.
    first: u64,
    /// Of values, and of each kind of state.
    pub(crate) widths: [usize; 3],
    /// \[rows, sum of the widths\], as `f32`s.
    bytes: Stretch<'a>,
}

impl<'a> RecordsMut<'a> {
    /// All records of a table.
    pub(crate) fn all(widths: [usize; 3], bytes: Stretch<'a>) -> Self {
        Self { first: 0, widths, bytes }
    }

    fn record_bytes(&self) -> usize {
        4 * self.widths.iter().sum::<usize>()
    }

    /// The records before that of row `id`, and the rest.
    pub(crate) fn split_at(self, id: u64) -> (Self, Self) {
        let place = (id - self.first) as usize * self.record_bytes();
        let (before, after) = self.bytes.split_at(place);
        (Self { bytes: before, ..self }, Self { first: id, bytes: after, ..self })
    }

    /// The same records, for a while.
    pub(crate) fn reborrow(&mut self) -> RecordsMut<'_> {
        RecordsMut { first: self.first, widths: self.widths, bytes: self.bytes.reborrow() }
    }

    /// Does `work` on the record of every row of `ids` (ascending, all inside) and its part of `beside` \[ids, width\].
    #[inline(always)]
    pub(crate) fn for_each_here<B>(
        mut self,
        ids: &[u64],
        beside: impl Iterator<Item = B>,
        mut work: impl FnMut(&mut [f32], B),
    ) {
        let (first, bytes) = (self.first, self.record_bytes());
        let place = |id: u64| (id - first) as usize * bytes;
        let (ahead, mut buffer) = (rows_ahead(bytes), Buffer::default());
        for (i, (&id, beside)) in ids.iter().zip(beside).enumerate() {
            if let Some(&next) = ids.get(i + ahead) {
                prefetch(self.bytes.address(place(next)), bytes);
            }
            self.bytes.change(place(id), bytes, &mut buffer, |record| {
                work(bytemuck::cast_slice_mut(record), beside)
            });
        }
    }

    /// [`for_each_here`](Self::for_each_here), from several threads where that pays.
    pub(crate) fn for_each(
        self,
        ids: &[u64],
        beside: &mut [f32],
        work: &(impl Fn(&mut [f32], &mut [f32]) + Sync),
    ) {
        let width = self.widths[0];
        if beside.len() <= VALUES_PER_TASK || ids.len() < 2 {
            return self.for_each_here(ids, beside.chunks_exact_mut(width), work);
        }
        let middle = ids.len() / 2;
        let (beside_before, beside_after) = beside.split_at_mut(middle * width);
        let (before, after) = self.split_at(ids[middle]);
        rayon::join(
            || before.for_each(&ids[..middle], beside_before, work),
            || after.for_each(&ids[middle..], beside_after, work),
        );
    }
}
