"""
Settling in natural batches: what ends while one statement is under way goes into the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncflow.aio.batching import Batcher
from asyncflow.store import settle
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling

SIZE_MAX = 200
BYTES_MAX = 4 * 1024 * 1024
"""Results that one statement carries; a larger one goes alone."""


def make_settler(db: Database) -> Batcher[Settling, bool]:
    """
    Make a batcher that writes settlements and answers, for each, whether it is recorded.
    """

    async def flush(settlings: Sequence[Settling]) -> Sequence[bool]:
        written = await settle.settle(db, settlings)
        if all(written):
            return written
        # An earlier call may have written the rest: its answer was lost, or it was refused
        # because of another settlement in the batch and is now repeated for each.
        recorded = await settle.recorded(db, settlings)
        return [now or before for now, before in zip(written, recorded, strict=True)]

    # One statement at a time keeps them few and large, which costs PostgreSQL a sixth less.
    return Batcher(
        flush, size_max=SIZE_MAX, weigh=_result_bytes, weight_max=BYTES_MAX, in_flight_max=1
    )


def _result_bytes(settling: Settling) -> int:
    result = settling.settlement.result
    return 0 if result is None else len(result)
