"""The command line: the folder is the registry. `calibrate_costs.py` is `vla-spec calibrate costs`."""
