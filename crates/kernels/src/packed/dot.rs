//! Sums of products of rounded rows with a panel of packed weights, by the machine's best instructions.
//!
//! Within a group (or each half of one, if halves have their own scales), products are summed as whole numbers,
//! exactly, in the fastest order. Groups form one chain: a sum is multiplied by the product of both scales and added in
//! one rounding, followed by the group's minimum times the sum of the row's values, if there is a minimum. So every
//! instruction set gives the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use std::sync::OnceLock;

use super::PANEL;
use super::layout::{Kind, Layout, WithKind};
use super::line::Line;
use super::rounded_rows::RoundedGroup;

/// Instructions that multiply bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instructions {
    /// Portable code, as the compiler translates it.
    Portable,
    /// `vpdpbusd` on 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// `vpdpbusd` on 256 bits.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// `vpmaddubsw` on 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// `smull` and `sadalp` on 128 bits.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Instructions {
    /// The kernels of this machine, the best first.
    pub(super) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let fma = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Self::Avx512Vnni);
            }
            if fma && is_x86_feature_detected!("avxvnni") {
                all.push(Self::AvxVnni);
            }
            if fma {
                all.push(Self::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            all.push(Self::Neon);
        }
        all.push(Self::Portable);
        all
    }

    /// The best kernel of this machine.
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Instructions> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// Adds to `sums` the products of R rows with the columns of `records`. The rows share each pass over bytes.
    /// Numbers with fewer bits are unpacked for each row.
    ///
    /// # Panics
    /// When a row does not have the groups of the records.
    pub(super) fn add<const R: usize>(
        self,
        layout: &Layout,
        records: &[Line],
        rows: [&[RoundedGroup]; R],
        sums: &mut [[f32; PANEL]; R],
    ) {
        let groups = records.len() / layout.lines() * layout.groups;
        assert!(rows.iter().all(|row| row.len() == groups), "rows of other sizes than the weights");
        if layout.with_bytes(Add { instructions: self, records, rows, sums: &mut *sums }).is_none() {
            for (row, sums) in rows.into_iter().zip(sums) {
                let sums = std::array::from_mut(sums);
                layout.with(Add { instructions: self, records, rows: [row], sums });
            }
        }
    }
}

struct Add<'a, const R: usize> {
    instructions: Instructions,
    records: &'a [Line],
    rows: [&'a [RoundedGroup]; R],
    sums: &'a mut [[f32; PANEL]; R],
}

impl<const R: usize> WithKind for Add<'_, R> {
    type Output = ();

    #[inline]
    fn run<K: Kind>(self) {
        let Self { instructions, records, rows, sums } = self;
        match instructions {
            Instructions::Portable => portable::add::<K>(records, &rows, sums),
            // SAFETY: only `available` returns these kernels, after it found the processor's support.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => unsafe { avx512::add::<K, R>(records, rows, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::AvxVnni => unsafe { avx2::vnni::add::<K, R>(records, rows, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { avx2::plain::add::<K, R>(records, rows, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Instructions::Neon => unsafe { neon::add::<K, R>(records, rows, sums) },
        }
    }
}
