//! Computes gelu in its tanh form.

use quantc_passes::pass::prelude::*;

pass! {
    /// Computes gelu in its tanh form.
    ///
    /// The tanh form needs no error function. It differs from the exact form by less than 5e-4, so a model that was
    /// trained with the exact form gives other numbers.
    ///
    /// ```qir before
    /// %y = gelu %x
    /// ```
    /// ```qir after
    /// %y = gelu %x {approx}
    /// ```
    "approximate-gelu" => pub struct ApproximateGelu {
        /// Layers left alone, as name patterns. A pattern that matches nothing is an error.
        skip_layers: Vec<Pattern> = vec![],
    }
    scope: Layer, numerics: Requantizes, stats: keeps
}

impl Pass for ApproximateGelu {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if self.skip_layers.any_matches(cx.function_name()) {
            return Ok(Changed::No);
        }
        let mut changed = Changed::No;
        for op in cx.graph().order().to_vec() {
            let node = cx.graph_mut().node_mut(op);
            let Op::Gelu(gelu) = &mut node.op else { continue };
            if gelu.approx {
                continue;
            }
            gelu.approx = true;
            changed = Changed::Yes;
            let place = cx.place(cx.graph().node(op).result);
            cx.remark(place, format_args!("now in the tanh form"));
        }
        Ok(changed)
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip-layers", &self.skip_layers, NameKind::Layer)
    }
}
