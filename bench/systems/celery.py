"""
Celery on RabbitMQ: quorum queue, persistent messages, publisher confirms, late acks.

Variant `results`: results kept in PostgreSQL through SQLAlchemy and psycopg; otherwise they are
ignored and tasks exist only in the queue.
"""

from __future__ import annotations

from celery import Celery
from kombu import Queue

from bench.addresses import broker_url, database_url, program, variant
from bench.probe import hit
from bench.systems import QUEUE, count_rows

KEEPS_RESULTS = variant() == "results"

app = Celery(
    "bench",
    broker=broker_url(),
    backend="db+" + database_url("postgresql+psycopg") if KEEPS_RESULTS else None,
)
app.conf.update(
    task_queues=[Queue(QUEUE, durable=True, queue_arguments={"x-queue-type": "quorum"})],
    task_default_queue=QUEUE,
    task_default_queue_type="quorum",
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=not KEEPS_RESULTS,
    worker_prefetch_multiplier=50,
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
)


@app.task(name="noop")
def noop(number: int, submitted_at: float) -> None:
    hit(number, submitted_at)


def unfinished(count: int) -> int:
    if variant() != "results":
        return 0
    done = count_rows("SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'")
    return count - done


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    # `concurrency` is the pool type: prefork has one parent and `processes` children.
    command = [program("celery"), "--app", __name__, "worker", "--loglevel", "WARNING"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-O", "fair"]
    command += ["--queues", QUEUE, "--pool", concurrency]
    if concurrency == "prefork":
        return [[*command, "--concurrency", str(processes)]]
    return [[*command, "--hostname", f"worker{number}@%h"] for number in range(processes)]


def send(number: int, submitted_at: float) -> None:
    noop.delay(number, submitted_at)


def fill(count: int) -> None:
    app.conf.broker_transport_options = {}  # Without confirms: filling is not measured.
    with app.producer_or_acquire() as producer:
        for _ in range(count):
            noop.apply_async((-1, 0.0), producer=producer)
