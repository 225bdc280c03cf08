"""Teachers from scratch: MAE, MoCo v3, iBOT, on the same loop as the distillation."""
