"""
Every SQL statement of AsyncFlow, each beside the function that runs it.

    database    one pool per process: bounds, retries, error names
    sqlstates   what each error of PostgreSQL means
    schema      which schema this version needs; `migrations/` makes it
    tasks       submit, read, list, cancel, redrive
    claims      claim, settle, progress: what a worker does under a lease
    admission   which pending tasks may be queued, and hints that were lost
    workers     heartbeats, published handlers, who is dead
    queues      pause and resume
    upkeep      reap, expire, prune
    leadership  one relay among many processes
    wakeups     LISTEN and NOTIFY: hints that something is due

Functions take `db: Executor` first, and `tenant_id` second where they serve a request. Each
transition of `domain.states` is one statement that guards its from-state; each write under a
lease guards `lease_id` too. Statements take batches; a batch of one is the simple case.

Order of locks: rows of `tasks` are locked in id order, or skipped when locked.
"""
