"""Contract tests: they find every plugin and hold it to its interface."""
