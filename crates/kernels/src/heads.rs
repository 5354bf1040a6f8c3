//! The heads of a tensor `[batch, time, heads, width]`, each as a separate matrix.

use std::marker::PhantomData;

/// One head of one sequence, writable: `time` rows that are `heads · width` values apart.
///
/// Different heads interleave in memory without sharing values, so each thread may hold one.
pub(crate) struct HeadMut<'a> {
    start: *mut f32,
    time: usize,
    stride: usize,
    width: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a HeadMut has exclusive access to its rows (see `split`), as a `&mut [f32]` has to its
// values, and f32 may move between threads.
unsafe impl Send for HeadMut<'_> {}

impl<'a> HeadMut<'a> {
    /// All heads of `data` `[batch, time, heads, width]`: those of the first sequence, then the next.
    pub(crate) fn split(data: &'a mut [f32], time: usize, heads: usize, width: usize) -> Vec<Self> {
        let sequence = time.checked_mul(heads).and_then(|rows| rows.checked_mul(width)).unwrap_or(0);
        assert!(sequence > 0 && data.len().is_multiple_of(sequence), "not whole sequences of heads");
        let of_sequence = |sequence: &'a mut [f32]| {
            let first = sequence.as_mut_ptr();
            (0..heads).map(move |head| Self {
                start: first.wrapping_add(head * width),
                time,
                stride: heads * width,
                width,
                borrow: PhantomData,
            })
        };
        data.chunks_exact_mut(sequence).flat_map(of_sequence).collect()
    }

    /// The values of this head at `position`.
    pub(crate) fn row(&mut self, position: usize) -> &mut [f32] {
        assert!(position < self.time, "position {position} of {}", self.time);
        // SAFETY: `split` made this head from an exclusively borrowed sequence of time · heads · width
        // values; row `position` of head h covers position · heads · width + h · width and the
        // `width` values from there, within the sequence and disjoint from every other (position,
        // head). `&mut self` keeps two rows of this head from being borrowed at once.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(position * self.stride), self.width) }
    }
}

/// Row `position` of one head in `sequence` `[time, heads, width]`.
pub(crate) fn row(sequence: &[f32], heads: usize, width: usize, position: usize, head: usize) -> &[f32] {
    &sequence[(position * heads + head) * width..][..width]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_belongs_to_one_head() {
        let (batch, time, heads, width) = (2, 3, 4, 5);
        let mut data = vec![0.0; batch * time * heads * width];
        for (index, mut head) in HeadMut::split(&mut data, time, heads, width).into_iter().enumerate() {
            for position in 0..time {
                head.row(position).iter_mut().for_each(|v| *v += (index * time + position + 1) as f32);
            }
        }
        for (index, &value) in data.iter().enumerate() {
            let (b, t, h) = (index / 60, index / 20 % 3, index / 5 % 4);
            assert_eq!(value, ((b * heads + h) * time + t + 1) as f32);
        }
        let sequence = &data[60..];
        assert_eq!(row(sequence, heads, width, 2, 3), [24.0; 5]);
    }

    #[test]
    fn sizes_that_wrap_around_are_refused() {
        for (time, heads, width) in
            [((1 << 62) + 1, 4, 1), (1 << 32, 1 << 32, 1), (4, usize::MAX, 2), (1 << 62, 2, 2)]
        {
            let split = || HeadMut::split(&mut [0.0; 4], time, heads, width).len();
            assert!(std::panic::catch_unwind(split).is_err(), "{time} {heads} {width}");
        }
    }

    #[test]
    #[should_panic(expected = "position 3 of 3")]
    fn refuses_a_row_past_the_end() {
        HeadMut::split(&mut [0.0; 12], 3, 2, 2)[0].row(3);
    }
}
