"""A contender's process: ``python -m flux2_local.bench.worker``. Loads it and draws one picture per message."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .. import frames
from .subject import Subject


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer messages until there are no more: first what to load, then what to draw."""
    tell = partial(frames.write, target)
    try:
        setup = frames.read(source)
        if setup is None:
            return
        from .contenders import CONTENDERS

        subject = Subject(**setup[0]["subject"])
        loaded = CONTENDERS[setup[0]["contender"]].build(subject)
        tell(loaded.facts)
        while (frame := frames.read(source)) is not None:
            start = time.perf_counter()
            picture, told = loaded.draw(frame[0]["prompt"], frame[0]["seed"], frame[0]["steps"])
            seconds = time.perf_counter() - start
            facts = {"shape": picture.shape, **asdict(told), "memory": memory(subject.device)}
            tell({"seconds": seconds, **facts}, picture.tobytes())
    except Exception as error:  # whatever a contender fails with is its result
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})


def memory(device: str) -> dict[str, int]:
    """Peak bytes of this process so far: resident in host memory (mapped weights included), and allocated on a card."""
    peaks = {"host": peak_resident(os.getpid())}
    if device.startswith("cuda"):
        import torch

        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def peak_resident(process: int) -> int:
    """Peak resident bytes of a process. Linux counts from its start; elsewhere only this process can be asked about, by
    getrusage, and 0 stands for others."""
    status = Path(f"/proc/{process}/status")
    if status.exists():
        line = next(row for row in status.read_text("utf-8").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if process != os.getpid():
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    frames.work(serve)
