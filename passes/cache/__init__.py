"""The KV cache: from the model of one sequence to the ragged paged step."""
