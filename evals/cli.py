"""radio-eval: the command line of the evaluations."""

import click

from evals.commands.features import mode_switch, rank, retrieve, similarity
from evals.commands.knn import knn
from evals.commands.report import everything, report
from evals.commands.sam import sam
from evals.commands.segment import segment
from evals.commands.throughput import throughput
from evals.commands.vlm import vlm
from evals.commands.zero_shot import zero_shot
from radio_cache import __version__
from radio_cache.terminal.help import HELP_SETTINGS, OrderedGroup
from radio_cache.terminal.output import allow_module_option


@click.group(
    cls=OrderedGroup,
    # By use: the whole report first, then single evaluations, then tools.
    order=("all", "report", "knn", "zero-shot", "segment", "sam", "vlm"),
    context_settings=HELP_SETTINGS,
)
@click.version_option(__version__, prog_name="radio-eval")
def main() -> None:
    """Evaluate trained students, and compare them with their teachers and other models."""


COMMANDS = (
    knn,
    zero_shot,
    segment,
    sam,
    vlm,
    throughput,
    mode_switch,
    rank,
    retrieve,
    similarity,
    report,
    everything,
)

for command in COMMANDS:
    # Students may be modules of the user's own: every command can load them.
    main.add_command(allow_module_option(command))


if __name__ == "__main__":
    main()
