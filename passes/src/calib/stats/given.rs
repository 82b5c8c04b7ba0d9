//! Statistics of a layer from a file, and for one.

use super::{Kind, LayerStats, Site, Source, Take, bytes, take};
use crate::calib::file::{LayerHead, SiteHead, StatsFile};
use crate::calib::piece;
use crate::pass::PassCx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::weights::Recipe;
use std::collections::BTreeMap;
use std::sync::Arc;

impl LayerStats {
    /// Of a layer in a file: `values` with their columns, whether they go into a cache, and their place among those of that kind.
    /// It is an error when the file does not have all of it.
    pub fn given(
        file: Arc<StatsFile>,
        layer: usize,
        values: &[(ValueId, usize, bool, usize)],
        kinds: &[Kind],
    ) -> Result<LayerStats> {
        let head = &file.head().layers[layer];
        let mut sites = BTreeMap::new();
        for &(v, columns, cache, place) in values {
            let same = |s: &SiteHead| (s.cache, s.place, s.columns) == (cache, place, columns);
            let index = head.sites.iter().position(same).ok_or_else(|| {
                let what = if cache { "what goes into caches" } else { "the rows that products read" };
                Diag::input(format!("it says nothing of {what} in @{}", head.name))
                    .in_file(file.place())
                    .help(format!(
                        "it has {}; take more with `quantc calibrate --stats`",
                        file.head().statistics.join(", ")
                    ))
            })?;
            sites.insert(v, Site { index, columns, read: !cache, divided: vec![], applied: 0, taken: None });
        }
        let known = &file.head().statistics;
        // Magnitudes are taken of all rows that anything is taken of.
        let taken = |kind: &&Kind| **kind == Kind::Absmax || known.iter().any(|k| k == kind.name());
        if let Some(missing) = kinds.iter().find(|kind| !taken(kind)) {
            let text = format!("it has no statistic `{}`; it has {}", missing.name(), known.join(", "));
            return Err(Diag::input(text)
                .in_file(file.place())
                .help("take it with `quantc calibrate --stats`, or give the text with `--data`"));
        }
        let tensor = |kind: &Kind| if let Kind::Tensor(name) = kind { Some(*name) } else { None };
        let take = Take {
            tensors: kinds.iter().filter_map(tensor).collect(),
            hessian: kinds.contains(&Kind::Hessian),
            rows: kinds.contains(&Kind::Rows),
            mean: kinds.contains(&Kind::Mean),
            // Whoever wrote the file decided which rows have a Hessian.
            widest: usize::MAX,
            ..Take::default()
        };
        let options = format!("@{}", head.name);
        let recipe =
            Recipe { step: "statistics of a file", version: 1, options, inputs: vec![file.digest()] };
        Ok(LayerStats { key: recipe.digest(), take, sites, source: Source::File(file, layer) })
    }
}

/// What is known of the function, for a file: it is taken now when it has not been. `None` when nothing is taken there.
pub fn record(cx: &mut PassCx<'_>) -> Result<Option<(LayerHead, Vec<Vec<u8>>)>> {
    let function = cx.function;
    let (store, interrupt, name) = (cx.store, cx.env.interrupt, cx.function_name().to_string());
    let key = piece::layer_key(cx.module, cx.graph(), store)?.to_string();
    let session = cx.session();
    let Some(mut stats) = session.take_about::<LayerStats>(function) else { return Ok(None) };
    take(session, &mut stats, store, interrupt).map_err(|d| d.context(format!("calibrating @{name}")))?;
    let Source::Run(ref start) = stats.source else {
        return Err(Diag::bug("statistics of a file are to be written to one"));
    };
    let bf16 = start.bf16;
    let mut all: Vec<&Site> = stats.sites.values().collect();
    all.sort_by_key(|site| site.index);
    let read = all.iter().filter(|site| site.read).count();
    let (mut sites, mut states) = (vec![], vec![]);
    for site in all {
        let taken = site.taken.as_ref().ok_or_else(|| Diag::bug("statistics that were not taken"))?;
        let known: Vec<_> = taken.states().into_iter().filter(|(name, _)| !bytes::of_half(name)).collect();
        sites.push(SiteHead {
            cache: !site.read,
            place: if site.read { site.index } else { site.index - read },
            columns: site.columns,
            tokens: taken.tokens,
            states: known.iter().map(|(name, state)| (name.clone(), state.len())).collect(),
        });
        states.extend(known.into_iter().map(|(_, state)| state));
    }
    session.put_about(function, stats);
    Ok(Some((LayerHead { name, key, bf16, sites }, states)))
}
