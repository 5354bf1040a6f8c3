//! The memory layout of a panel's numbers and scales: a vector holds the same inputs of many columns.
//!
//! A panel is [`PANEL`] columns (outputs). Its inputs are divided into *records* of one block: 1 or 8 groups of
//! [`GROUP`] inputs, each of [`QUADS`] quads. A quad is the four inputs that the processor's product of bytes sums at
//! once. A record holds, in [`Line`]s of 64 bytes:
//!
//! 1. for each group the numbers. A plane of bytes is `[quad, column, 4]`. A plane of nibbles is `[quad % 4, column,
//! 4]`,
//!    quads 0 to 3 in the low halves and 4 to 7 in the high ones. A plane of pairs of bits is `[quad / 4, column, 4]`,
//!    quad q at bit 2·(q % 4). A plane of bits is `[column, 4]`, quad q at bit q;
//! 2. scales `[group, half, column]` and then minima of the same shape, of one byte each, where groups have their own;
//! 3. the block's scales `[column]`, then its minima, f16.
//!
//! A *tile* is a record of one group with bytes, and with scales and minima in f32. All other layouts are unpacked to
//! tiles. Records take as many bytes as the file's blocks, except that six-bit scales take eight: at most 4 % more.

use half::f16;

use super::PANEL;
use super::line::Line;
use crate::block_format::BlockFormat;
use crate::block_format::numbers::IQ4;
use crate::block_format::scales::{GroupScales, Minimum};

/// Inputs of a group.
pub(super) const GROUP: usize = 32;
/// Inputs that the processor's product of bytes sums at once.
pub(super) const QUAD: usize = 4;
/// Quads of a group.
pub(super) const QUADS: usize = GROUP / QUAD;
/// Columns of a line of quads.
pub(super) const COLUMNS: usize = 16;
/// Lines of a plane of bytes.
const BYTE_LINES: usize = QUADS * PANEL / COLUMNS;
/// What IQ4's indices stand for, 128 added.
pub(super) const IQ4_BYTES: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = IQ4[i] as u8 ^ 0x80;
        i += 1;
    }
    bytes
};

/// The planes of a group's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    /// Bytes.
    Bytes,
    /// Nibbles.
    Nibbles,
    /// Nibbles that are looked up in [`IQ4_BYTES`].
    Table,
    /// Nibbles, then bits: the fifth.
    Five,
    /// Nibbles, then pairs of bits: the fifth and the sixth.
    Six,
    /// Pairs of bits.
    Two,
    /// Pairs of bits, then bits: the third.
    Three,
}

/// How a group's scales, or minima, are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// There are none.
    None,
    /// f32, for each half.
    F32,
    /// The block's, f16.
    Half,
    /// The block's, f16, times a signed byte of the group.
    Bytes,
    /// The block's, f16, times a nibble of the group: the low one for scales, the high one for minima.
    Nibbles,
}

/// The layout of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    name: Name,
    pub(super) numbers: Numbers,
    /// Groups of a record.
    pub(super) groups: usize,
    /// Scales of each group: one, or one for each half of its inputs.
    pub(super) halves: usize,
    pub(super) scales: Scales,
    pub(super) minima: Scales,
    /// Whether minima are subtracted (as stored), or added.
    pub(super) subtracts: bool,
}

/// A layout known when a kernel is compiled.
///
/// The places are constants: functions would remain calls, and accesses would be checked.
pub(super) trait Kind {
    const LAYOUT: Layout;
    /// Lines of a record.
    const LINES: usize = Self::LAYOUT.lines();
    /// Lines of a group's numbers.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 use it"))]
    const NUMBER_LINES: usize = Self::LAYOUT.numbers.lines();
    /// Start of the groups' scales, and of the block's.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 use it"))]
    const SCALES_AT: [usize; 2] = [Self::LAYOUT.scales_at(), Self::LAYOUT.d_at()];
    /// Start of the groups' minima, and of the block's.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only kernels of x86-64 use it"))]
    const MINIMA_AT: [usize; 2] = [Self::LAYOUT.minima_at(), Self::LAYOUT.block_minima_at()];
}

/// The work to do with a layout once it is known.
pub(super) trait WithKind {
    type Output;
    fn run<K: Kind>(self) -> Self::Output;
}

/// Defines a [`Kind`] for each layout.
macro_rules! kinds {
    ($($name:ident: $numbers:ident, $groups:literal x $halves:literal, $scales:ident, $minima:ident, $subtracts:literal;)*) => {
        $(
            pub(super) struct $name;
            impl Kind for $name {
                const LAYOUT: Layout = Layout {
                    name: Name::$name,
                    numbers: Numbers::$numbers,
                    groups: $groups,
                    halves: $halves,
                    scales: Scales::$scales,
                    minima: Scales::$minima,
                    subtracts: $subtracts,
                };
            }
        )*

        /// Which layout it is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Name {
            $($name),*
        }

        impl Layout {
            /// Runs `work` compiled for this layout.
            #[inline]
            pub(super) fn with<W: WithKind>(&self, work: W) -> W::Output {
                match self.name {
                    $(Name::$name => work.run::<$name>()),*
                }
            }
        }
    };
}

kinds! {
    Tile: Bytes, 1 x 1, F32, None, false;
    TileMinima: Bytes, 1 x 1, F32, F32, false;
    TileHalves: Bytes, 1 x 2, F32, None, false;
    TileHalvesMinima: Bytes, 1 x 2, F32, F32, false;
    Q4_0: Nibbles, 1 x 1, Half, None, false;
    Q4_1: Nibbles, 1 x 1, Half, Half, false;
    Q5_0: Five, 1 x 1, Half, None, false;
    Q5_1: Five, 1 x 1, Half, Half, false;
    Q8_0: Bytes, 1 x 1, Half, None, false;
    Iq4Nl: Table, 1 x 1, Half, None, false;
    Q2K: Two, 8 x 2, Nibbles, Nibbles, true;
    Q3K: Three, 8 x 2, Bytes, None, false;
    Q4K: Nibbles, 8 x 1, Bytes, Bytes, true;
    Q5K: Five, 8 x 1, Bytes, Bytes, true;
    Q6K: Six, 8 x 2, Bytes, None, false;
    Iq4Xs: Table, 8 x 1, Bytes, None, false;
}

impl Layout {
    /// Like [`with`](Self::with), for layouts whose numbers are bytes, which several rows share without unpacking; none
    /// for others. So a kernel of several rows need not be compiled for every layout.
    #[inline]
    pub(super) fn with_bytes<W: WithKind>(&self, work: W) -> Option<W::Output> {
        Some(match self.name {
            Name::Tile => work.run::<Tile>(),
            Name::TileMinima => work.run::<TileMinima>(),
            Name::TileHalves => work.run::<TileHalves>(),
            Name::TileHalvesMinima => work.run::<TileHalvesMinima>(),
            Name::Q8_0 => work.run::<Q8_0>(),
            _ => return None,
        })
    }
}

impl Numbers {
    /// Lines of a group.
    #[inline(always)]
    pub(super) const fn lines(self) -> usize {
        match self {
            Self::Bytes => BYTE_LINES,
            Self::Nibbles | Self::Table => BYTE_LINES / 2,
            Self::Five => BYTE_LINES / 2 + BYTE_LINES / 8,
            Self::Six => BYTE_LINES / 2 + BYTE_LINES / 4,
            Self::Two => BYTE_LINES / 4,
            Self::Three => BYTE_LINES / 4 + BYTE_LINES / 8,
        }
    }

    /// Where the second plane begins.
    #[inline(always)]
    pub(super) const fn high(self) -> usize {
        match self {
            Self::Two | Self::Three => BYTE_LINES / 4,
            _ => BYTE_LINES / 2,
        }
    }
}

impl Layout {
    /// The layout of a quantised format; none for floats.
    pub(super) fn of(format: BlockFormat) -> Option<Self> {
        Some(match format {
            BlockFormat::F32 | BlockFormat::F16 | BlockFormat::BF16 => return None,
            BlockFormat::Q4_0 => Q4_0::LAYOUT,
            BlockFormat::Q4_1 => Q4_1::LAYOUT,
            BlockFormat::Q5_0 => Q5_0::LAYOUT,
            BlockFormat::Q5_1 => Q5_1::LAYOUT,
            BlockFormat::Q8_0 => Q8_0::LAYOUT,
            BlockFormat::Q2_K => Q2K::LAYOUT,
            BlockFormat::Q3_K => Q3K::LAYOUT,
            BlockFormat::Q4_K => Q4K::LAYOUT,
            BlockFormat::Q5_K => Q5K::LAYOUT,
            BlockFormat::Q6_K => Q6K::LAYOUT,
            BlockFormat::IQ4_NL => Iq4Nl::LAYOUT,
            BlockFormat::IQ4_XS => Iq4Xs::LAYOUT,
        })
    }

    /// The tile that this layout is unpacked to.
    pub(super) fn tile(&self) -> Self {
        match (self.halves, self.minima) {
            (1, Scales::None) => Tile::LAYOUT,
            (1, _) => TileMinima::LAYOUT,
            (_, Scales::None) => TileHalves::LAYOUT,
            (_, _) => TileHalvesMinima::LAYOUT,
        }
    }

    /// Lines of the scales, or minima, of each group.
    const fn own(&self, scales: Scales) -> usize {
        match scales {
            Scales::None | Scales::Half => 0,
            Scales::F32 => self.groups * self.halves * PANEL / COLUMNS,
            Scales::Bytes | Scales::Nibbles => self.groups * self.halves * PANEL / 64,
        }
    }

    /// Lines of the block's scales, or minima.
    const fn block(scales: Scales) -> usize {
        matches!(scales, Scales::Half | Scales::Bytes | Scales::Nibbles) as usize
    }

    /// Where the groups' scales begin.
    pub(super) const fn scales_at(&self) -> usize {
        self.groups * self.numbers.lines()
    }

    /// Where the groups' minima begin.
    pub(super) const fn minima_at(&self) -> usize {
        match self.minima {
            Scales::Nibbles => self.scales_at(),
            _ => self.scales_at() + self.own(self.scales),
        }
    }

    /// Where the block's scales lie.
    pub(super) const fn d_at(&self) -> usize {
        self.minima_at() + self.own(self.minima)
    }

    /// Where the block's minima lie.
    pub(super) const fn block_minima_at(&self) -> usize {
        self.d_at() + Self::block(self.scales)
    }

    /// Lines of a record.
    pub(super) const fn lines(&self) -> usize {
        self.block_minima_at() + Self::block(self.minima)
    }

    /// Writes the numbers of one column's group.
    pub(super) fn set_numbers(
        &self,
        record: &mut [Line],
        group: usize,
        column: usize,
        numbers: &[u8; GROUP],
    ) {
        let lines = &mut record[group * self.numbers.lines()..][..self.numbers.lines()];
        let (low, high) = lines.split_at_mut(self.numbers.high());
        let set = |plane: &mut [Line], part: usize, bytes: [u8; QUAD]| {
            let line = &mut plane[part * (PANEL / COLUMNS) + column / COLUMNS].0;
            line[column % COLUMNS * QUAD..][..QUAD].copy_from_slice(&bytes);
        };
        // Byte i of all quads of a part, each shifted to its place.
        let merged = |first: usize, count: usize, from: u32, bits: u32| -> [u8; QUAD] {
            std::array::from_fn(|i| {
                let quad = |quad: usize| numbers[(first + quad) * QUAD + i] >> from & ((1 << bits) - 1);
                (0..count).fold(0, |byte, q| byte | quad(q) << (bits as usize * q))
            })
        };
        match self.numbers {
            Numbers::Bytes => {
                for (quad, bytes) in numbers.as_chunks::<QUAD>().0.iter().enumerate() {
                    let plane = if quad < QUADS / 2 { &mut *low } else { &mut *high };
                    set(plane, quad % (QUADS / 2), *bytes);
                }
            }
            Numbers::Nibbles | Numbers::Table | Numbers::Five | Numbers::Six => {
                for quad in 0..QUADS / 2 {
                    let nibble = |quad: usize, i: usize| numbers[quad * QUAD + i] & 15;
                    set(
                        low,
                        quad,
                        std::array::from_fn(|i| nibble(quad, i) | nibble(quad + QUADS / 2, i) << 4),
                    );
                }
            }
            Numbers::Two | Numbers::Three => {
                (0..2).for_each(|half| set(low, half, merged(half * QUADS / 2, QUADS / 2, 0, 2)));
            }
        }
        match self.numbers {
            Numbers::Five => set(high, 0, merged(0, QUADS, 4, 1)),
            Numbers::Three => set(high, 0, merged(0, QUADS, 2, 1)),
            Numbers::Six => {
                (0..2).for_each(|half| set(high, half, merged(half * QUADS / 2, QUADS / 2, 4, 2)))
            }
            _ => {}
        }
    }

    /// Writes the scales of one column's block.
    pub(super) fn set_scales(&self, record: &mut [Line], column: usize, scales: &GroupScales) {
        let all = self.groups * self.halves;
        let byte = |record: &mut [Line], at: usize, index: usize, value: u8| {
            let index = index * PANEL + column;
            record[at + index / 64].0[index % 64] |= value;
        };
        for index in 0..all {
            match self.scales {
                Scales::Bytes => byte(record, self.scales_at(), index, scales.scales[index] as u8),
                Scales::Nibbles => byte(record, self.scales_at(), index, scales.scales[index] as u8 & 15),
                Scales::None | Scales::Half | Scales::F32 => {}
            }
        }
        record[self.d_at()].set_f16(column, scales.d);
        let minimum: f16 = match scales.minimum {
            Minimum::None => return,
            Minimum::Added(minimum) => minimum,
            Minimum::Subtracted(minimum, minima) => {
                for (index, &value) in minima[..all].iter().enumerate() {
                    let value = if self.minima == Scales::Nibbles { value << 4 } else { value };
                    byte(record, self.minima_at(), index, value);
                }
                minimum
            }
        };
        record[self.block_minima_at()].set_f16(column, minimum);
    }

    /// Unpacks a group to a [`tile`](Self::tile).
    #[inline(always)]
    pub(super) fn unpack(&self, record: &[Line], group: usize, tile: &mut [Line]) {
        let layout = self.tile();
        self.unpack_numbers(&record[group * self.numbers.lines()..], tile);
        for half in 0..self.halves {
            self.unpack_scales(record, group, half, &mut tile[layout.scales_at() + 2 * half..][..2]);
            if self.minima != Scales::None {
                self.unpack_minima(record, group, half, &mut tile[layout.minima_at() + 2 * half..][..2]);
            }
        }
    }

    #[inline(always)]
    fn unpack_numbers(&self, lines: &[Line], tile: &mut [Line]) {
        let high = self.numbers.high();
        for quad in 0..QUADS {
            for v in 0..PANEL / COLUMNS {
                let nibble = |i: usize| {
                    let both = lines[quad % (QUADS / 2) * 2 + v].0[i];
                    if quad < QUADS / 2 { both & 15 } else { both >> 4 }
                };
                let pair = |at: usize, i: usize| lines[at + quad / 4 * 2 + v].0[i] >> (2 * (quad % 4)) & 3;
                let bit = |i: usize| lines[high + v].0[i] >> quad & 1;
                let target = &mut tile[quad * 2 + v].0;
                let each = target.iter_mut().enumerate();
                match self.numbers {
                    Numbers::Bytes => *target = lines[quad * 2 + v].0,
                    Numbers::Nibbles => each.for_each(|(i, byte)| *byte = nibble(i)),
                    Numbers::Table => each.for_each(|(i, byte)| *byte = IQ4_BYTES[usize::from(nibble(i))]),
                    Numbers::Five => each.for_each(|(i, byte)| *byte = nibble(i) | bit(i) << 4),
                    Numbers::Six => each.for_each(|(i, byte)| *byte = nibble(i) | pair(high, i) << 4),
                    Numbers::Two => each.for_each(|(i, byte)| *byte = pair(0, i)),
                    Numbers::Three => each.for_each(|(i, byte)| *byte = pair(0, i) | bit(i) << 2),
                }
            }
        }
    }

    #[inline(always)]
    fn unpack_scales(&self, record: &[Line], group: usize, half: usize, target: &mut [Line]) {
        let index = group * self.halves + half;
        for column in 0..PANEL {
            let byte = |at: usize| record[at + index / 2].0[index % 2 * PANEL + column];
            let scale = match self.scales {
                Scales::None => 0.0,
                Scales::F32 => record[self.scales_at() + 2 * half + column / COLUMNS].f32(column % COLUMNS),
                Scales::Half => record[self.d_at()].f16(column),
                Scales::Bytes => record[self.d_at()].f16(column) * f32::from(byte(self.scales_at()) as i8),
                Scales::Nibbles => record[self.d_at()].f16(column) * f32::from(byte(self.scales_at()) & 15),
            };
            target[column / COLUMNS].set_f32(column % COLUMNS, scale);
        }
    }

    #[inline(always)]
    fn unpack_minima(&self, record: &[Line], group: usize, half: usize, target: &mut [Line]) {
        let index = group * self.halves + half;
        for column in 0..PANEL {
            let byte = |at: usize| record[at + index / 2].0[index % 2 * PANEL + column];
            let block = || record[self.block_minima_at()].f16(column);
            let minimum = match self.minima {
                Scales::None => 0.0,
                Scales::F32 => record[self.minima_at() + 2 * half + column / COLUMNS].f32(column % COLUMNS),
                Scales::Half => block(),
                Scales::Bytes => block() * f32::from(byte(self.minima_at())),
                Scales::Nibbles => block() * f32::from(byte(self.minima_at()) >> 4),
            };
            let minimum = if self.subtracts { -minimum } else { minimum };
            target[column / COLUMNS].set_f32(column % COLUMNS, minimum);
        }
    }
}
