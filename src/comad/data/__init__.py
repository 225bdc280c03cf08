"""Pictures in, batches of uint8 views out."""
