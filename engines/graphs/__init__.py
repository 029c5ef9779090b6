"""The ONNX graphs that every backend runs, written node by node. Needs the package ``onnx``, never PyTorch."""
