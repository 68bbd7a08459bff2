"""Inner files of the threshold search."""
