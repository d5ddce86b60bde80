"""From a model as it is published (HF folder, hub id, GGUF file, nn.Module) to an `ir.Graph`."""
