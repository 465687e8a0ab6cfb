"""
The rules of AsyncFlow as pure values and functions: no I/O and no clock of its own.
"""
