"""
`asyncflow verify`: a fault harness that tries to make AsyncFlow break its word.

A run starts a deployment of its own, real processes on a private PostgreSQL, puts a mixed
workload on it, and lets a nemesis kill, freeze and cut off what it can. Everybody writes down
what they saw: clients what they asked and were told, handlers when they ran, the nemesis what
it did, and the database, by a trigger, every transition of every task. Afterwards a checker
that knows nothing of AsyncFlow's code holds these histories against each other.

    history    one file of JSON lines per process, the clock all of them share
    workload   what is submitted, by seed; `handlers` is what then runs
    client     submits, cancels, redrives and reads over HTTP
    record     the database's own record of transitions
    role       what the processes may do in PostgreSQL, and how that is taken from them
    proxy      a wire between one process and one server that can be cut or held, and can forget
    fleet      the processes, started again when they end
    broker     a RabbitMQ, ours or given
    clock      a time of day that can be made wrong
    faults     what harm there is, and the evidence that it bit
    nemesis    which of it happens when
    checker    the verdict, from the files alone
    figures    what happened how often, and how fast things went on
    timeline   the story of one task
    report     what a person reads afterwards
    mutants    known bugs, to see that the checker finds them
    process    runs a process with a wrong clock, or a known bug
    run        puts all of it together

The order of events is that of the monotonic clock, which all processes of a machine share.
"""
