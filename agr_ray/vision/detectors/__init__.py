"""Face detectors: one file for each."""
