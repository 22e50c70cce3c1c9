"""Heads, one file each: the outputs, the loss and the predictions for one task."""
