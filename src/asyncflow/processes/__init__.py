"""
The only package that assembles the others: one module per kind of process, each a straight line
from settings to a clean exit. `process` has what they share; `supervisor` runs several.
"""
