"""The network, and the directory that it is kept in."""
