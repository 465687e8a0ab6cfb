"""
Running a handler, and stopping it: on the event loop, in a thread or in a child process.

    isolation    where a worker's attempts begin: `Isolation.prepare` makes a `Run`
    run          one call of a handler: its time, its request to stop, its end
    loop         an `async def` handler, awaited in the task of its attempt
    thread       a `def` handler, in a thread of the worker
    process      a handler in a child process, which can be killed
    means        what all runs share
    threads      threads that are reused
    alarm        the deadlines of all runs, on one timer
    garbage      collects cyclic garbage as memory grows
    shortage     pauses the intake while the machine has nothing left to run in

Child processes, as the worker sees them:

    pool         children, lent and kept warm
    child        one child process
    nursery      the process that they are forked from
    memory       what a tree of processes holds
    protocol     the words between all of them

And what runs in those processes:

    nursery_process    loads the handlers, forks children, tells how they die
    child_process      runs handlers, one at a time
"""
