"""A comparison from what is wanted to its file, which is written anew after every picture: what ends it early loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import costs, files, load, rates, store
from ..errors import OutputError, RequestError
from ..hardware import Hardware, probe
from . import environment, results, runner
from .contenders import CONTENDERS, Contender
from .subject import PROMPTS, Judged, Subject


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        model: a name, a hub id or a folder.
        sizes: width and height, pixels.
        contenders: in the order of the results.
        rules: how they work.
        steps: of the standard variant; the model's own number where None.
        device: torch's name of it; the best there is where None.
        out: the JSON file; a new one in :data:`.environment.RESULTS` where None.
        judged: prompts and their judge, for the bundled model.
        label: what the result calls the model; ``model`` where None.
    """

    model: str
    sizes: Sequence[tuple[int, int]]
    contenders: Sequence[Contender]
    rules: runner.Rules
    steps: int | None = None
    device: str | None = None
    out: Path | None = None
    judged: Judged | None = None
    label: str | None = None


@dataclass
class Measured:
    """What came of it, so far.

    Attributes:
        record: what is in the file.
        path: the file.
        rows: the figures, by size.
        stopped: it was interrupted.
    """

    record: dict[str, Any]
    path: Path
    rows: dict[str, list[results.Row]] = field(default_factory=dict)
    stopped: bool = False

    def note(self, subject: Subject, outcome: runner.Outcome, judge: Judged | None = None) -> None:
        """Take over what is known of one size.

        Args:
            judge: who looks at the pictures.
        """
        found = results.rows(outcome, subject, self.record["rates"])
        self.rows[subject.size] = found if judge is None else results.with_adherence(found, outcome, judge)
        self.record["rows"] = [asdict(row) for rows in self.rows.values() for row in rows]
        self.record["rounds_done"][subject.size] = outcome.rounds
        self.record["refused"][subject.size] = outcome.refused
        if names := results.references(outcome):
            self.record["held_against"][subject.size] = dict(zip(("quality", "speed"), names, strict=True))

    def keep(self) -> None:
        """Write the file.

        Raises:
            OutputError: it could not be written; what was there is there.
        """
        environment.keep(self.record, "speed", self.path)


def measure(wanted: Wanted, say: runner.Say) -> Measured:
    """Let the contenders work, and write down what is known after every picture.

    ``KeyboardInterrupt`` while they do ends it, with what was measured by then.

    Args:
        say: told what goes on, a line each.

    Raises:
        ModelError: the model is not there.
        RequestError: the judge does not know this model.
        OutputError: the result cannot be written.
    """
    checkpoint = store.find(wanted.model, "standard")
    if wanted.judged is not None and not checkpoint.bundled:
        raise RequestError(
            f"The judge knows the bundled model's scenes and nothing else, so it cannot judge {wanted.model}. "
            "Measure that without it: flux2-local bench."
        )
    hardware = probe(wanted.device, measure=True)  # here, so that no contender's loading takes longer for it
    record = environment.record(hardware.device)
    path = wanted.out or files.free_name(environment.place(record, "speed"))
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name the JSON file to write, such as --out {path / 'speed.json'}.")
    nearest = next(
        folder for folder in path.absolute().parents if folder.exists()
    )  # the others are made with the first result
    files.check_folder(nearest, 2**20, "--out")
    steps = wanted.steps or checkpoint.preset.recipe("standard").steps
    subjects = [Subject(wanted.model, hardware.device, width, height, steps) for width, height in wanted.sizes]
    rules = wanted.rules
    if rules.apart is None:
        rules = replace(rules, apart=not fit_together(wanted.contenders, subjects[0]))
    prompts = PROMPTS if wanted.judged is None else wanted.judged.prompts
    reached = rates.measure(hardware.device, products(hardware), seconds=0.5) if hardware.kind != "mps" else {}
    rates.give_back(hardware)
    record |= {"rates": reached, "model": wanted.label or wanted.model, "steps": steps, **asdict(rules)}
    record |= {"prompts": prompts[: rules.rounds], "rounds_done": {}, "held_against": {}, "rows": [], "refused": {}}
    record["not_asked"] = [name for name in CONTENDERS if name not in {c.name for c in wanted.contenders}]
    measured = Measured(record, path)
    for subject in subjects:
        fill(measured, subject, wanted, rules, prompts, say)
        if measured.stopped:
            break
    return measured


def products(hardware: Hardware) -> list[str]:
    """The types that contenders multiply in: the stock pipeline and the exact tier take float32 or bfloat16, whether the device is
    fast in it or not, and the others a fast one."""
    return sorted({"float32", "bfloat16", *hardware.fast_dtypes})


def fill(
    measured: Measured, subject: Subject, wanted: Wanted, rules: runner.Rules, prompts: Sequence[str], say: runner.Say
) -> None:
    """Measure one size."""
    outcome = runner.Outcome()
    try:
        with closing(runner.run(wanted.contenders, subject, prompts, rules, say)) as progress:
            for outcome in progress:
                measured.note(subject, outcome)
                if measured.record["rows"]:
                    measured.keep()
    except KeyboardInterrupt:
        measured.stopped = True
        if not measured.rows.get(subject.size):
            return
    with suppress(KeyboardInterrupt):  # a second one; the loop has kept everything but what the judge says
        measured.note(subject, outcome, wanted.judged)
        if wanted.judged is not None:
            verdicts = "".join(wanted.judged.ceiling(subject.width, subject.height, rules.rounds))
            drawings = measured.record.setdefault("adherence_of_drawings", {})
            drawings[subject.size] = f"{100 * verdicts.count('1') / len(verdicts):.0f} % of {len(verdicts)}"
        measured.keep()


def fit_together(contenders: Sequence[Contender], subject: Subject) -> bool:
    """Whether the weights of all that may run fit into the free memory at the same time, each in float32."""
    able = [contender for contender in contenders if contender.obstacle(subject) is None]
    weights = costs.checkpoint_parameters(load.architecture(store.find(subject.model, "standard"))) * 4
    return len(able) * weights <= probe(subject.device).free
