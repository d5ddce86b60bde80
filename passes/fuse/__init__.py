"""Tensor ops → ops of language models: norms, rotary embedding, attention, gated MLP, merged projections."""
