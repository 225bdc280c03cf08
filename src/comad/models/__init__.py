"""The networks: one backbone contract, timm backbones behind it, checkpoint formats and teachers."""
