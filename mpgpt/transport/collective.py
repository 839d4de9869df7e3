"""Something done on every rank at once, whose failure on one rank is every rank's.

Knows: ranks, their hosts' names, answers as JSON, errors with an exit status.
Must not know: what is done, or why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mpgpt.errors import MpgptError, UsageError
from mpgpt.transport.link import World


def on_all_ranks(world: World, work: Callable[[], Any]) -> list[Any]:
    """Every rank's (JSON) answer to ``work``, on every rank, in the order of ranks. All ranks must call it.

    If it fails anywhere, raises the same error everywhere, naming rank, host and cause, so that all end alike.
    """
    try:
        report: dict[str, Any] = {"answer": work()}
    except MpgptError as error:
        report = {"error": str(error), "status": error.exit_status}
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}", "status": 1}
    reports = [json.loads(data) for data in world.gather(json.dumps(report).encode())]
    failed = [(rank, report) for rank, report in enumerate(reports) if "error" in report]
    if not failed:
        return [report["answer"] for report in reports]
    kind = UsageError if failed[0][1]["status"] == UsageError.exit_status else MpgptError
    if world.size == 1 or kind is UsageError:
        raise kind(failed[0][1]["error"])
    raise kind("\n".join(f"rank {rank} on {world.hosts[rank]}: {report['error']}" for rank, report in failed))


def on_rank0(world: World, work: Callable[[], Any]) -> Any:
    """Rank 0's (JSON) answer to ``work``, on every rank. Raises on every rank what fails there."""
    return on_all_ranks(world, lambda: None if world.rank else work())[0]
