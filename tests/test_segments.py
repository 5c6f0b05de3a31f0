"""Streamed steps replayed in models of torch's allocator on a card: what is planned for is enough, though tensors leave gaps."""

from dataclasses import replace

import pytest
import torch
from simulated import VirtualLink
from test_plan import need

from flux2_local import footprint, quant, segments
from flux2_local.candidates import LAYOUTS, SYSTEM_RESERVE, Draft, Terms
from flux2_local.costs import Work
from flux2_local.counting import Peak, Workspaces
from flux2_local.hardware import from_preset
from flux2_local.model.blocks import repeated
from flux2_local.model.meta import meta
from flux2_local.model.ops import Rotary
from flux2_local.model.transformer import Flux2Transformer, Modulation
from flux2_local.offload.streamed import Streamed
from flux2_local.offload.tensors import Packed
from flux2_local.presets import parse_bytes

MIB = 2**20
PAGE = 20 * MIB


class Full(Exception):
    """Nothing more can be taken within the limit."""


class Fixed:
    """Segments of 2 MiB for tensors of up to 1 MiB, of 20 MiB for those below 10, and of their own size for larger ones; tensors
    take the best fit of what is free and leave the rest of it. Where the limit is reached, segments that are wholly free go."""

    def __init__(self, limit):
        self.limit, self.segments, self.where = limit, [], {}

    @property
    def taken(self):
        return sum(size for _, parts in self.segments for size, _ in parts)

    def take(self, key, size):
        size, small = -(-size // 512) * 512, size <= MIB
        parts, at = self.best(small, size) or self.segment(small, size)
        left = parts[at][0] - size
        parts[at : at + 1] = (
            [[size, key], [left, None]] if left >= (512 if small else MIB + 1) else [[parts[at][0], key]]
        )
        self.where[key] = parts

    def best(self, small, size):
        fits = [
            (part[0], parts, at)
            for kind, parts in self.segments
            if kind == small
            for at, part in enumerate(parts)
            if part[1] is None and part[0] >= size
        ]
        return min(fits, key=lambda fit: fit[0])[1:] if fits else None

    def segment(self, small, size):
        whole = 2 * MIB if small else PAGE if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.taken + whole > self.limit:
            self.segments = [one for one in self.segments if len(one[1]) > 1 or one[1][0][1] is not None]
        if self.taken + whole > self.limit:
            raise Full
        self.segments.append((small, [[whole, None]]))
        return self.segments[-1][1], 0

    def give(self, key):
        merge(self.where.pop(key), key)


class Growing:
    """One range of addresses, of which pages of 20 MiB are mapped as tensors need them; free ones go where the limit is reached."""

    def __init__(self, limit):
        self.limit, self.parts, self.pages = limit, [[2**50, None]], set()

    def take(self, key, size):
        size = -(-size // 512) * 512
        free = [
            (part[0], start, at)
            for at, (start, part) in enumerate(self.placed())
            if part[1] is None and part[0] >= size
        ]
        mapped = [one for one in free if self.pages >= covered(one[1], size)]
        left, start, at = min(mapped) if mapped else min(free, key=lambda one: one[1])
        wanted = covered(start, size)
        if len(self.pages | wanted) * PAGE > self.limit:
            self.pages &= set().union(*(covered(s, part[0]) for s, part in self.placed() if part[1] is not None))
        if len(self.pages | wanted) * PAGE > self.limit:
            raise Full
        self.pages |= wanted
        self.parts[at : at + 1] = [[size, key], [left - size, None]]

    def placed(self):
        start = 0
        for part in self.parts:
            yield start, part
            start += part[0]

    def give(self, key):
        merge(self.parts, key)


def covered(start, size):
    """The pages that ``size`` bytes from ``start`` on lie in."""
    return set(range(start // PAGE, -(-(start + size) // PAGE)))


def merge(parts, key):
    """Make the part that ``key`` has free, and one with free ones beside it."""
    at = next(i for i, part in enumerate(parts) if part[1] == key)
    first, last = (i if 0 <= i < len(parts) and parts[i][1] is None else at for i in (at - 1, at + 1))
    parts[first : last + 1] = [[sum(size for size, _ in parts[first : last + 1]), None]]


class Recorded(Peak):
    """Writes down in ``events`` which storage is made, with its bytes, and which goes, with 0; nothing while it is ``deaf``."""

    def __init__(self, known):
        super().__init__(known)
        self.events, self.deaf = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if self.deaf else super().__torch_dispatch__(func, types, args, kwargs)

    def _seen(self, value):
        storage = value.untyped_storage()
        if storage._cdata not in self._live and storage.nbytes():
            self.events.append((storage._cdata, storage.nbytes()))
        return super()._seen(value)

    def _gone(self, key, size):
        if size:
            self.events.append((key, 0))
        super()._gone(key, size)


def steps(draft, monkeypatch):
    """What two steps of a streamed transformer make and let go of, beside what the draft counts apart from them."""
    work, setup, arch = draft.terms.need.work, draft.stepping, draft.terms.need.arch
    own, tokens = arch.transformer, arch.step_tokens(work)
    with meta():
        network = Flux2Transformer(own, setup.table).to(torch.bfloat16)
        inputs = torch.empty(1, tokens, own.in_channels), torch.empty(1, arch.text_tokens, own.width)
        rotary = Rotary(*torch.empty(2, arch.text_tokens + tokens, own.attention_head_dim // 2))
        parts = tuple(torch.empty(1, 1, own.width, dtype=torch.bfloat16) for _ in range(17))
    inputs = tuple(x.to(torch.bfloat16) for x in inputs)
    mod = Modulation(parts[:6], parts[6:12], parts[12:15], parts[15:])
    footprint.prepare(network, setup)
    for block, size in zip(repeated(network), draft.weights("transformer").blocks, strict=True):
        missing = size - sum(p.nbytes for p in block.parameters())  # stand-ins of quantized layers have no weights
        block.register_buffer("weights", torch.empty(missing, dtype=torch.uint8, device="meta"))
    hold = Streamed(network, VirtualLink(1e9), draft.stay())
    recorded, use = Recorded(network), Packed.use

    def unheard(block, buffer):
        recorded.deaf = True
        use(block, buffer)
        recorded.deaf = False

    monkeypatch.setattr(Packed, "use", unheard)
    with torch.device("meta"), torch.no_grad(), Workspaces(0, False), recorded, hold():
        for _ in range(2):
            network(*inputs, mod, rotary, arch.tokens(work.width, work.height), None, None)
    return recorded.events


@pytest.mark.parametrize("growing", [True, False])
@pytest.mark.parametrize(
    ("vram", "side", "form"),
    [
        ("24GB", 1024, "builtin-int8"),
        ("24GB", 2048, "builtin-int8"),
        ("12GB", 2048, "builtin-int8"),
        ("12GiB", 1536, "builtin-int8"),
        ("16GB", 1024, "builtin-fp8"),
        ("12GB", 1024, "builtin-int4"),
        ("32GB", 1024, None),
    ],
)
def test_a_streamed_step_stays_under_the_ceiling(vram, side, form, growing, monkeypatch):
    card, limit = replace(from_preset("h200"), growing=growing), parse_bytes(vram) - SYSTEM_RESERVE["cuda"]
    terms = Terms(need("dev", work=Work(side, side)), card, "bfloat16", limit, "triton", "sdpa", False, False)
    layout = next(layout for layout in LAYOUTS if layout.transformer == "streamed")
    draft = Draft(terms, quant.FORMATS[form] if form else None, layout)
    assert 0 < len(draft.stay()) < len(draft.weights("transformer").blocks) and draft.denoising(draft.stay()) <= limit
    beside = draft.kept + draft.weights("transformer").rest + footprint.sampling(draft.stepping, terms.need.work)
    memory = (Growing if growing else Fixed)(limit)
    memory.take("beside", beside)
    for key, size in steps(draft, monkeypatch):
        memory.take(key, size) if size else memory.give(key)


def test_segments_grow_unless_the_user_or_the_driver_says_otherwise(monkeypatch):
    said, empty = [], torch.empty
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    monkeypatch.setattr(segments.sys, "platform", "linux")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert segments.grow("cpu") and said == ["expandable_segments:True"]

    def refused(*_, **__):
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", refused)
    assert not segments.grow("cpu") and said[1:] == ["expandable_segments:True", "expandable_segments:False"]
    monkeypatch.setattr(torch, "empty", empty)
    for own, growing in (("max_split_size_mb:64", False), ("expandable_segments: True", True)):
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
        assert segments.grow("cpu") is growing and len(said) == 3
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(segments.sys, "platform", "win32")
    assert not segments.grow("cpu") and len(said) == 3
