"""Images in, batches of uint8 views out."""
