"""
The only place that assembles pieces: one module per kind of process, each a straight line from
settings to a clean exit. What they share is in `process`; `supervisor` runs several.
"""
