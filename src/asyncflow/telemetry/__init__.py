"""
What happened, told to operators: log lines now, one function per event.
"""
