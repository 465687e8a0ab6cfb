"""
A worker: takes tasks, runs their handlers, settles.

    worker     its life, as a table of phases
    intake     how claims come in and find a slot
    attempt    one attempt, top to bottom
    settler    settles in natural batches
    lease      heartbeats, on a thread and a connection of their own
    pace       how far ahead to claim
    progress   what handlers report, on its way to PostgreSQL
    stall      what becomes of attempts when a handler blocks the event loop
    times      how long a worker waits
    isolation  runs a handler on the loop, in a thread or in a child process
"""
