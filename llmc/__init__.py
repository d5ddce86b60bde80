"""llmc compiles a language model, as it is published, into one artifact that a small runtime serves."""

__version__ = "0.1.0"
