"""Where the time of a plan goes, how it is spread, and whether that is good enough. See docs/profiling.md.

One concept per file, in reading order: `stages` (a plan as spans), `histograms`, `planning` (recorded observations),
`loop` (real time), `tracing_cost`, `profiler` (all of it), `profile` (the file), `metrics`, `constraints`,
`comparison`, `chrome_trace`, `plots` and `page`.
"""
