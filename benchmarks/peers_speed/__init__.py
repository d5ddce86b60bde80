"""The parts of `benchmarks/speed.py`; `run_*.py` are programs for the environments of the systems."""
