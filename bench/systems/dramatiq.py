"""
Dramatiq on RabbitMQ: its durable classic queue, persistent messages, publisher confirms.
"""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from bench.addresses import broker_url, program
from bench.probe import hit
from bench.systems import QUEUE

broker = RabbitmqBroker(url=broker_url(), confirm_delivery="BENCH_FILLS" not in os.environ)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=QUEUE, actor_name="noop")
def noop(number: int, submitted_at: float) -> None:
    hit(number, submitted_at)


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    command = [program("dramatiq"), __name__, "--processes", str(processes)]
    return [[*command, "--threads", concurrency]]


def send(number: int, submitted_at: float) -> None:
    noop.send(number, submitted_at)


def fill(count: int) -> None:
    for _ in range(count):
        noop.send(-1, 0.0)
