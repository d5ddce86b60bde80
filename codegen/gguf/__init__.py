"""Target `gguf`: the compiled model as a file that llama.cpp and its kin load."""
