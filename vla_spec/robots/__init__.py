"""One file per option; the folder is the registry."""
