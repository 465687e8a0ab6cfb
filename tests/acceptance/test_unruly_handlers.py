"""
Handlers share their worker's event loop. A handler that tries to end the process through it ends
only its own attempt.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tests.support.system import HANDLERS, System

UNRULY = Path(__file__).with_name("unruly_handlers.py")


async def test_a_worker_outlives_handlers_that_exit_behind_its_back(
    database_url: str, tmp_path: Path
) -> None:
    """
    `sys.exit()` and `KeyboardInterrupt` in tasks and callbacks do not disturb a running task:
    it completes at its first attempt, and the worker takes the next one and stops gracefully.
    """
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        await system.start_api()
        worker = await system.start_worker(handlers=(HANDLERS, UNRULY))
        neighbour = await system.submit("work", {"seconds": 2})
        await system.journal.wait_for("start", neighbour)

        unruly = [
            await system.submit(name)
            for name in ("exit-in-a-task", "interrupt-in-a-task", "exit-in-a-callback")
        ]
        exiting, interrupting, calling = [await system.finishes(task_id) for task_id in unruly]
        beside = await system.finishes(neighbour)
        after = await system.finishes(await system.submit("work"))

        assert worker.is_running, worker.tail()
        worker.send(signal.SIGTERM)
        assert 0 == await worker.exit_status()

    assert ("FAILED", "SystemExit") == (exiting["status"], exiting["error"]["kind"])
    assert ("FAILED", "KeyboardInterrupt") == (
        interrupting["status"],
        interrupting["error"]["kind"],
    )
    assert ("COMPLETED", "done") == (calling["status"], calling["result"])
    assert ("COMPLETED", 1) == (beside["status"], beside["attempt"])
    assert "COMPLETED" == after["status"]
    assert worker.has_logged("loop.interrupted")
