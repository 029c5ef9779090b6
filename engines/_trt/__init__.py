"""TensorRT: building, keeping and running engines. Nothing here is imported unless an engine of it is asked for."""
