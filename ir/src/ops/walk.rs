//! Walking the elements of a tensor in the order of another: what broadcasting, transposing and cutting share.

/// Positions `start + sum index[a] * strides[a]` for every index below `dims`, the last axis first.
pub(super) struct Walk {
    dims: Vec<usize>,
    strides: Vec<isize>,
    index: Vec<usize>,
    at: isize,
    left: usize,
}

impl Walk {
    pub(super) fn new(dims: &[usize], strides: Vec<isize>, start: isize) -> Walk {
        Walk {
            dims: dims.to_vec(),
            strides,
            index: vec![0; dims.len()],
            at: start,
            left: dims.iter().product(),
        }
    }

    /// The elements of a tensor of extents `from`, repeated to the extents `to`; axes are aligned at the last.
    pub(super) fn broadcast(from: &[usize], to: &[usize]) -> Walk {
        let own = strides(from);
        let ahead = to.len() - from.len();
        let stride = |axis: usize| match axis.checked_sub(ahead) {
            Some(a) if from[a] != 1 => own[a] as isize,
            _ => 0,
        };
        Walk::new(to, (0..to.len()).map(stride).collect(), 0)
    }
}

impl Iterator for Walk {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let at = self.at as usize;
        for axis in (0..self.dims.len()).rev() {
            self.index[axis] += 1;
            self.at += self.strides[axis];
            if self.index[axis] < self.dims[axis] {
                break;
            }
            self.at -= self.strides[axis] * self.dims[axis] as isize;
            self.index[axis] = 0;
        }
        Some(at)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// Row-major strides of extents.
pub(super) fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis] * dims[axis];
    }
    strides
}

/// The index of the element at flat position `at`.
pub(super) fn index_of(mut at: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for axis in (0..dims.len()).rev() {
        index[axis] = at % dims[axis].max(1);
        at /= dims[axis].max(1);
    }
    index
}

/// Extents around an axis: the product of those before it, its own, and the product of those after it.
pub(super) fn around(dims: &[usize], axis: usize) -> (usize, usize, usize) {
    (dims[..axis].iter().product(), dims[axis], dims[axis + 1..].iter().product())
}

/// `index`, counted from the end when it is negative, when it lies below `extent`.
pub(super) fn place(index: i128, extent: usize) -> Option<usize> {
    let index = if index < 0 { index + extent as i128 } else { index };
    usize::try_from(index).ok().filter(|&i| i < extent)
}
