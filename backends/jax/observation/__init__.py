"""Statistics of activations, computed on the device inside one jitted function."""
