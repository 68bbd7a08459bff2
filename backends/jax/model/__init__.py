"""How a JAX function is seen: its jaxpr, the products in it, their names and their weights."""
