"""
The benchmark suite behind `bin/bench`: AsyncFlow and its peers, measured in one run.

    __main__     the command: starts the servers, runs scenarios, writes the report
    entrants     the systems under test and their settings
    systems/     one file per system: how it is set up, submits, and is started
    scenarios/   one file per kind of measurement
    produce      the load of submissions, in a separate process
    probe        the shared memory that handlers write and scenarios read
    services     PostgreSQL and RabbitMQ of a run
    report       tables, ratios and plots from the raw lines; it never measures

The report itself explains the method. AsyncFlow imports nothing from here.
"""
