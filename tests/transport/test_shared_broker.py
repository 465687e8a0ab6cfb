"""
RabbitMQ servers administered by others: each problem is named with its remedy and waited out,
charged to no task, and costs no task.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from asyncflow.errors import TransportError
from asyncflow.findings import Finding, Verdict
from asyncflow.store.database import Database
from asyncflow.store.installation import identity
from asyncflow.transport.amqp import Message, connect
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.inspection import _version, inspect
from asyncflow.transport.rabbitmq.message import encode_hints
from asyncflow.transport.rabbitmq.ownership import own
from asyncflow.transport.rabbitmq.queue_backoff import BackoffTimes
from asyncflow.transport.rabbitmq.topology import (
    broker_queue,
    declare_dead_letters,
    declare_task_queue,
    dropped,
    marker_queue,
    unreadable,
)
from tests.support.broker import Broker
from tests.support.postgres import PostgresServer
from tests.support.tasks import QUEUE, database, states, submit, until
from tests.transport.shared_broker import (
    NOTHING,
    Administrator,
    System,
    a_system,
    administered,
)

pytestmark = pytest.mark.every_rabbitmq

Action = Callable[[Administrator], Awaitable[Any]]


@pytest.fixture
async def administrator(broker: Broker, broker_url: str) -> AsyncIterator[Administrator]:
    """
    The administrator of the test's virtual host.
    """
    async with administered(broker, broker_url) as administrator:
        yield administrator


@pytest.fixture
def other_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """
    A second installation's database.
    """
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


async def refusal(url: str, *, queue: str = QUEUE) -> Finding:
    """
    What a process of ours finds wrong when it uses RabbitMQ.
    """
    try:
        connection = await connect(url, name="test")
        try:
            channel = await connection.channel()
            await own(channel, installation="ours", on_lost=channel.abandon)
            await declare_dead_letters(channel)
            await declare_task_queue(channel, queue)
            await channel.confirm_select()
            await channel.publish([Message("nowhere", b"")], exchange="", timeout_seconds=10)
        finally:
            await connection.close()
    except TransportError as error:
        return explained(error)
    raise AssertionError("RabbitMQ refuses nothing.")


async def verdicts(administrator: Administrator, **options: Any) -> dict[str, Finding]:
    """
    The findings of `asyncflow doctor`, by subject.
    """
    values = {"installation": "ours", "queues": [QUEUE], **options}
    found = await inspect(administrator.url, **values)
    return {finding.what: finding for finding in found}


async def names_in(administrator: Administrator) -> set[str]:
    """
    The queues of the virtual host.
    """
    return {
        queue["name"] for queue in await administrator.api("GET", f"queues/{administrator.vhost}")
    }


async def test_a_good_broker_is_found_good_and_left_as_it_was(
    administrator: Administrator,
) -> None:
    """
    A good broker, empty or in use, passes every check and is left unchanged.
    """
    empty = await verdicts(administrator)
    before = await names_in(administrator)
    await declare_everything(administrator)
    used = await verdicts(administrator)

    assert {Verdict.OK} == {finding.verdict for finding in (*empty.values(), *used.values())}
    assert {
        "RabbitMQ connection",
        "RabbitMQ version",
        "RabbitMQ permissions",
        "RabbitMQ sharing",
        "RabbitMQ queues",
    } == set(used)
    assert (set(), {broker_queue(QUEUE), unreadable(), dropped()}) == (
        before,
        await names_in(administrator),
    )


async def test_an_inspection_finds_what_is_wrong(administrator: Administrator) -> None:
    """
    An inspection finds each problem, and its other checks still run.
    """
    await declare_classic(administrator)
    connection = await connect(administrator.url, name="test")
    channel = await connection.channel()
    await own(channel, installation="theirs", on_lost=channel.abandon)
    await administrator.set_policy(**{"max-length": 3})
    found = await verdicts(administrator)
    await connection.close()
    await administrator.permit(write=NOTHING)
    unwritable = await verdicts(administrator)

    wrong = {what: finding for what, finding in found.items() if finding.is_wrong}
    assert {"RabbitMQ sharing", "RabbitMQ queues"} == set(wrong)
    assert "belong to installation theirs; this is ours." in wrong["RabbitMQ sharing"].sentence
    assert "was declared by others" in wrong["RabbitMQ queues"].sentence
    assert found["RabbitMQ policies"].is_doubtful
    assert "lacks the write permission" in unwritable["RabbitMQ permissions"].sentence


@pytest.mark.parametrize(
    ("server", "is_wrong"), [("RabbitMQ 3.13.7", True), ("RabbitMQ 4.0.5", False)]
)
def test_a_version_that_is_too_old_is_named(server: str, is_wrong: bool) -> None:
    """
    Versions before 4.0 are named as too old: their quorum queues cannot redeliver without a limit.
    """
    assert is_wrong == _version(server).is_wrong


async def declare_everything(administrator: Administrator, queue: str = QUEUE) -> None:
    """
    Declare our queues, as a process with permissions does.
    """
    connection = await connect(administrator.url, name="test")
    channel = await connection.channel()
    await declare_dead_letters(channel)
    await declare_task_queue(channel, queue)
    await connection.close()


@pytest.mark.parametrize(
    ("rights", "sentence"),
    [
        ({"configure": NOTHING}, "lacks the configure permission on queue '{marker}'"),
        ({"read": NOTHING}, "lacks the read permission on queue '{marker}'"),
        ({"write": NOTHING}, "lacks the write permission on exchange '{unreadable}'"),
        ({"write": r"asyncflow\..*"}, "lacks the write permission on exchange 'amq.default'"),
    ],
)
async def test_a_missing_permission_is_named_with_the_command_that_gives_it(
    administrator: Administrator, rights: dict[str, str], sentence: str
) -> None:
    """
    The finding says which of the three permissions is missing, on what and for which user, and the
    command it names is enough.
    """
    await administrator.permit(**rights)
    finding = await refusal(administrator.url)
    command = re.fullmatch(
        r"Run `rabbitmqctl set_permissions -p (.*) (.*) '(.*)' '(.*)' '(.*)'`\.", finding.remedy
    )
    assert command is not None
    assert (administrator.vhost, administrator.user) == command.group(1, 2)
    await administrator.permit(configure=command[3], write=command[4], read=command[5])
    with pytest.raises(AssertionError, match="refuses nothing"):
        await refusal(administrator.url)

    assert sentence.format(marker=marker_queue(), unreadable=unreadable()) in finding.sentence
    assert not finding.may_pass


async def test_what_is_wrong_with_the_url_is_told_apart(administrator: Administrator) -> None:
    """
    A missing virtual host, a forbidden one and a wrong password are distinct findings.
    """
    parts = urlsplit(administrator.url)
    no_vhost = await refusal(parts._replace(path="/nowhere").geturl())
    login = await refusal(administrator.url.replace(":secret", ":wrong-secret"))
    await administrator.forbid()
    no_entry = await refusal(administrator.url)

    assert "has no virtual host 'nowhere'" in no_vhost.sentence
    assert "rabbitmqctl add_vhost nowhere" in no_vhost.remedy
    assert "refuses the user or the password" in login.sentence
    assert "secret" not in str(login)
    assert f"has no permissions in virtual host '{administrator.vhost}'" in no_entry.sentence
    assert "rabbitmqctl set_permissions" in no_entry.remedy
    assert not any(finding.may_pass for finding in (no_vhost, login, no_entry))


async def test_a_queue_that_others_declared_is_named(administrator: Administrator) -> None:
    """
    A queue that others declared with other properties, most often a classic queue, is named.
    """
    name = f"queues/{administrator.vhost}/{broker_queue(QUEUE)}"
    body = {"durable": True, "arguments": {"x-queue-type": "classic"}}
    await administrator.api("PUT", name, body)

    finding = await refusal(administrator.url)

    assert f"Queue '{broker_queue(QUEUE)}'" in finding.sentence
    assert "was declared by others" in finding.sentence
    assert f"rabbitmqctl delete_queue {broker_queue(QUEUE)}" in finding.remedy


async def test_a_second_installation_is_refused_and_costs_the_first_nothing(
    database_url: str, other_database_url: str, administrator: Administrator
) -> None:
    """
    Neither of two installations takes the other's hints; the log names both, and another prefix
    lets both work.
    """
    async with database(database_url) as first, database(other_database_url) as second:
        theirs = await identity(first)
        async with a_system(first, administrator.url) as running:
            await running.until_completed(await submit(first, 20))
            waiting = await submit(second, 5)
            async with a_system(second, administrator.url) as refused:
                await refused.until_told("broker.refused", "worker", str(theirs))
                await refused.until_told(
                    "broker.refused", "relay", str(theirs), "ASYNCFLOW_BROKER_PREFIX"
                )
                assert str(theirs) in str(refused.relay.trouble)
                await running.until_completed(await submit(first, 20))
                assert {"pending": 5} == await states(second)
                told = {event["event"] for event in refused.events}
            async with a_system(second, administrator.url, prefix="staging") as apart:
                await apart.until_completed(waiting)
                await running.until_completed(await submit(first, 20))
        assert not told & {"hints.lost", "hints.unknown"}


async def test_names_that_are_no_longer_used_are_free(
    database_url: str,
    other_database_url: str,
    administrator: Administrator,
) -> None:
    """
    Unused names are free again: a database that moved to another server gets its queues back
    without help, and so does the first one after a restart.
    """
    async with database(database_url) as former, database(other_database_url) as moved:
        for _ in range(2):
            async with a_system(former, administrator.url, owned_seconds=1) as running:
                await running.until_completed(await submit(former))
        async with a_system(moved, administrator.url, owned_seconds=1) as running:
            await running.until_completed(await submit(moved))


@pytest.mark.any_rabbitmq
async def test_an_installation_is_its_database(database_url: str, other_database_url: str) -> None:
    """
    Every process of a database has the same identity, and a copy has another, whatever is stored in
    it.
    """
    async with database(database_url) as one, database(database_url) as same:
        async with database(other_database_url) as copy:
            identities = [await identity(db) for db in (one, same, copy)]

    assert identities[0] == identities[1] != identities[2]
    assert urlsplit(database_url).path[1:] in str(identities[0])


async def test_hints_of_another_installation_are_told(
    db: Database, administrator: Administrator
) -> None:
    """
    Hints with unknown ids are reported, because two installations share one identity after a copy
    of the server's files.
    """
    async with a_system(db, administrator.url) as system:
        await system.until_completed(await submit(db))
        [foreign] = await submit(db, run_at=None, delay_seconds=3_600)
        await db.execute("DELETE FROM asyncflow.tasks WHERE id = $1", foreign)
        connection = await connect(administrator.url, name="test")
        channel = await connection.channel()
        await channel.confirm_select()
        hint = Message(broker_queue(QUEUE), encode_hints([foreign]))
        await channel.publish([hint], exchange="", timeout_seconds=10)
        await connection.close()

        await system.until_told("hints.unknown", "'count': 1")


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        ({"message-ttl": 50}, "message-ttl"),
        ({"max-length": 3}, "max-length"),
    ],
)
async def test_hints_that_a_policy_drops_are_named_and_go_again(
    db: Database, administrator: Administrator, policy: dict[str, Any], word: str
) -> None:
    """
    Hints dropped by a policy are named and sent again: a backlog without a worker is kept, flows
    once there is one, and is not mixed with unreadable messages.
    """
    await declare_everything(administrator)
    await administrator.set_policy(**policy)
    ids = await submit(db, 60)
    async with a_system(db, administrator.url, works=False) as idle:
        await idle.until_told("hints.dropped", word, "leave AsyncFlow's queues out")
    async with a_system(db, administrator.url) as system:
        await system.until_completed(ids)

    connection = await connect(administrator.url, name="test")
    channel = await connection.channel()
    parked = await channel.inspect_queue(unreadable())
    await connection.close()
    assert parked is not None
    assert 0 == parked.messages


async def test_a_delivery_limit_gives_hints_back(
    db: Database, administrator: Administrator
) -> None:
    """
    Hints that RabbitMQ drops at a delivery limit, because workers without a slot returned them, are
    sent again.
    """
    await declare_everything(administrator)
    [task_id] = await submit(db)
    # Into the queue for dropped hints, as a delivery limit would.
    async with a_system(db, administrator.url, works=False) as system:

        async def is_queued() -> bool:
            return bool(await states(db) == {"queued": 1})

        await until(is_queued)
        connection = await connect(administrator.url, name="test")
        channel = await connection.channel()
        await channel.purge_queue(broker_queue(QUEUE))
        await channel.confirm_select()
        message = Message(dropped(), encode_hints([task_id]))
        await channel.publish([message], exchange="", timeout_seconds=10)
        await connection.close()
        await system.until_told("hints.dropped")
    async with a_system(db, administrator.url) as system:
        await system.until_completed([task_id])


def rights(**taken: str) -> Action:
    """
    Set these permissions.
    """
    return lambda administrator: administrator.permit(**taken)


async def declare_classic(administrator: Administrator) -> None:
    """
    Replace the queue with a classic one.
    """
    name = f"queues/{administrator.vhost}/{broker_queue(QUEUE)}"
    await administrator.api("DELETE", name)
    body = {"durable": True, "arguments": {"x-queue-type": "classic"}}
    await administrator.api("PUT", name, body)
    await administrator.disconnect()


async def delete_classic(administrator: Administrator) -> None:
    """
    Delete the classic queue.
    """
    await administrator.api("DELETE", f"queues/{administrator.vhost}/{broker_queue(QUEUE)}")


async def delete_names(administrator: Administrator) -> None:
    """
    Delete all of our queues and exchanges.
    """
    for queue in await administrator.api("GET", f"queues/{administrator.vhost}"):
        await administrator.api("DELETE", f"queues/{administrator.vhost}/{queue['name']}")
    for exchange in (unreadable(), dropped()):
        await administrator.api("DELETE", f"exchanges/{administrator.vhost}/{exchange}")


async def nothing(administrator: Administrator) -> None:
    """
    Do nothing: the problem passes on its own.
    """


async def change_password(administrator: Administrator) -> None:
    """
    Change the password, from the next login on.
    """
    await administrator.add_user(password="another")
    await administrator.disconnect()


async def restore_user(administrator: Administrator) -> None:
    """
    Restore the user with its password and permissions.
    """
    await administrator.add_user()
    await administrator.permit()


MATRIX: dict[str, tuple[Action, Action, str | None]] = {
    "configure": (rights(configure=NOTHING), rights(), "configure permission"),
    "write": (rights(write=NOTHING), rights(), "write permission"),
    "read": (rights(read=NOTHING), rights(), "read permission"),
    "no virtual host": (
        Administrator.delete_vhost,
        Administrator.make_vhost,
        "has no virtual host",
    ),
    "no entry": (Administrator.forbid, rights(), "has no permissions"),
    "no user": (Administrator.delete_user, restore_user, "refuses the user or the password"),
    "password": (change_password, restore_user, "refuses the user or the password"),
    "classic queue": (declare_classic, delete_classic, "was declared by others"),
    "short queues": (lambda a: a.set_policy(**{"max-length": 2}), Administrator.clear_policy, None),
    "full queues": (
        lambda a: a.set_policy(**{"max-length": 1, "overflow": "reject-publish"}),
        Administrator.clear_policy,
        None,
    ),
    "short lives": (lambda a: a.set_policy(**{"message-ttl": 1}), Administrator.clear_policy, None),
    "short-lived queues": (lambda a: a.set_policy(expires=1), Administrator.clear_policy, None),
    "deleted": (delete_names, nothing, None),
}


async def test_rights_and_queues_taken_away_cost_time_and_no_task(
    db: Database, administrator: Administrator
) -> None:
    """
    Whatever is taken away while tasks run is named; once it is restored, tasks flow again, none is
    lost or charged, and neither relay nor worker exits.
    """
    async with a_system(db, administrator.url, backoff=BackoffTimes(seconds_max=0.5)) as system:
        await system.until_completed(await submit(db, 5))
        ids = []
        for take_away, give_back, words in MATRIX.values():
            system.events.clear()
            ids += await submit(db, 30)
            await take_away(administrator)
            ids += await submit(db, 10)
            if words is not None:
                for role in ("relay", "worker"):
                    await until_told_by(system, role, words)
            await give_back(administrator)
            ids += await submit(db, 5)
            await system.until_completed(ids)

    charged = await db.fetchval("SELECT count(*) FROM asyncflow.tasks WHERE failures > 0")
    again = await db.fetchval("SELECT count(*) FROM asyncflow.attempts")
    assert (0, 0) == (charged, again)


async def until_told_by(system: System, role: str, words: str) -> None:
    """
    Wait until relay or worker names the fault, as an error.
    """

    async def is_told() -> bool:
        return any(
            event["log_level"] == "error" and event.get("role") == role and words in event["reason"]
            for event in system.events
        )

    try:
        await until(is_told)
    except TimeoutError:
        raise AssertionError(f"{role} does not say {words!r}: {system.events}") from None


async def test_a_lasting_refusal_is_not_hammered(
    db: Database, administrator: Administrator
) -> None:
    """
    A lasting refusal causes few logins, and none as soon as after an outage.
    """
    await administrator.permit(configure=NOTHING)
    async with a_system(db, administrator.url) as system:
        await system.until_told("broker.refused", "relay")
        await system.until_told("broker.refused", "worker")
        assert "lacks the configure permission" in str(system.relay.trouble)
        waits = [
            [backoff.next(may_pass=False) for _ in range(8)][-1]
            for backoff in (
                system.relay._connection_backoff,
                system.transport._connection_backoff,
            )
        ]
        await asyncio.sleep(0)

    assert all(wait >= BackoffTimes().seconds_max / 2 for wait in waits)
