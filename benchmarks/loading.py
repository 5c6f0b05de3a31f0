"""Loading a network from a cold disk, beside what the disk gives when the same bytes are merely read.

    python -m benchmarks.loading MODEL                                      # the transformer, 16 bit, five rounds
    python -m benchmarks.loading MODEL --network transformer text_encoder --quantize none builtin-int8 --rounds 3
    python -m benchmarks.loading FILE.gguf --base MODEL                     # a single file

In every round, in turn, each from a cold page cache (pages are dropped, and ``mincore`` has to say that none is left): the network's
files are read in large pieces, once through the page cache and once past it, eight pieces at a time; then the network is loaded
through the library's own path, in a process of its own whose imports are over. The ratio is the load's rate to the faster of the two.
Loading maps files, so that ``mincore`` is asked what of them is in memory when it has ended, and one value of every page is used
after that: seconds of a disk that was put off would show there. Virtual machines may take seconds to give memory that was not in use
before, whatever it is for; the rate of that is told beside it. Quantized weights are read from where they were kept; where they are
not there yet, they are made first, which is measured by itself.

Host memory is the most that the process held above what it held before: all its pages, mapped ones too, and those that are its own.
Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux2_local.bench import environment
from flux2_local.files import free_name

NETWORKS = ("transformer", "text_encoder")
PIECE, DIRECT, AT_ONCE = 4 * 2**20, 2 * 2**20, 8
"""Bytes of a read through the page cache, and of one past it; how many of these are under way at once."""

NEW = 2**30
"""Bytes of memory that are used for the first time."""


@dataclass(frozen=True)
class Load:
    """One load.

    Attributes:
        seconds: until the library's call returned.
        touch: seconds until one value of every page had been used after that.
        before, after: share of the files' pages in the page cache, before and when the call returned.
        held: bytes of the network's tensors.
        memory, own: most bytes of host memory, beyond those before: all pages, and those that come from no file.
        note: what the library had to say.
    """

    seconds: float
    touch: float
    before: float
    after: float
    held: int
    memory: int
    own: int
    note: str


# ---- the disk ----


def drop(files: Sequence[Path]) -> None:
    """Take the files out of the page cache.

    Raises:
        SystemExit: pages of them stay, because another process has them mapped or the file system does not drop them.
    """
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if left := in_memory(files):
        sys.exit(f"{left:.1%} of the files stay in memory: the cache is not cold. Close what else uses them.")


def in_memory(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache, as mincore(2) says."""
    there = pages = 0
    for path in files:
        with path.open("rb") as f:
            view = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        count = -(-len(view) // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * count)()
        anchor = ctypes.c_char.from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(len(view)), flags):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        there, pages = there + sum(flag & 1 for flag in bytes(flags)), pages + count
    return there / pages


def read_plainly(path: Path) -> None:
    piece = mmap.mmap(-1, PIECE)
    with path.open("rb", buffering=0) as f:
        while f.readinto(piece):
            pass


def read_directly(path: Path) -> None:
    """Past the page cache, :data:`AT_ONCE` pieces at a time."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(file).st_size

    def every(number: int) -> None:
        piece = mmap.mmap(-1, DIRECT)
        for start in range(number * DIRECT, size, AT_ONCE * DIRECT):
            os.preadv(file, [piece], start)

    try:
        with ThreadPoolExecutor(AT_ONCE) as readers:
            list(readers.map(every, range(AT_ONCE)))
    finally:
        os.close(file)


def disk(files: Sequence[Path]) -> dict[str, float]:
    """Seconds of reading the files in each way."""
    seconds = {}
    for name, read in (("plain", read_plainly), ("direct", read_directly)):
        drop(files)
        start = time.perf_counter()
        for path in files:
            read(path)
        seconds[name] = time.perf_counter() - start
    return seconds


def new_memory() -> float:
    """Bytes per second at which memory that nobody had before can be used for the first time, a value of every page."""
    piece, start = mmap.mmap(-1, NEW), time.perf_counter()
    for page in range(0, NEW, mmap.PAGESIZE):
        piece[page] = 1
    return NEW / (time.perf_counter() - start)


# ---- the load, in a process of its own ----


def mapped() -> int:
    """Bytes of files' pages that this process has in memory."""
    rss, own = Memory.now()
    return rss - own


class Memory:
    """The most host memory since it was made; a thread looks every few milliseconds."""

    def __init__(self) -> None:
        self.first = self.now()
        self.most = self.first
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    @staticmethod
    def now() -> tuple[int, int]:
        """Bytes of this process's pages in memory, and of those that come from no file."""
        found = dict(re.findall(r"^(VmRSS|RssAnon):\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.M))
        return 1024 * int(found["VmRSS"]), 1024 * int(found["RssAnon"])

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.look()

    def look(self) -> None:
        self.most = tuple(map(max, self.most, self.now()))  # type: ignore[assignment]

    def end(self) -> tuple[int, int]:
        self.over.set()
        self.thread.join()
        self.look()
        return self.most[0] - self.first[0], self.most[1] - self.first[1]


def load_here(model: str, component: str, quantize: str, files: Sequence[Path], base: str | None = None) -> Load:
    """Load one network of a model as :meth:`flux2_local.Flux2.load` does on a CPU; ``base`` is that of a single file."""
    import torch

    from flux2_local import load, store
    from flux2_local.model.language import LanguageModel
    from flux2_local.model.meta import meta
    from flux2_local.model.transformer import Flux2Transformer
    from flux2_local.offload import place
    from flux2_local.offload.tensors import hung, leaves
    from flux2_local.plan import ComponentPlan
    from flux2_local.quant import FORMATS, convert

    if quantize != "none":
        convert.backend(FORMATS[quantize])
    checkpoint, device = store.find(model, "standard", base), torch.device("cpu")
    if checkpoint.single is not None and checkpoint.single.suffix == ".gguf":
        import gguf  # noqa: F401
    arch = load.architecture(checkpoint)
    with meta():
        network = (
            Flux2Transformer(arch.transformer)
            if component == "transformer"
            else LanguageModel(arch.language, arch.text_layers)
        )
    held = ComponentPlan("bfloat16" if quantize == "none" else quantize, "resident")
    before, memory, start = in_memory(files) if files else 1.0, Memory(), time.perf_counter()
    note = load.fill(network, held, "bfloat16", load.Source(checkpoint, component), device)
    place(network.eval(), device, held, print)
    seconds = time.perf_counter() - start
    after = in_memory(files) if files else 1.0
    tensors = [leaf for _, value in hung(network) for leaf in leaves(value)]
    start = time.perf_counter()
    for value in tensors:
        value.reshape(-1)[:: mmap.PAGESIZE // value.element_size()].clone()
    touch = time.perf_counter() - start
    most, own = memory.end()
    return Load(
        seconds=seconds,
        touch=touch,
        before=before,
        after=after,
        held=sum(value.nbytes for value in tensors),
        memory=most,
        own=own,
        note=note,
    )


def load_apart(model: str, component: str, quantize: str, files: Sequence[Path], base: str | None = None) -> Load:
    """:func:`load_here` in a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loading",
        model,
        "--network",
        component,
        "--quantize",
        quantize,
        *(["--base", base] if base else []),
        "--once",
    ]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return Load(**json.loads(done.stdout.splitlines()[-1]))


def files_of(model: str, component: str, quantize: str, base: str | None = None) -> tuple[list[Path], list[Path]]:
    """The network's own files, and those that loading reads: these, or where its quantized weights are or will be kept."""
    import torch

    from flux2_local import load, store
    from flux2_local.quant import disk as kept
    from flux2_local.quant.recipe import Recipe

    source = load.Source(store.find(model, "standard", base), component)
    if quantize == "none":
        return source.files, source.files
    recipe = Recipe(quantize)
    facts = kept.facts(recipe, torch.bfloat16, source.files, [])
    return source.files, [kept.Kept(f"{source.checkpoint.name}-{component}", recipe, torch.bfloat16, facts).path]


def measure(model: str, component: str, quantize: str, rounds: int, base: str | None = None) -> dict[str, Any]:
    """The figures of all rounds."""
    sources, files = files_of(model, component, quantize, base)
    figures: dict[str, Any] = {
        "network": component,
        "quantize": quantize,
        "shard_bytes": max(path.stat().st_size for path in sources),
    }
    if not all(path.exists() for path in files):
        drop(sources)
        figures["made"] = asdict(load_apart(model, component, quantize, [], base))
    size = sum(path.stat().st_size for path in files)
    figures |= {"file_bytes": size, "new_memory": new_memory(), "rounds": []}
    for number in range(rounds):
        seconds = disk(files)
        drop(files)
        one = load_apart(model, component, quantize, files, base)
        figures["rounds"].append({"disk": seconds, "load": asdict(one), "ratio": min(seconds.values()) / one.seconds})
        print(f"round {number + 1}: {line(size, figures['rounds'][-1])}", flush=True)
    return figures


def line(size: int, one: dict[str, Any]) -> str:
    """One round in words."""
    ways = ", ".join(f"{name} {size / seconds / 1e9:.2f} GB/s" for name, seconds in one["disk"].items())
    load = one["load"]
    return (
        f"disk {ways}; load {size / load['seconds'] / 1e9:.2f} GB/s, {load['after']:.1%} in memory after it, first use "
        f"{load['touch']:.2f} s"
    )


def table(loads: Sequence[dict[str, Any]]) -> str:
    """Medians as a Markdown table."""
    titles = (
        "network", "weights", "GB", "disk, GB/s", "load, GB/s", "ratio", "spread", "first use, s", "of new memory, s",
        "host memory, GB", "of these not mapped",
    )  # fmt: skip
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for load in loads:
        size, rounds = load["file_bytes"], load["rounds"]
        best = statistics.median(min(one["disk"].values()) for one in rounds)
        seconds, touch = (statistics.median(one["load"][name] for one in rounds) for name in ("seconds", "touch"))
        ratios = [one["ratio"] for one in rounds]
        memory, own = (max(one["load"][name] for one in rounds) / 1e9 for name in ("memory", "own"))
        cells = (
            load["network"], load["quantize"], f"{size / 1e9:.2f}", f"{size / best / 1e9:.2f}", f"{size / seconds / 1e9:.2f}",
            f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}", f"{touch:.2f}",
            f"{size / load['new_memory']:.2f}", f"{memory:.2f}", f"{own:.2f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    for load in loads:
        if made := load.get("made"):
            memory, own, shard, held = (
                f"{size / 1e9:.2f}" for size in (made["memory"], made["own"], load["shard_bytes"], made["held"])
            )
            rows += [
                "",
                f"Making {load['quantize']} of the {load['network']}: {made['seconds']:.1f} s, at most {memory} GB of host memory, of "
                f"these {own} not mapped; the largest shard has {shard}, the result {held}.",
            ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name or a folder, on the disk that is to be measured")
    parser.add_argument("--base", help="of a single file: the model that its companions come from")
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=["transformer"], help="default transformer")
    parser.add_argument("--quantize", nargs="+", default=["none"], help="none (bfloat16) or formats (default none)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the JSON file (default: a new benchmarks/results/loading-DATE.json)")
    parser.add_argument("--once", type=Path, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once is not None:
        print(json.dumps(asdict(load_here(args.model, args.network[0], args.quantize[0], args.once, args.base))))
        return
    record = environment.record() | {"model": Path(args.model).name, "loads": []}
    path = args.out or free_name(environment.place(record, "loading"))
    for component in args.network:
        for quantize in args.quantize:
            record["loads"].append(measure(args.model, component, quantize, args.rounds, args.base))
            environment.keep(record, "loading", path)
    print(table(record["loads"]))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
