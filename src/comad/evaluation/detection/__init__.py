"""Detection and instance masks with any backbone: Cascade Mask R-CNN on a simple feature pyramid."""
