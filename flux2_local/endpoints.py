"""fal's endpoints, answered on this machine: what the in-process client and the HTTP server share."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .errors import BudgetError, Flux2Error, RequestError
from .presets import variants
from .request import STANDARD_ONLY, VARIANTS, Request, Variant, make_request

if TYPE_CHECKING:
    from .pipeline import Flux2
    from .plan import Plan


@dataclass(frozen=True)
class Endpoint:
    """One address of the API.

    Attributes:
        name: such as "fal-ai/flux-2/turbo".
        variant: what serves it.
        title, description: for people.
        edits: whether it takes reference pictures, as ``image_urls``.
    """

    name: str
    variant: Variant
    title: str
    description: str
    edits: bool = False


@cache
def endpoints() -> dict[str, Endpoint]:
    """Every endpoint by name: the variants' own, and editing on the standard one."""
    own = [Endpoint(v.endpoint, v.name, v.title, v.description) for v in variants().values()]
    standard = variants()["standard"]
    edit = Endpoint(
        f"{standard.endpoint}/edit",
        "standard",
        f"{standard.title} Edit",
        "Change or combine pictures by a prompt",
        edits=True,
    )
    return {endpoint.name: endpoint for endpoint in (*own, edit)}


def find_endpoint(application: str) -> Endpoint:
    """The endpoint that ``application`` names.

    Raises:
        RequestError: there is none.
    """
    name = application.strip("/")
    if name not in endpoints():
        raise RequestError(f"There is no endpoint {application!r} here. Endpoints: {', '.join(endpoints())}.")
    return endpoints()[name]


def make_call(endpoint: Endpoint, arguments: dict[str, Any]) -> tuple[Request, list[str]]:
    """Arguments as fal's clients send them -> the request that they make, and notes on what was left out.

    As over HTTP at fal, unknown keys are ignored, and so are the fields that turbo and flash fix.

    Raises:
        RequestError: a field is missing or wrong.
    """
    ignored = [k for k in STANDARD_ONLY if k in arguments and endpoint.variant != "standard"]
    notes = [f"{k} is fixed on {endpoint.name} and was ignored" for k in ignored]
    fields = {k: v for k, v in arguments.items() if k in Request.model_fields and k not in (*ignored, "images")}
    urls = arguments.get("image_urls") or ()
    if endpoint.edits and (not isinstance(urls, (list, tuple)) or not urls):
        detail = {"loc": ["image_urls"], "msg": "Field required", "type": "missing", "input": None}
        raise RequestError(f"{endpoint.name} needs image_urls: a list of one to ten pictures.", [detail])
    if endpoint.edits:
        fields["images"] = tuple(urls)
    elif urls:
        notes.append(f"image_urls is read by {variants()['standard'].endpoint}/edit only and was ignored")
    return make_request(endpoint.variant, fields), notes


def make_log(message: str) -> dict[str, Any]:
    """One line of a request's log, as fal's clients show it."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    return {"message": message, "level": "INFO", "source": "flux2-local", "timestamp": stamp}


class Pipelines:
    """Pipelines by variant and acceleration, loaded on first use.

    Which model serves which variant is decided once, while nothing is loaded, so that it does not depend on the order of
    calls. A pipeline that would find no room beside the loaded ones takes their place.

    Args:
        loading: arguments for :meth:`Flux2.load`.
        models: the model of single variants, where it is not that of ``loading``.
    """

    def __init__(self, loading: dict[str, Any], models: dict[Variant, str] | None = None) -> None:
        self.loading, self.models = loading, models or {}
        self.loaded: dict[tuple[Variant, str], Flux2] = {}
        self._sources: dict[Variant, str] = {}

    def arguments(self, variant: Variant, acceleration: str | None = None) -> dict[str, Any]:
        """Arguments of :meth:`Flux2.load` for a variant."""
        own = {"model": self.models[variant]} if variant in self.models else {}
        asked = {"acceleration": acceleration} if acceleration is not None else {}
        return {"acceleration": "regular", **self.loading, **own, **asked, "variant": variant}

    def plans(self) -> dict[Variant, Plan | Flux2Error]:
        """How each variant would run with nothing else loaded, or why it would not."""
        found: dict[Variant, Plan | Flux2Error] = {}
        for variant in VARIANTS:
            try:
                source, found[variant] = _choose(self.arguments(variant))
                self._sources.setdefault(variant, source)
            except Flux2Error as error:
                found[variant] = error
        return found

    def get(self, variant: Variant, acceleration: str | None = None, say: Callable[[str], Any] = str) -> Flux2:
        """The pipeline for a variant, loaded now if need be; ``say`` is told.

        Raises:
            ModelError, PlanError: as :meth:`Flux2.load`.
        """
        arguments = self.arguments(variant, acceleration)
        key = variant, arguments["acceleration"]
        if key not in self.loaded:
            from .pipeline import Flux2

            if not self._sources:
                self.plans()
            arguments["model"] = self._sources.get(variant, arguments.get("model"))
            if self.loaded and _crowded(arguments):
                self.clear()
            say(f"loading {variant} ({arguments['acceleration']})")
            self.loaded[key] = Flux2.load(**arguments)
            for note in self.loaded[key].notes:
                say(note)
        return self.loaded[key]

    def clear(self) -> None:
        """Let go of every pipeline and of its device memory."""
        import torch

        self.loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _choose(arguments: dict[str, Any]) -> tuple[str, Plan]:
    from .costs import Work
    from .settings import choose, hardware_to_use, settings_of

    a, settings = arguments, settings_of(arguments)
    hardware = hardware_to_use(a.get("device"), settings)
    checkpoint, plan = choose(a.get("model"), settings, hardware, Work(), a.get("base"))
    return checkpoint.source, plan


def _crowded(arguments: dict[str, Any]) -> bool:
    """Whether what is loaded already would keep this pipeline's weights from staying on the device."""
    try:
        return _choose(arguments)[1].transformer.placement != "resident"
    except BudgetError:
        return True
