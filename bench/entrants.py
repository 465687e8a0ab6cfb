"""
The systems under test, each set up as its documentation recommends for throughput with durability,
with the best settings found by a scan.

AsyncFlow runs with its defaults. Its peers' concurrency and batch sizes were scanned for the best
drain rate; for latency they use their defaults or what their documentation recommends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entrant:
    """
    One system in one configuration.

    Attributes:
        key: Its name in raw lines and on the command line.
        system: Its module in `bench.systems`.
        variant: The configuration passed to that module.
        keeps: Where a task's state is kept while and after it runs.
        settings: What differs from the system's defaults, for the report.
        drain, latency: Concurrency in these scenarios, in the system's own terms.
        producers: The numbers of concurrent callers with which submitting is measured.
        submit_tasks: Number of tasks, in a full run, that one producer submits one by one in a few
            seconds.
        drain_tasks: Size of a backlog, in a full run, that takes one worker a few seconds.
        needs_broker: Whether it requires RabbitMQ.
    """

    key: str
    title: str
    system: str
    variant: str
    keeps: str
    settings: str
    drain: str
    latency: str
    producers: tuple[int, ...]
    submit_tasks: int
    drain_tasks: int
    needs_broker: bool

    @property
    def is_ours(self) -> bool:
        """
        Whether the entrant is AsyncFlow.
        """
        return self.system == "asyncflow"

    @property
    def is_plain(self) -> bool:
        """
        Whether the entrant is its system's plain form, without another transport or a result store.

        The other forms matter only where tasks are finished.
        """
        return self.variant == ""


OURS = (
    Entrant(
        key="asyncflow",
        title="AsyncFlow",
        system="asyncflow",
        variant="",
        keeps="PostgreSQL: state, lease, attempts, result",
        settings="defaults: 10 slots, leases, JSON log line per attempt",
        drain="",
        latency="",
        producers=(32,),
        submit_tasks=50_000,
        drain_tasks=100_000,
        needs_broker=False,
    ),
    Entrant(
        key="asyncflow-rabbitmq",
        title="AsyncFlow, RabbitMQ",
        system="asyncflow",
        variant="rabbitmq",
        keeps="PostgreSQL: state, lease, attempts, result",
        settings="as above; quorum queue, confirms; the maintenance process relays",
        drain="",
        latency="",
        producers=(32,),
        submit_tasks=50_000,
        drain_tasks=100_000,
        needs_broker=True,
    ),
)

PEERS = (
    Entrant(
        key="naive",
        title="naive",
        system="naive",
        variant="",
        keeps="PostgreSQL: status",
        settings="SQLAlchemy ORM, aio-pika with confirms; pool 16, prefetch 50 (latency 1)",
        drain="50",
        latency="1",
        producers=(32,),
        submit_tasks=5_000,
        drain_tasks=5_000,
        needs_broker=True,
    ),
    Entrant(
        key="celery",
        title="Celery",
        system="celery",
        variant="",
        keeps="RabbitMQ only",
        settings="quorum queue, confirms, late acks, prefetch ×50, results ignored",
        drain="prefork",
        latency="prefork",
        producers=(1, 8),
        submit_tasks=5_000,
        drain_tasks=8_000,
        needs_broker=True,
    ),
    Entrant(
        key="celery-results",
        title="Celery, results",
        system="celery",
        variant="results",
        keeps="RabbitMQ; PostgreSQL: result",
        settings="as above, results through SQLAlchemy and psycopg",
        drain="prefork",
        latency="prefork",
        producers=(1, 8),
        submit_tasks=5_000,
        drain_tasks=2_000,
        needs_broker=True,
    ),
    Entrant(
        key="dramatiq",
        title="Dramatiq",
        system="dramatiq",
        variant="",
        keeps="RabbitMQ only",
        settings="durable classic queue, confirms, 8 threads",
        drain="8",
        latency="8",
        producers=(1, 8),
        submit_tasks=8_000,
        drain_tasks=20_000,
        needs_broker=True,
    ),
    Entrant(
        key="taskiq",
        title="Taskiq",
        system="taskiq",
        variant="",
        keeps="RabbitMQ only",
        settings="aio-pika broker, quorum queue, confirms, qos 100, 100 async tasks",
        drain="100",
        latency="100",
        producers=(32,),
        submit_tasks=30_000,
        drain_tasks=16_000,
        needs_broker=True,
    ),
    Entrant(
        key="taskiq-results",
        title="Taskiq, results",
        system="taskiq",
        variant="results",
        keeps="RabbitMQ; PostgreSQL: result",
        settings="as above, results by taskiq-asyncpg, pool 16",
        drain="100",
        latency="100",
        producers=(32,),
        submit_tasks=30_000,
        drain_tasks=8_000,
        needs_broker=True,
    ),
    Entrant(
        key="procrastinate",
        title="Procrastinate",
        system="procrastinate",
        variant="",
        keeps="PostgreSQL: state",
        settings="psycopg pool 4 to 16, LISTEN/NOTIFY, concurrency 20",
        drain="20",
        latency="20",
        producers=(32,),
        submit_tasks=8_000,
        drain_tasks=3_000,
        needs_broker=False,
    ),
    Entrant(
        key="pgqueuer",
        title="PgQueuer",
        system="pgqueuer",
        variant="",
        keeps="PostgreSQL: state while queued, then a log row",
        settings="asyncpg pool 4 to 16, uvloop, durable, batch size 500 (latency 10)",
        drain="500",
        latency="10",
        producers=(32,),
        submit_tasks=15_000,
        drain_tasks=100_000,
        needs_broker=False,
    ),
    Entrant(
        key="awa",
        title="Awa",
        system="awa",
        variant="",
        keeps="PostgreSQL: state",
        settings="queue storage, uvloop, 500 workers (latency 64)",
        drain="500",
        latency="64",
        producers=(32,),
        submit_tasks=8_000,
        drain_tasks=40_000,
        needs_broker=False,
    ),
)

ENTRANTS = {entrant.key: entrant for entrant in (*OURS, *PEERS)}
