"""`ctx-jax pretrain`: training the run of a config file."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from ctx_jax.cli.config_file import load_config
from ctx_jax.cli.parsing import Folder, parse


def pretrain(argv: Sequence[str]) -> int:
    """pretrain: the fields that may be overridden are those of the config file, so that is read first."""
    from ctx_jax.experiment import Experiment
    from ctx_jax.experiment import pretrain as run
    from ctx_jax.hosts import Hosts, joined
    from ctx_jax.models.bert import BertConfig

    config = next((word for word in argv if word.endswith(".py")), None)
    default = Experiment(data="DATA", model=BertConfig()) if config is None else load_config(pathlib.Path(config))

    @dataclass(frozen=True)
    class Pretrain:
        """Pre-trains the run that a config file describes; started again, goes on from the last checkpoint.

        Every field of the config can be overridden: `--steps 100`, `--optimizer.schedule.peak 1e-3`. SIGTERM saves and
        exits 0. Name the config file to see its values as the defaults below.

        Several processes train one model: start the command in each, with `--hosts.auto` or with the other three of
        `--hosts`. What stops one of them stops all; see docs/pods.md.
        """

        config: Annotated[Positional[pathlib.Path], arg(metavar="CONFIG")]
        """A Python file that defines `config`, an Experiment."""
        workdir: Folder
        """The run directory; all the processes must see it."""
        hosts: Hosts = Hosts()
        experiment: Annotated[Experiment, arg(name="")] = field(default_factory=lambda: default)

    # Model and objective are of the kinds that the config has: their fields may be overridden, not the kinds.
    command = parse(Pretrain, "pretrain", argv, tyro.conf.AvoidSubcommands)
    with joined(command.hosts) as team:
        outcome = run(command.experiment, command.workdir, team=team)
    if outcome.finished and team.process == 0:
        print(f"{_held_out(outcome.evaluation)}\nthe run is in {command.workdir}")
    return 0


def _held_out(figures: dict[str, float]) -> str:
    """What a run came to, beside what a model that sees no context could come to."""
    without = f"unigram entropy of the same tokens {figures['unigram_entropy']:.3f} nats"
    if "perplexity" in figures:
        both = f"{figures['forward_perplexity']:,.1f} forwards, {figures['backward_perplexity']:,.1f} backwards"
        return f"held-out perplexity {figures['perplexity']:,.1f} ({both}; {figures['loss']:.3f} nats); {without}"
    return f"held-out masked-LM loss {figures['mlm_loss']:.3f} nats, accuracy {figures['mlm_accuracy']:.1%}; {without}"
