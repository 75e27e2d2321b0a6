"""What an operation's own process does: perform the verb, say what comes of it, log it.

Three families of failure, never mixed: an `MvmError` goes to the client as it is; being ended by the daemon is Busy;
all else is a defect, whose trace is for the log and whose name is for the client.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from mvm.core.errors import Busy, Conflict, InvalidInput, MvmError, NotFound, Refused
from mvm.hostd.job import Ended, Job
from mvm.wire.hostd_api import RecordAnswer
from mvm.wire.hostd_frames import encode_answer, encode_error, encode_progress

if TYPE_CHECKING:
    from mvm.core.plan import InstancePlan
    from mvm.hostd.log import Log
    from mvm.hostd.service import Service
    from mvm.wire.hostd_api import Verb

_STARTING: Final = ("create_instance", "wake_instance")


def errand(
    service: Service,
    log: Log,
    job: Job,
    verb: Verb,
    request: Any,
    admitted: Sequence[InstancePlan],
    tell: Callable[[bytes], None],
) -> None:
    """Perform the verb, and `tell` what comes of it: progress, then one answer or error. Raises nothing."""

    def progress(phase: str) -> None:
        tell(encode_progress(phase))

    began = time.monotonic()
    error: MvmError | None = None
    body = b""
    try:
        answer = service.perform(verb, request, job.peer, progress, admitted)
        body = encode_answer(answer)
        if job.verb in _STARTING and isinstance(answer, RecordAnswer):
            for what in answer.record.unconfined:
                log.warning("unconfined", instance=job.instance, vmm=f"runs {what}")
    except MvmError as raised:
        error = raised
    except Ended:
        error = Busy(
            f"{job.what} was ended",
            details="It took too long, or mvm-hostd is stopping. What it had begun was undone or finished.",
            resolution="Look at the instance, then try again." if job.instance else "Try again.",
        )
    except BaseException as defect:
        trace = "".join(traceback.format_exception(defect, limit=-6))
        log.error("defect", verb=job.verb, instance=job.instance, trace=trace[-480:])
        error = internal(defect)
    if error is not None:
        body = encode_error(error)
    tell(body)
    took = round((time.monotonic() - began) * 1000)
    if error is None:
        if job.verb != "recover":
            log.info("done", verb=job.verb, instance=job.instance, uid=job.peer.uid, ms=took)
    elif not (job.verb == "recover" and isinstance(error, NotFound)):
        # Not its details: they may quote a guest's console, which is the tenant's.
        level = (
            log.warning
            if isinstance(error, Refused | Conflict | InvalidInput | NotFound | Busy)
            else log.error
        )
        level(
            "not done", verb=job.verb, instance=job.instance, uid=job.peer.uid, kind=error.kind,
            error=error.brief, ms=took,
        )  # fmt: skip


def internal(error: BaseException) -> MvmError:
    """What a client is told of a defect."""
    return MvmError(
        "mvm-hostd failed",
        details=f"{type(error).__name__}: {error}"[:500],
        resolution="This is a defect or a broken disk: see journalctl -u mvm-hostd",
    )
