"""Everything fitted on a device and written down with provenance: cost tables, tolerances, clock offsets."""
