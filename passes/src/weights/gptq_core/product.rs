//! Matrix products with checked bounds, on one thread.
//!
//! Work is spread over threads by whoever calls: each call writes a part of its own, so that what is summed in which
//! order does not depend on the number of threads. It does depend on the processor's vector units: machines that differ
//! in them may differ in the last bits.

/// A number that products are made of.
pub(crate) trait Real: Copy + 'static {}
impl Real for f32 {}
impl Real for f64 {}

/// A matrix within a slice: element `[i, j]` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Real> Mat<'a, T> {
    /// `rows x cols`, of rows that begin `stride` elements apart.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Mat<'a, T> {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len());
        Mat { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Mat<'a, T> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `c = keep * c + factor * a b`, where row `i` of `c` begins at `i * stride`. With `keep` 0, `c` is not read.
pub(crate) fn product<T: Real + Default + PartialEq>(
    c: &mut [T],
    stride: usize,
    keep: T,
    factor: T,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
) {
    let (m, n, depth) = (a.rows, b.cols, a.cols);
    assert_eq!(depth, b.rows);
    if m == 0 || n == 0 {
        return;
    }
    assert!(stride >= n && (m - 1) * stride + n <= c.len());
    // SAFETY: `Mat::new` and the assertion above hold every element of the three matrices within its slice, strides
    // are below `isize::MAX` because slices are, `c` is borrowed alone, and its elements are distinct because rows
    // do not overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            depth,
            c.as_mut_ptr(),
            1,
            stride as isize,
            keep != T::default(),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Rows that are worked on together, next to each other in memory.
pub(crate) const LANES: usize = 16;

/// Transposes `rows x cols` of `from`, rows `cols` apart, into `to`, rows `stride` apart.
pub(crate) fn transpose<T: Copy>(
    from: &[T],
    rows: usize,
    cols: usize,
    from_stride: usize,
    to: &mut [T],
    stride: usize,
) {
    for row in (0..rows).step_by(LANES) {
        for col in (0..cols).step_by(LANES) {
            for c in col..cols.min(col + LANES) {
                for r in row..rows.min(row + LANES) {
                    to[c * stride + r] = from[r * from_stride + c];
                }
            }
        }
    }
}
