"""Engine backends; one file per backend, the folder is the registry."""
