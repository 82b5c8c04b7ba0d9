//! The passes of quantc: declaration, registry, pipelines, manager and the passes themselves.
