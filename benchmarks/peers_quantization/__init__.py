"""The parts of `benchmarks/quantization.py`; `run_*.py` are programs for the peers' own environments."""
