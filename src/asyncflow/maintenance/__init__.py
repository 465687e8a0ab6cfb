"""
Background work that makes every task end: one file per chore.

`chores` lists them with their periods. Any number of maintenance processes may run: chores are
idempotent and safe to run concurrently. `watch` is for the processes that depend on maintenance.
"""
