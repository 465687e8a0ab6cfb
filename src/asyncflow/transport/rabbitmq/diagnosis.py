"""
What RabbitMQ's refusals mean, in a sentence for the person who can fix them.

RabbitMQ explains a refusal in the text beside its code. The texts are the same from 4.0 to 4.3; an
unknown one is shown as it is.
"""

from __future__ import annotations

import re
from typing import Final

from asyncflow.errors import InvalidSettings
from asyncflow.findings import Finding, wrong
from asyncflow.transport.amqp import BrokerRefused, BrokerTimeout, BrokerUnreachable, ChannelClosed
from asyncflow.transport.rabbitmq.topology import PREFIX, marker_queue

URL: Final = "ASYNCFLOW_BROKER_URL"
BROKER_PREFIX: Final = "ASYNCFLOW_BROKER_PREFIX"

_NO_PERMISSION: Final = re.compile(
    r"(configure|write|read) access to (queue|exchange) '(.*)' in vhost '(.*)' "
    r"refused for user '(.*)'"
)
_NO_ENTRY: Final = re.compile(r"access to vhost '(.*)' refused for user '(.*)'")
_NO_VHOST: Final = re.compile(r"vhost (.*) not found")
_OTHERWISE: Final = re.compile(
    r"inequivalent arg '(.*)' for (queue|exchange) '(.*)' in vhost '(.*)'"
)
_OTHER_OWNER: Final = re.compile(r"received '(.*)' but current is '(.*)'")
_INVALID_ARGUMENT: Final = re.compile(r"invalid arg '(.*)' for queue")


def explained(error: Exception, *, prefix: str = PREFIX) -> Finding:
    """
    What is wrong, and how to fix it.

    The finding may pass if it is an outage, and may not if a person has to change something.

    Args:
        error: A `TransportError`, or the `InvalidSettings` of a certificate that is gone.
        prefix: What the names in RabbitMQ begin with.
    """
    if isinstance(error, BrokerRefused):
        return _refused(error, prefix)
    if isinstance(error, ChannelClosed):
        return _closed(error, prefix)
    if isinstance(error, BrokerTimeout):
        return wrong(
            "RabbitMQ", str(error), "It is overloaded, or a queue has no leader.", may_pass=True
        )
    if isinstance(error, InvalidSettings):
        return wrong("RabbitMQ URL", str(error), f"Correct {URL}.")
    remedy = f"Start it, or correct {URL}." if isinstance(error, BrokerUnreachable) else ""
    return wrong("RabbitMQ connection", str(error), remedy, may_pass=True)


def _refused(error: BrokerRefused, prefix: str) -> Finding:
    if match := _NO_VHOST.search(error.text):
        vhost = match[1]
        return wrong(
            "RabbitMQ virtual host",
            f"RabbitMQ at {error.address} has no virtual host {vhost!r}.",
            f"Run `rabbitmqctl add_vhost {vhost}`, or correct {URL}.",
        )
    if match := _NO_ENTRY.search(error.text):
        vhost, user = match.groups()
        return wrong(
            "RabbitMQ permissions",
            f"User {user!r} has no permissions in virtual host {vhost!r}.",
            grant(vhost, user, prefix),
        )
    if error.code == 403:
        return wrong(
            "RabbitMQ login",
            f"RabbitMQ at {error.address} refuses the user or the password.",
            f"Correct {URL}, or run `rabbitmqctl change_password`.",
        )
    return wrong("RabbitMQ connection", str(error), "See the log of RabbitMQ.")


def _closed(error: ChannelClosed, prefix: str) -> Finding:
    if match := _NO_PERMISSION.search(error.text):
        permission, kind, name, vhost, user = match.groups()
        return wrong(
            "RabbitMQ permissions",
            f"User {user!r} lacks the {permission} permission on {kind} {name!r} "
            f"in virtual host {vhost!r}.",
            grant(vhost, user, prefix),
        )
    if match := _OTHERWISE.search(error.text):
        argument, kind, name, vhost = match.groups()
        owners = _OTHER_OWNER.search(error.text)
        if name == marker_queue(prefix) and owners:
            return _shared(vhost, ours=owners[1], theirs=owners[2], prefix=prefix)
        how = f" (`rabbitmqctl delete_queue {name} --vhost {vhost}`)" if kind == "queue" else ""
        return wrong(
            "RabbitMQ queues",
            f"{kind.capitalize()} {name!r} in virtual host {vhost!r} was declared by others, with "
            f"another {argument}.",
            f"Delete it{how}; AsyncFlow declares it again and resends what was in it.",
        )
    if _INVALID_ARGUMENT.search(error.text) or error.code == 540:
        return wrong(
            "RabbitMQ version",
            str(error),
            "AsyncFlow needs RabbitMQ 4.0 or newer, for quorum queues.",
        )
    # 404: it was deleted just now, and the next try declares it.
    return wrong("RabbitMQ", str(error), "", may_pass=True)


def _shared(vhost: str, *, ours: str, theirs: str, prefix: str) -> Finding:
    return wrong(
        "RabbitMQ sharing",
        f"The names {prefix}.* in virtual host {vhost!r} belong to installation {theirs}; "
        f"this is {ours}.",
        f"Give this one a virtual host of its own, or another {BROKER_PREFIX}. Once the other has "
        "stopped, the names are free after ten minutes, or after "
        f"`rabbitmqctl delete_queue {marker_queue(prefix)} --vhost {vhost}`.",
    )


def grant(vhost: str, user: str, prefix: str) -> str:
    """
    The command that gives a user the permissions that AsyncFlow needs.
    """
    names = rf"'^({re.escape(prefix)}\..*|amq\.default)$'"
    return f"Run `rabbitmqctl set_permissions -p {vhost} {user} {names} {names} {names}`."
