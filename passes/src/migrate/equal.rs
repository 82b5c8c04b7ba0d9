//! Checks that a pass which claims to change no result changes none.

use crate::calib::Calibrator;
use crate::calib::chain::Start;
use crate::pass::PassCx;
use crate::told::{Same, Told};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::weights::Recipe;

/// Largest relative difference of a layer's results, as rounding in f32 makes it.
pub const LIMIT: f64 = 1e-5;

/// The results of the function as they are now. There is none without data.
pub fn before(cx: &mut PassCx<'_>) -> Result<Option<Start>> {
    let function = cx.function;
    let Some(mut calibrator) = cx.session().take::<Calibrator>() else { return Ok(None) };
    let start = calibrator.probe(cx.module, cx.store, function);
    cx.session().put(calibrator);
    start
}

/// Checks results against those of before, where there is data to do it with, and remarks how far they lie apart.
pub fn tell(cx: &mut PassCx<'_>, before: Option<&Start>) -> Result<()> {
    let Some(before) = before else { return Ok(()) };
    let difference = check(cx, before)?;
    let place = format!("@{}", cx.function_name());
    let text = format_args!("results differ by {difference:.1e} of their size");
    cx.tell(place, text, Told::Same(Same { difference }));
    Ok(())
}

/// Compares with the results now; an error when they differ by more than [`LIMIT`]. The difference is kept in the store, so
/// that a later run need not compute it again.
fn check(cx: &mut PassCx<'_>, before: &Start) -> Result<f64> {
    let Some(after) = self::before(cx)? else { return Err(Diag::bug("the data is gone")) };
    let store = cx.store;
    let calibrator = cx.session().get_mut::<Calibrator>().ok_or_else(|| Diag::bug("the data is gone"))?;
    let inputs = vec![before.boundary.key(), before.piece.key, after.piece.key];
    let recipe = Recipe { step: "difference", version: 1, options: String::new(), inputs };
    let blobs = store.derive(&recipe, 1, &mut |out| {
        out[0].write(&calibrator.difference(before, &after, store)?.to_le_bytes())
    })?;
    let bytes = store.read_blob(blobs[0])?;
    let bytes =
        bytes.try_into().map_err(|_| Diag::input("what the store keeps of a comparison is damaged"))?;
    let difference = f64::from_le_bytes(bytes);
    // Not a number is a difference too.
    if difference <= LIMIT {
        return Ok(difference);
    }
    Err(Diag::bug(format!("results differ by {difference:.1e} of their size, more than {LIMIT:.0e}"))
        .help("the channels' factors lie too far apart for f32; let fewer sites be changed with `skip`"))
}
