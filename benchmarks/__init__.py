"""Measurements that README and CHANGELOG quote; run each with `python -m benchmarks.NAME`."""
