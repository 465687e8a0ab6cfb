"""
What operators learn about a running process: log lines, one function per event.
"""
