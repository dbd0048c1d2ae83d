"""How training is laid on devices, one file per kind; what a step computes is `engine.training`."""
