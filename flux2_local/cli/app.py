"""The commands and their order. Each lives in its own module, imported when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..version import __version__
from . import batch, bench, generate, inspect, serve

EXIT_HELP = """
Exit codes: 0 done, 1 a batch with failures, 2 wrong options or request, 3 model missing or damaged, 4 does not fit in memory, 5
no safety classifier, 6 cannot write, 7 a backend, format or card that was named cannot be used, 130 stopped.
"""


class DefaultGroup(TyperGroup):
    """A group whose commands may be left out: ``flux2-local "a lighthouse"`` generates."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for p in self.get_params(ctx) for name in (*p.opts, *p.secondary_opts)}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["generate", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="FLUX.2 image generation on this machine.\n\n"
    'flux2-local "a lighthouse at dusk" generates; the other commands plan, list, download and inspect.',
    epilog=EXIT_HELP,
)


def show_version(value: bool) -> None:
    if value:
        print(f"flux2-local {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


app.command("generate", help="Turn a prompt into pictures (the default command).")(generate.generate)
app.command("edit", help="Change or combine pictures: like generate, with at least one --image.")(generate.edit)
app.command(
    "batch",
    help="Make every picture of a file of prompts: the model is loaded once, and nothing is lost or made twice.\n\n"
    "Each picture gets a line in the manifest when it is finished. After Ctrl-C, a crash or a full disk, the same command "
    "with --resume goes on where it stopped. The same lines and options give the same files, byte for byte.",
    epilog="Exit codes: 0 all done, 1 some lines or pictures failed and the others are done, the rest as above.",
)(batch.batch)
app.command("sheet", help="Draw a batch's contact sheet and write its gallery, one HTML file.")(batch.sheet)
app.command("serve", help="Answer fal's HTTP API on this machine, with a queue and a page to try it.")(serve.serve)
app.add_typer(bench.app, name="bench")
app.command("plan", help="Say how a request would run on this machine or on a known card, and why.")(inspect.plan)
app.command("models", help="List the models, what is on this disk and what fits.")(inspect.models)
app.command("download", help="Fetch a model, its variants' LoRAs and the safety check; goes on where it stopped.")(
    inspect.download
)
app.command("doctor", help="Show the hardware, versions, and each backend with why it can or cannot be used.")(
    inspect.doctor
)
app.command("show", help="Print the settings inside a picture that flux2-local made.")(inspect.show)
