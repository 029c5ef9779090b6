"""OpenVLA checkpoints in their published layout: reading, checking, the reference network, export to a model folder.

Kim et al. 2024, arXiv:2406.09246. Nothing in a checkpoint is executed: configuration is JSON, weights are safetensors,
and the network is built from timm's vision transformers and our own decoder.
"""
