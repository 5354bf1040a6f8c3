//! Loops compiled for the widest vectors that the machine has.

/// Runs `work` compiled for the best instruction set of this machine (AVX-512, AVX2 with FMA, or the one that it is built
/// for, which on ARM has NEON), if it is `#[inline(always)]`: what the compiler leaves outside as too large is compiled
/// for the oldest machine.
#[inline]
pub(crate) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    // The standard library asks the processor once, and then looks the answer up.
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && has_avx2()
        {
            // SAFETY: the processor has every feature that the function is compiled for.
            return unsafe { with_avx512(work) };
        }
        if has_avx2() {
            // SAFETY: as above.
            return unsafe { with_avx2(work) };
        }
    }
    work()
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 1.7e-3).collect();
        let work = || values.iter().map(|value| (value * value + 1.0).sqrt().to_bits()).collect::<Vec<_>>();
        assert_eq!(vectorized(work), work());
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the processor has the features.
            assert_eq!(unsafe { with_avx2(work) }, work());
        }
    }
}
