"""Q/DQ nodes: where they go, which grid each uses, and inserting them."""
