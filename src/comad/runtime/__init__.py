"""What any training needs and no method knows: the loop, optimiser, checkpoints, log."""
