"""BatchNorm and ReLU folded into the layers that feed them: decide, apply, verify."""
