"""
What people write first: FastAPI, SQLAlchemy's async ORM over asyncpg, aio-pika.

POST /tasks inserts, commits, and publishes with a confirm to a durable queue. A worker
reads the row, runs the handler, commits COMPLETED, and acknowledges.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import uvloop
from fastapi import FastAPI
from pydantic import BaseModel, Field
from sqlalchemy import JSON, DateTime, String, func
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from bench.addresses import broker_url, database_url
from bench.probe import hit
from bench.systems import QUEUE, Submit, count_rows

POOL_SIZE = 16


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "tasks"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(200))
    payload: Mapped[dict[str, Any]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(20), default="PENDING", index=True)
    created_at: Mapped[dt.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )
    completed_at: Mapped[dt.datetime | None] = mapped_column(DateTime(timezone=True))


class TaskIn(BaseModel):
    name: str = Field(min_length=1, max_length=200)
    payload: dict[str, Any] = {}


class TaskOut(BaseModel):
    id: uuid.UUID
    status: str


class Service:
    """
    The connections of one process.
    """

    engine: AsyncEngine
    session: async_sessionmaker[AsyncSession]
    connection: aio_pika.abc.AbstractRobustConnection
    channel: aio_pika.abc.AbstractChannel
    queue: aio_pika.abc.AbstractQueue


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Service]:
    service = Service()
    service.engine = _engine()
    service.session = async_sessionmaker(service.engine, expire_on_commit=False)
    service.connection = await aio_pika.connect_robust(broker_url())
    service.channel = await service.connection.channel()
    service.queue = await service.channel.declare_queue(QUEUE, durable=True)
    yield service
    await service.connection.close()
    await service.engine.dispose()


def _engine() -> AsyncEngine:
    url = database_url("postgresql+asyncpg")
    return create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with connected() as app.state.service:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/tasks", status_code=202)
async def create(body: TaskIn) -> TaskOut:
    task = await submit_task(app.state.service, body.name, body.payload)
    return TaskOut(id=task.id, status=task.status)


async def submit_task(service: Service, name: str, payload: dict[str, Any]) -> Task:
    async with service.session() as session:
        task = Task(name=name, payload=payload)
        session.add(task)
        await session.commit()
    message = aio_pika.Message(task.id.bytes, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    await service.channel.default_exchange.publish(message, routing_key=QUEUE)
    return task


async def work(prefetch: int) -> None:
    async with connected() as service:

        async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            async with message.process(), service.session() as session:
                task = await session.get_one(Task, uuid.UUID(bytes=message.body))
                hit(task.payload["number"], task.payload["submitted_at"])
                task.status = "COMPLETED"
                task.completed_at = dt.datetime.now(dt.UTC)
                await session.commit()

        await service.channel.set_qos(prefetch_count=prefetch)
        await service.queue.consume(on_message)
        await asyncio.Event().wait()


def prepare() -> None:
    async def create_tables() -> None:
        engine = _engine()
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()

    asyncio.run(create_tables())


def unfinished(count: int) -> int:
    return count_rows("SELECT count(*) FROM tasks WHERE status <> 'COMPLETED'")


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    return [[sys.executable, "-m", __name__, concurrency] for _ in range(processes)]


@contextlib.asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    async with connected() as service:

        async def submit(number: int, submitted_at: float) -> None:
            await submit_task(service, "noop", {"number": number, "submitted_at": submitted_at})

        yield submit


def fill(count: int) -> None:
    async def run() -> None:
        numbers = iter(range(count))
        async with producer() as submit:

            async def caller() -> None:
                for _ in numbers:
                    await submit(-1, 0.0)

            await asyncio.gather(*[caller() for _ in range(32)])

    uvloop.run(run())


if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
