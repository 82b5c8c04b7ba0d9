//! Passes that learn from data.

crate::passes! {
    calibrate::Calibrate,
}
