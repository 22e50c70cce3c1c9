"""The parts of `tune` that use Ray Tune: its callbacks, and one trial."""
