"""What can go wrong, one file per fault: the folder is the registry of `vla-spec stress --faults`."""
