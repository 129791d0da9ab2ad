"""Data made on the spot from the project's own word lists, so that a fresh machine needs no download."""
