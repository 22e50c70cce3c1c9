"""Prediction: from a photograph to faces, and from crops to attributes."""
