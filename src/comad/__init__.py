"""Distil several frozen self-supervised vision teachers into one compact student."""

__version__ = "0.1.0"
