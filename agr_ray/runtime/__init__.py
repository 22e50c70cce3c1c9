"""Prepare, train, tune, evaluate and score on a Ray cluster: the only code that imports ray.

There is a module for each job, packages with the parts of the larger jobs, and modules that several jobs share.
"""
