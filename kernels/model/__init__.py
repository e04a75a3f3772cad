"""The transformer, its configuration and its checkpoints."""
