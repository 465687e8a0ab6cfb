"""
A worker: takes tasks, runs their handlers, settles.

    worker     intake, slots, drain: the life of the process
    execute    one attempt, top to bottom
    lease      heartbeats, on a thread and a connection of their own
    pace       how many tasks to hold at once
    isolation  running a handler in the loop, a thread or a child process
"""
