//! Code for processors that can do more than the baseline of their kind, chosen when it runs.

/// Says which instructions there are. Whoever has one of these may use them.
pub trait Simd: Copy {
    /// AVX2, and what came before and with it: all of x86-64-v3 that the innermost loops have a use for.
    #[cfg(target_arch = "x86_64")]
    const AVX2: bool;
}

#[derive(Clone, Copy)]
pub struct Baseline;

impl Simd for Baseline {
    #[cfg(target_arch = "x86_64")]
    const AVX2: bool = false;
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Simd for Avx2 {
    const AVX2: bool = true;
}

/// What there is to do. Implementations are `inline(always)`, and so are the functions they call that should profit: what
/// is inlined into a function is compiled for the processors of that.
pub trait Job {
    fn run(self, simd: impl Simd);
}

/// Does a job with the best instructions there are.
#[inline(always)]
pub fn run(job: impl Job) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: they are there.
        return unsafe { run_with_avx2(job) };
    }
    job.run(Baseline);
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx2() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_with_avx2(job: impl Job) {
    job.run(Avx2(()));
}
