"""
Every SQL statement of AsyncFlow, each beside the function that runs it.

    database    one pool per process: bounds, retries, error names
    sqlstates   what each error of PostgreSQL means
    dsn         what becomes of a database URL and its parameters
    schema      which schemas this version runs on; `migrations/` makes them
    columns     the columns of a task, from their declaration in `domain.task`
    submit      new tasks
    read        one task, or a page of many
    steer       cancel, run now, redrive
    admission   which tasks may start now: the one text of it
    claims      claim, progress: what a worker does under a lease
    due         due tasks claimed or listed, and the low-water mark
    settle      how attempts ended
    endings     what the end of a task sets off, in its transaction
    hints       which tasks are queued, and hints that were lost
    workers     heartbeats, published handlers, who is dead
    queues      pause, resume, list
    upkeep      lost leases, expiry, retention
    unserved    due tasks that no worker offers
    presence    whether maintenance is running
    inspection  whether a server is fit for us
    grants      the rights that a role needs
    leadership  one relay among many processes
    wakeups     LISTEN and NOTIFY: hints that something is due

Functions take `db: Executor` first, and `tenant_id` second where they serve a request. Each
transition of `domain.states` is one statement that guards its from-state; each write under a
lease guards `lease_id` too. Statements take batches; a batch of one is the simple case.

Order of locks: rows of `tasks` are locked in id order, or skipped when locked.
"""
