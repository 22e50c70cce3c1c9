"""Necks, which pool the feature map: one file each."""
