"""vla_spec: deadline-aware speculative decoding of robot policies."""

__version__ = "0.1.0"
