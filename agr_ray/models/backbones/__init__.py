"""Backbones: one file for each family."""
