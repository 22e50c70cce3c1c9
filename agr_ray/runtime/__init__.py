"""Prepare, train, tune, evaluate and score on a Ray cluster: the only code that imports ray.

A module for each job, whose parts are in a room of its own where there are many, and what several jobs share.
"""
