"""How good a backbone is: features, kNN, linear probe, the scoreboard. Knows nothing of distillation."""
