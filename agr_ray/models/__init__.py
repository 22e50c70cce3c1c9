"""The network, and its checkpoints."""
