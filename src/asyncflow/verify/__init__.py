"""
`asyncflow verify`: tests AsyncFlow's guarantees by fault injection.

A run starts a deployment of its own, real processes on a private PostgreSQL, applies a mixed
workload to it, and lets a nemesis kill, freeze and disconnect its parts. Each party records what it
sees: clients their requests and responses, handlers their executions, the nemesis its faults, and
the database, through triggers, every transition of every task. Afterwards a checker that knows
nothing of AsyncFlow's code compares these histories.

    history    one file of JSON lines per process, with the clock they all share
    workload   the tasks to submit, by seed; `handlers` runs them
    client     submits, cancels, redrives and reads over HTTP
    record     the database's own record of transitions
    role       the privileges of the processes in PostgreSQL, and how they are revoked
    proxy      a connection between one process and one server that can be reset, held or dropped
    fleet      the processes, restarted when they end
    broker     a RabbitMQ, started by the run or given
    clock      a wall clock that can be set wrong
    faults     the faults, each with evidence that it took effect
    nemesis    decides which fault happens when
    checker    the verdict, from the files alone
    figures    counts and recovery times
    timeline   the history of one task
    report     the report of a run, for people and programs
    mutants    known bugs for mutation testing of the checker
    process    runs a process with a wrong clock or a known bug
    run        one run from beginning to end

Events are ordered by the monotonic clock, which all processes of a machine share.
"""
