"""Image rows -> rows of faces and rejects -> demographic tables. Pure: reads and writes no file."""
