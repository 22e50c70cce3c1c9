"""From a photograph to faces, and from crops to attributes."""
