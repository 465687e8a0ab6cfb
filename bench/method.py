"""
The report's prose on the method. The figures of a run are in `report`.
"""

from __future__ import annotations

CONTENTS = """
AsyncFlow and its peers, measured in one run on one machine. `bin/bench --publish` generates this
page from [raw data](benchmarks/raw.jsonl); `bin/bench` makes a report of your machine.
[Which engine](operations.md#which-engine) says when to use RabbitMQ,
[internals/performance.md](internals/performance.md) what limits AsyncFlow in each scenario.
*naive* is what teams write themselves: FastAPI, SQLAlchemy and aio-pika.
""".strip()

METHOD = """
## Method

- **One run.** The same code measures all systems on the same servers. Each scenario goes through
  all systems once, then again, so that changes of the machine's speed affect all alike. Every
  measurement starts with a new database, a new RabbitMQ virtual host and a checkpoint.
- **Repetitions.** AsyncFlow and the peers named by a target are measured as often as the top of
  this page says; other peers, and AsyncFlow's larger payloads and failing tasks, once.
- **Settings of peers** are what their documentation recommends for throughput with durability.
  Where it leaves a choice (concurrency, batch size, prefetch), several values were tried once, and
  the one with the fastest drain is used; see Configurations.
- **Servers.** PostgreSQL with default settings, `fsync` and `synchronous_commit` on, except
  `shared_buffers = 256MB`; clients connect through its Unix socket. RabbitMQ with default settings.
- **Durability.** Persistent messages, durable queues and publisher confirms wherever a system
  uses RabbitMQ, quorum queues where it can. AsyncFlow runs with everything on: leases,
  heartbeats, a log line per attempt.
- **Handler.** An `async def` that does nothing (`def` where a system is made for that), plus a
  probe of about a microsecond: a clock reading, a lock, two stores into shared memory.
- **Drain.** A backlog is stored and vacuumed, then the workers start. The rate counts from the
  moment every worker process has run a task until no task is unfinished in durable state. Systems
  that keep no state count until the last handler call, which favors them.
- **Submit.** Systems with an async client submit from 32 coroutines in one process, the others
  from 1 and from 8 threads. A call counts once it has returned. Afterwards the tasks are counted in
  the system's table or queue; if any is missing, the measurement has failed.
- **Latency.** One task every 20 ms. The clock starts just before the submitting call and stops at
  the handler's first statement; all processes share CLOCK_MONOTONIC. For half load the system
  submits and works at full speed for two seconds, then a second producer submits at half of that
  rate while the latency is measured.
- **Keeping slots busy, adding workers.** The backlog is larger than can be finished; tasks that
  start within a window in the middle are counted.
- **Minutes of load.** With RabbitMQ for 0.3 of the time, because the tables are the same.
- **History.** Finished tasks are written directly into the table, with all its indexes; the same
  code then works on it and on an empty one, alternating.
- **CPU** is that of all processes of a kind, including ended ones, while the rate counts. For
  short measurements its resolution is the kernel's clock tick.
- **Memory** is RSS, and what would be freed if the processes ended.
""".strip()
