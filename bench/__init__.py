"""
The benchmark suite behind `bin/bench`: AsyncFlow and its peers, measured in one run.

    __main__     the command: starts the servers, runs scenarios, writes the report
    entrants     who takes part, with which settings
    systems/     one file per system: how it is set up, submits, and is started
    scenarios/   one file per kind of measurement
    produce      the load of submissions, in a process of its own
    probe        what handlers write to and the scenarios read, in shared memory
    services     PostgreSQL and RabbitMQ of a run
    report       tables, ratios and plots from the raw lines; it never measures

The method is told in the report itself. Nothing here is imported by AsyncFlow.
"""
