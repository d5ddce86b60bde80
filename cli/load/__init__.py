"""`llmc bench --server`: load on any server of the OpenAI API, and what its users would have seen."""
