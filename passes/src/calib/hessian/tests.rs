use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn tokens(seed: u64, n: usize, k: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n * k).map(|i| rng.random_range(-1.0..1.0f32) * (1.0 + (i % k % 7) as f32)).collect()
}

/// The definition, in `f64`, with the sum of magnitudes that rounding errors are measured by.
fn plain(x: &[f32], k: usize, i: usize, j: usize) -> (f64, f64) {
    let products = || x.chunks(k).map(|x| f64::from(x[i]) * f64::from(x[j]));
    (products().sum(), products().map(f64::abs).sum())
}

fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn it_is_the_sum_of_outer_products() {
    let sizes = [(1, 1), (3, 5), (70, 33), (40, 300), (513, 257)].into_iter();
    for (seed, ((n, k), rounded)) in sizes.flat_map(|size| [(size, false), (size, true)]).enumerate() {
        let mut x = tokens(seed as u64, n, k);
        let mut h = Hessian::new(k).unwrap();
        // Cut anywhere: blocks of one token and of many.
        let (head, tail) = x.split_at(n / 3 * k);
        for part in [head, tail] {
            if rounded { h.add_rounded(part).unwrap() } else { h.add(part).unwrap() }
        }
        // The instruction rounds twice as often.
        let most = if rounded { 4e-6 } else { 1e-6 };
        if rounded {
            let format = quantc_ir::ty::Float::Bf16.format();
            x.iter_mut().for_each(|x| *x = format.decode(format.encode(*x)));
        }
        assert_eq!((h.k(), h.count()), (k, n as u64));
        let full = h.mirrored();
        for i in 0..k {
            for j in 0..k {
                let (sum, size) = plain(&x, k, i, j);
                let found = f64::from(h.get(i, j));
                assert!((found - sum).abs() <= size * most, "{n} x {k} [{i}, {j}]: {found} for {sum}");
                assert_eq!(full[i * k + j], h.get(i, j));
            }
            assert_eq!(h.diag()[i], h.lower_row(i)[i]);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let (n, k) = (300, 1100);
    let x = tokens(3, n, k);
    for add in [Hessian::add, Hessian::add_rounded] {
        let run = |threads| {
            in_pool(threads, || {
                let mut h = Hessian::new(k).unwrap();
                x.chunks(128 * k).for_each(|x| add(&mut h, x).unwrap());
                h.to_bytes()
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }
}

#[test]
fn scaling_is_what_scaled_tokens_would_give() {
    let (n, k) = (50, 20);
    let x = tokens(4, n, k);
    let s: Vec<f32> = (0..k).map(|i| 10f32.powi(i as i32 % 5 - 2) * 1.3).collect();
    let mut h = Hessian::new(k).unwrap();
    h.add(&x).unwrap();
    let scaled = h.scaled(&s).unwrap();
    assert_eq!(scaled.count(), 50);
    let divided: Vec<f32> = x.iter().enumerate().map(|(i, x)| x / s[i % k]).collect();
    for i in 0..k {
        for j in 0..k {
            let (sum, size) = plain(&divided, k, i, j);
            assert!((f64::from(scaled.get(i, j)) - sum).abs() <= size * 1e-6);
        }
    }
    for bad in [vec![1.0; k - 1], vec![0.0; k], vec![f32::NAN; k]] {
        assert!(h.scaled(&bad).is_err());
    }
    let error = h.scaled(&vec![1e-30; k]).unwrap_err();
    assert!(error.message.contains("too large for f32"), "{error}");
}

#[test]
fn bytes_come_back() {
    for k in [0, 1, 2, 37] {
        let mut h = Hessian::new(k).unwrap();
        h.add(&tokens(5, 9, k)).unwrap();
        let bytes = h.to_bytes();
        assert_eq!(bytes.len(), 16 + 2 * k * (k + 1));
        let back = Hessian::from_bytes(&bytes).unwrap();
        assert!(back == h && back.count() == h.count());
        for cut in [0, 8, 15, bytes.len() - 1] {
            assert!(Hessian::from_bytes(&bytes[..cut.min(bytes.len() - 1)]).is_err());
        }
    }
}

#[test]
fn damaged_bytes_are_refused() {
    let mut h = Hessian::new(2).unwrap();
    h.add(&[1.0, 2.0]).unwrap();
    let good = h.to_bytes();
    let with = |at: usize, x: f32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&x.to_le_bytes());
        Hessian::from_bytes(&bytes).unwrap_err().message
    };
    assert!(with(20, f32::NAN).contains("[1, 0] is not finite"));
    assert!(with(24, -1.0).contains("[1, 1] is negative"));
    for k in [u64::MAX, u64::MAX / 2, 1 << 32, 3] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&k.to_le_bytes());
        assert!(Hessian::from_bytes(&bytes).unwrap_err().message.contains("length"));
    }
}

#[test]
fn what_is_no_token_is_refused_and_changes_nothing() {
    let mut h = Hessian::new(3).unwrap();
    h.add(&[1.0, 2.0, 3.0]).unwrap();
    let before = h.to_bytes();
    assert!(h.add(&[1.0; 4]).is_err());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = h.add(&[0.0, 0.0, 0.0, 0.0, bad, 0.0]).unwrap_err();
        assert!(error.message.starts_with("channel 1 of token 2 is"), "{error}");
    }
    assert!(Hessian::new(0).unwrap().add(&[1.0]).is_err());
    assert!(Hessian::new(usize::MAX / 2).is_err());
    assert_eq!(h.to_bytes(), before);
    h.add(&[]).unwrap();
    h.add_rounded(&[]).unwrap();
    assert_eq!(h.to_bytes(), before);
}

/// Wherever it stands: in the first or the second token of a pair, or in the last one of an odd number; in any panel.
#[test]
fn a_number_that_is_not_finite_is_found() {
    let (n, k) = (3, 70);
    for add in [Hessian::add, Hessian::add_rounded] {
        let mut h = Hessian::new(k).unwrap();
        add(&mut h, &tokens(7, 2, k)).unwrap();
        let before = h.to_bytes();
        for at in 0..n * k {
            let mut x = vec![f32::MAX.sqrt(); n * k];
            x[at] = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 4];
            let error = add(&mut h, &x).unwrap_err();
            let place = format!("channel {} of token {} is", at % k, 2 + at / k);
            assert!(error.message.starts_with(&place), "{place}: {error}");
        }
        assert_eq!(h.to_bytes(), before);
    }
}

#[test]
fn merging_adds() {
    let x = tokens(6, 40, 12);
    let (mut all, mut a, mut b) =
        (Hessian::new(12).unwrap(), Hessian::new(12).unwrap(), Hessian::new(12).unwrap());
    all.add(&x).unwrap();
    a.add(&x[..12 * 15]).unwrap();
    b.add(&x[12 * 15..]).unwrap();
    a.merge(&b).unwrap();
    assert_eq!(a.count(), 40);
    for i in 0..12 {
        for j in 0..12 {
            assert!((a.get(i, j) - all.get(i, j)).abs() <= 1e-3);
        }
    }
    assert!(a.merge(&Hessian::new(13).unwrap()).is_err());
}
