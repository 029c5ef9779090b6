"""PyTorch definitions of the embedded policy and its drafters, and the code that trains them (extra: train)."""
