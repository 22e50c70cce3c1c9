"""Attention blocks over the feature map: one file each."""
