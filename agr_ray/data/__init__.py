"""Labelled sources of photographs: listing, labels, manifest and splits."""
