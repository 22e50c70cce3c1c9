"""The training loop and its parts: losses, augmentation, sampling, optimisers, validation. Does not depend on Ray."""
