"""What a caught exception keeps alive."""

from __future__ import annotations

import traceback


def release_frames(error: BaseException) -> None:
    """Drops the locals of all finished calls that an error, its causes and its contexts came through.

    A traceback keeps frames and frames keep their locals: for a step, gigabytes on the device, as long as anybody keeps
    the error. Files and lines, which logs show, stay.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            pending += [each.__cause__, each.__context__]
