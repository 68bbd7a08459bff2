"""Scale channels between constants, so that ranges become alike; the model computes the same."""
