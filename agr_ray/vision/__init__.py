"""Bytes to RGB, to faces, to aligned crops with pose and quality. Pure: arrays in, arrays out.

Coordinates are continuous pixel coordinates everywhere: (0, 0) is the outer corner of the first pixel,
whose centre is at (0.5, 0.5). So a change of scale is a plain multiplication.
"""
