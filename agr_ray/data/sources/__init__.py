"""Labelled data sets: one file for each."""
