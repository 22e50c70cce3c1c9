"""Heads: what the network says of a face, how it learns it, and how it is read out. One file each."""
