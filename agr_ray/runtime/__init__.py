"""Prepare, train, evaluate and score on a Ray cluster: the only code that imports ray."""
