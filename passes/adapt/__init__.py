"""Passes that change what a model's weights are: adapters."""
