//! Statistics in the store.

use super::{Site, SiteStats};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::weights::{Recipe, Store};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Bytes of a function's statistics that are kept in the store, at most.
const KEPT_BYTES: usize = 16 << 20;

/// States by name, with the places of their bytes.
type Places = Vec<(String, Range<usize>)>;

/// A function's statistics in the store.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of each site its index, its rows seen, and its states.
    sites: Vec<(usize, u64, Places)>,
}

/// Keeps what was taken, unless it is large: it can be taken again.
pub(super) fn keep<'a>(store: &Store, recipe: &Recipe, sites: impl Iterator<Item = &'a Site>) -> Result<()> {
    let (mut head, mut payload) = (Kept { sites: vec![] }, vec![]);
    for site in sites {
        let Some(taken) = &site.taken else { continue };
        // Looked at first, so that nothing large is copied.
        let large = taken.hessian.as_ref().map_or(0, |h| 2 * h.k() * (h.k() + 1));
        if large + 4 * taken.rows.len() + payload.len() > KEPT_BYTES {
            return Ok(());
        }
        let mut places = vec![];
        for (name, state) in taken.states() {
            places.push((name, payload.len()..payload.len() + state.len()));
            payload.extend(state);
        }
        head.sites.push((site.index, taken.tokens, places));
    }
    let head = serde_json::to_vec(&head).map_err(|e| Diag::bug(format!("statistics: {e}")))?;
    store.derive(recipe, 1, &mut |out| {
        out[0].write(&(head.len() as u64).to_le_bytes())?;
        out[0].write(&head)?;
        out[0].write(&payload)
    })?;
    Ok(())
}

/// What the store keeps of a site.
pub(super) fn read(blob: &[u8], site: &Site) -> Result<SiteStats> {
    let damaged =
        || Diag::input("what the store keeps of statistics is damaged").help("give another --store");
    let (len, rest) = blob.split_first_chunk().ok_or_else(damaged)?;
    let len = usize::try_from(u64::from_le_bytes(*len)).unwrap_or(usize::MAX);
    let (head, payload) = rest.split_at_checked(len).ok_or_else(damaged)?;
    let head: Kept = serde_json::from_slice(head).map_err(|_| damaged())?;
    let (_, tokens, places) =
        head.sites.iter().find(|(index, ..)| *index == site.index).ok_or_else(damaged)?;
    let state = |(name, place): &'_ (String, Range<usize>)| Some((name.clone(), payload.get(place.clone())?));
    let states: Option<Vec<(String, &[u8])>> = places.iter().map(state).collect();
    let states = states.ok_or_else(damaged)?;
    let states: Vec<(&str, &[u8])> = states.iter().map(|(name, state)| (name.as_str(), *state)).collect();
    SiteStats::from_states(*tokens, site.columns, &states)
}
