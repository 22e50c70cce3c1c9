"""Losses, metrics, augmentation, prediction and the training loop. Knows nothing of Ray."""
