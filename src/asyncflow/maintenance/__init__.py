"""
What runs in the background so that every task ends: one file per chore.

`chores` lists them with their periods. Any number of maintenance processes may run; the
chores are safe side by side, and the relay elects one of them to send hints.
"""
