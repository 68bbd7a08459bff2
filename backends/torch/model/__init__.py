"""A PyTorch model as klquant sees it: layers, forward, dataflow, hooks, edits of a copy."""
