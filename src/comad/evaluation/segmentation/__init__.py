"""Semantic segmentation with any backbone: UPerNet, or a linear head on frozen features."""
