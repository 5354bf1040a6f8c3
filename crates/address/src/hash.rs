use std::ops::Range;

/// Heads reduced at a time: eight 64-bit lanes fill the widest vector register.
const LANES: usize = 8;

/// One token as the hash sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    /// Its class; that of pad if the token is dead.
    pub(crate) class: u32,
    /// How many positions before it count as themselves; older ones count as pad.
    pub(crate) reach: u16,
    /// Whether it and everything older count as pad for later tokens.
    pub(crate) closes: bool,
}

/// The hash of one memory layer: multiply, xor, remainder by each head's prime.
#[derive(Clone, Debug)]
pub struct LayerAddress {
    layer: usize,
    multipliers: Vec<i64>,
    primes: Vec<Vec<u64>>,
    rows: u64,
    /// `[order][head / LANES]`
    lanes: Vec<Vec<HeadLanes>>,
}

impl LayerAddress {
    /// `multipliers`: one per position of the longest n-gram; `primes`: `[order][head]`, each below 2^32.
    pub(crate) fn new(layer: usize, multipliers: Vec<i64>, primes: Vec<Vec<u64>>) -> Self {
        let mut rows = 0;
        let mut lanes_of = |heads: &[u64]| {
            let lanes = HeadLanes::new(heads, rows);
            rows += heads.iter().sum::<u64>();
            lanes
        };
        let lanes = primes.iter().map(|order| order.chunks(LANES).map(&mut lanes_of).collect()).collect();
        Self { layer, multipliers, primes, rows, lanes }
    }

    /// The id of the block this memory belongs to, 0-based.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Rows of the layer's table: those of all its heads in sequence (order-major, head-minor).
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Row ids per token: orders × heads.
    pub fn slots(&self) -> usize {
        self.primes.len() * self.heads()
    }

    /// Heads per order.
    pub fn heads(&self) -> usize {
        self.primes[0].len()
    }

    /// One per position of the longest n-gram, the current token first.
    pub fn multipliers(&self) -> &[i64] {
        &self.multipliers
    }

    /// Rows of every head: `[order][head]`, 2-grams first.
    pub fn primes(&self) -> &[Vec<u64>] {
        &self.primes
    }

    /// Writes row ids of `positions[first..]` to `out` as `[time, order, head]`. Positions before `first` are only
    /// context. `out` has `slots()` entries for each position.
    pub(crate) fn row_ids(&self, positions: &[Position], first: usize, pad_class: u32, out: &mut [u64]) {
        debug_assert_eq!(out.len(), (positions.len() - first) * self.slots());
        pulp::Arch::new().dispatch(RowIds { layer: self, positions, first, pad_class, out });
    }
}

/// One call of [`LayerAddress::row_ids`], compiled for every instruction set that `pulp` detects at run time.
struct RowIds<'a> {
    layer: &'a LayerAddress,
    positions: &'a [Position],
    first: usize,
    pad_class: u32,
    out: &'a mut [u64],
}

impl pulp::NullaryFnOnce for RowIds<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        // All lanes of a vector are written at once. Lanes of absent heads are overwritten by the next slots or, after
        // the last token, lie beyond the end.
        let slots = self.layer.slots();
        let absent = self.layer.heads().next_multiple_of(LANES) - self.layer.heads();
        let roomy = self.out.len().saturating_sub(absent) / slots;
        self.tokens(0..roomy, |out, rows, _| {
            *out.first_chunk_mut().expect("`roomy` leaves room for every lane") = rows;
        });
        self.tokens(roomy..self.out.len() / slots, |out, rows, heads| {
            out[..heads].copy_from_slice(&rows[..heads]);
        });
    }
}

impl RowIds<'_> {
    /// The rows of some tokens. `write` stores the first `heads` lanes at the beginning of a slice.
    #[inline(always)]
    fn tokens(&mut self, times: Range<usize>, write: impl Fn(&mut [u64], [u64; LANES], usize)) {
        let Self { layer, positions, first, pad_class, ref mut out } = *self;
        let (&current, older) = layer.multipliers.split_first().expect("an n-gram has a current token");
        let mut slot = times.start * layer.slots();
        for now in times.start + first..times.end + first {
            let position = positions[now];
            let mut mix = i64::from(position.class).wrapping_mul(current);
            for (back, (multiplier, lanes)) in (1..).zip(older.iter().zip(&layer.lanes)) {
                let seen = back <= usize::from(position.reach);
                let class = if seen { positions[now - back].class } else { pad_class };
                mix ^= i64::from(class).wrapping_mul(*multiplier);
                for lanes in lanes {
                    write(&mut out[slot..], lanes.rows(mix), lanes.heads);
                    slot += lanes.heads;
                }
            }
        }
    }
}

/// Up to [`LANES`] heads of one order, with the constants of their remainders. Absent heads have one row.
///
/// With mix = high·2^32 + low (high signed), mix ≡ high·carry + low (mod p), where carry = 2^32 mod p < p. That number
/// fits 64 bits, and its quotient by p is at most 2^32 in size. Double arithmetic gives the nearest integer to the
/// quotient with an error of at most one half plus 2^-18. So the remainder lies strictly between −p and p, and is exact
/// after adding p to a negative one. This holds for every 64-bit mix and every p below 2^32.
#[derive(Clone, Debug)]
struct HeadLanes {
    heads: usize,
    prime: [i64; LANES],
    /// 2^32 mod p
    carry: [i64; LANES],
    /// carry / p
    carry_share: [f64; LANES],
    /// 1 / p
    share: [f64; LANES],
    /// The head's first row in the layer's table.
    first_row: [i64; LANES],
}

impl HeadLanes {
    fn new(primes: &[u64], first_row: u64) -> Self {
        let prime: [i64; LANES] =
            std::array::from_fn(|lane| primes.get(lane).map_or(1, |&prime| prime as i64));
        let carry = prime.map(|prime| (1 << 32) % prime);
        let offset = |lane: usize| first_row + primes.iter().take(lane).sum::<u64>();
        Self {
            heads: primes.len(),
            prime,
            carry,
            carry_share: std::array::from_fn(|lane| carry[lane] as f64 / prime[lane] as f64),
            share: prime.map(|prime| 1.0 / prime as f64),
            first_row: std::array::from_fn(|lane| offset(lane) as i64),
        }
    }

    /// `first_row + mix mod prime` (floored) of every head.
    #[inline(always)]
    fn rows(&self, mix: i64) -> [u64; LANES] {
        // Adding this to a small double rounds it to an integer held in the low bits.
        const ROUND: f64 = 6755399441055744.0; // 1.5 · 2^52
        let (high, low) = (mix >> 32, mix & 0xffff_ffff);
        let (high_share, low_share) = (high as f64, low as f64);
        std::array::from_fn(|lane| {
            let folded = high.wrapping_mul(self.carry[lane]).wrapping_add(low);
            let quotient = high_share * self.carry_share[lane] + low_share * self.share[lane];
            let quotient = ((quotient + ROUND).to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
            let remainder = folded.wrapping_sub(quotient.wrapping_mul(self.prime[lane]));
            let remainder = remainder + (self.prime[lane] & (remainder >> 63));
            (remainder + self.first_row[lane]) as u64
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pulp::NullaryFnOnce;

    fn remainders(mix: i64, primes: &[u64]) -> Vec<u64> {
        let of_heads = |heads: &[u64]| {
            let lanes = HeadLanes::new(heads, 0);
            let rows = lanes.rows(mix).into_iter().zip(lanes.first_row);
            rows.take(heads.len()).map(|(row, first)| row - first as u64).collect::<Vec<u64>>()
        };
        primes.chunks(LANES).flat_map(of_heads).collect()
    }

    fn floored(mix: i64, prime: u64) -> u64 {
        i128::from(mix).rem_euclid(i128::from(prime)) as u64
    }

    /// Values whose rounded quotient is most likely off by one: multiples of p and their neighbours.
    fn around_multiples(prime: u64) -> impl Strategy<Value = i64> {
        let last = i64::MAX / prime as i64;
        (prop_oneof![-last..=last, -9..=9i64, Just(last), Just(-last)], -2..=2i64)
            .prop_map(move |(multiple, step)| (multiple * prime as i64).saturating_add(step))
    }

    fn prime() -> impl Strategy<Value = u64> {
        prop_oneof![
            1..=u64::from(u32::MAX),
            1..2000u64,
            15_999_000..16_001_000u64,
            (1 << 32) - 999..1u64 << 32
        ]
    }

    fn primes() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(prime(), 1..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn remainders_of_exact_products_are_u64_remainders(mix in 0..=i64::MAX, primes in primes()) {
            let expected: Vec<u64> = primes.iter().map(|prime| mix as u64 % prime).collect();
            prop_assert_eq!(remainders(mix, &primes), expected);
        }

        #[test]
        fn remainders_of_wrapped_products_are_floored(mix in any::<i64>(), primes in primes()) {
            let expected: Vec<u64> = primes.iter().map(|&prime| floored(mix, prime)).collect();
            prop_assert_eq!(remainders(mix, &primes), expected);
        }

        #[test]
        fn remainders_are_exact_around_multiples(
            (prime, mix) in prime().prop_flat_map(|prime| (Just(prime), around_multiples(prime)))
        ) {
            prop_assert_eq!(remainders(mix, &[prime]), [floored(mix, prime)]);
        }
    }

    #[test]
    fn remainders_are_exact_at_the_ends() {
        let edges =
            [0, 1, -1, i64::MAX, i64::MIN, u32::MAX as i64, 1 << 32, -1 << 32, (1 << 62) + 1, i64::MIN + 1];
        for prime in
            [1, 2, 3, 7, 16_000_057, (1 << 31) - 1, 1 << 31, (1 << 31) + 11, 4_294_967_291, u32::MAX as u64]
        {
            for mix in edges {
                assert_eq!(remainders(mix, &[prime]), [floored(mix, prime)], "{mix} mod {prime}");
            }
        }
    }

    /// The available instruction set, AVX2 alone, and none give the same bits.
    #[test]
    fn every_instruction_set_gives_the_same_ids() {
        let layer = LayerAddress::new(
            1,
            vec![-0x7edc_ba98_7654_3211, 0x1234_5678_9abc_def1, 0x7fff_ffff_ffff_fff1],
            vec![vec![16_000_057, 3, 4_294_967_291, 1009, 7, 11, 13, 17, 19], vec![23; 9]],
        );
        let position =
            |i: u32| Position { class: i.wrapping_mul(2_654_435_761), reach: (i % 3) as u16, closes: false };
        let positions: Vec<Position> = (0..500).map(position).collect();
        let run = |call: &dyn Fn(RowIds<'_>)| {
            let mut out = vec![0; 498 * layer.slots()];
            call(RowIds { layer: &layer, positions: &positions, first: 2, pad_class: 2, out: &mut out });
            out
        };
        let plain = run(&|ids| ids.call());
        assert_eq!(run(&|ids| pulp::Arch::new().dispatch(ids)), plain);
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = pulp::x86::V3::try_new() {
            assert_eq!(run(&|ids| avx2.vectorize(ids)), plain);
        }
    }
}
