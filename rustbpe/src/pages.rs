//! Large pages for large tables.

/// A table of this many equal values, on large pages where the system has them to give.
///
/// Random places of a table of many megabytes miss the processor's cache of page addresses more often than not, and
/// a prefetch waits for that. Counting 100 MB of English takes 0.22 s with large pages and 0.24 s without.
pub fn table<T: Clone>(size: usize, value: T) -> Vec<T> {
    let mut table = Vec::with_capacity(size);
    advise(table.spare_capacity_mut());
    table.resize(size, value);
    table
}

#[cfg(target_os = "linux")]
fn advise<T>(memory: &mut [std::mem::MaybeUninit<T>]) {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    const HUGE_PAGE: c_int = 14;
    const PAGE: usize = 4096;
    let start = memory.as_mut_ptr() as usize;
    let (first, end) = (start.next_multiple_of(PAGE), (start + size_of_val(memory)) / PAGE * PAGE);
    if end > first + (4 << 20) {
        // SAFETY: the pages lie within `memory`, which is ours, and the advice does not change what they hold. A
        // refusal is as good: the pages stay small.
        unsafe {
            madvise(first as *mut c_void, end - first, HUGE_PAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_memory: &mut [std::mem::MaybeUninit<T>]) {}
