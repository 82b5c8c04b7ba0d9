//! Readers of models, tokenizers and texts.
