"""Quantizers. The maths takes and returns arrays and knows no graph; the walk over the graph is apart.

    maths       rtn  grid  gptq  awq  nf4  gguf/{fit,encode,k_quants}
    graph       attach (a weight becomes codes)   blocks, head (run a graph in pieces)   absorb (fold scales)
    walks       walk, heads   calibrated + gptq_pass, best_pass, tune   awq_pass   nf4_pass   gguf/   keep
    bits        scheme, options (options → passes)   mixed + sensitivity (--bits-per-weight)
    verdict     verdict, quality

A new quantizer is one `Quantizer` (scheme → passes) and its passes, named in the entry points of its package.
"""
