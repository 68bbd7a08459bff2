"""What klquant knows of a PyTorch model: its layers, how it runs, what feeds what, and hooks on it."""
