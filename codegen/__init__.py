"""From the final graph to an artifact: one target per kernel family, and the artifact's format."""
