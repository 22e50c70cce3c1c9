"""The parts of `train`: starting workers, what they run, read and report."""
