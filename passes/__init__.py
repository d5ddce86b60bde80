"""Graph-to-graph steps: canonicalise, fuse, adapt, quantize, page the cache."""
