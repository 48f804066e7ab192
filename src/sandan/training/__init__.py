"""What every trainer adds to transformers' own: whole checkpoints, exact resumption, guards."""
