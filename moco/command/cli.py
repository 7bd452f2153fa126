"""The command line of every command: its parser, its error messages and its exit codes.

The parser is built from the dataclasses of `moco.config` with jsonargparse. No torch is imported,
so help and errors take under a second. A recipe is a YAML file of differences from the defaults;
`--config` may be repeated, and later recipes override earlier ones.
Exit codes: 0 for success, 2 for wrong input, 1 for a run that could not go on (both with one line
on standard error), 130, 129, 143 and 138 for a stop by SIGINT, SIGHUP, SIGTERM and SIGUSR1. The
last line of standard output is one JSON object; everything else goes to standard error.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import yaml

from moco import slurm
from moco.command import launch
from moco.command.paths import PATHS, expanded
from moco.command.recipe import as_option, known_settings, nearest, plain_words, with_contents
from moco.config import RunError, TrainConfig, UserError, with_former_ways
from moco.log import have_standard_error

# Seconds that a rank waits before it ends with an error that another rank may have caused, and with
# one that rank 0 tells.
CONSEQUENCE_S, LAST_WORD_S = 2.0, 30.0


def build_parser(description: str, config: type, extras: dict[str, dict[str, Any]]) -> Any:
    """Build the parser of a command.

    Args:
        description: First line of the help.
        config: Dataclass of dataclasses; each field becomes an option `--GROUP.FIELD`.
        extras: Options of this command alone: name to the keyword arguments of `add_argument`.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    usage = "%(prog)s --config RECIPE.yaml [--GROUP.FIELD VALUE ...]"
    parser = ArgumentParser(
        description=description, usage=usage, exit_on_error=False, default_env=False
    )
    kind = "recipe" if config is TrainConfig else "file of this command's own options, no recipe"
    parser.add_argument(
        "--config", action=ActionConfigFile, help=f"YAML {kind}; may be repeated, later ones win"
    )
    for name, options in extras.items():
        parser.add_argument(f"--{name}", **options)
    for group, kind in get_type_hints(config).items():
        section = parser.add_argument_group(f"{group}: {(kind.__doc__ or '').splitlines()[0]}")
        hints = get_type_hints(kind)
        for item in dataclasses.fields(kind):
            default = (
                item.default_factory() if item.default is dataclasses.MISSING else item.default
            )
            section.add_argument(
                f"--{group}.{item.name}",
                type=hints[item.name],
                default=default,
                help=option_help(item.metadata),
            )
    return parser


def option_help(metadata: Any) -> str:
    """Return the help of an option: what its field means, and its range."""
    bounds = ("above", "at_least", "at_most")
    limits = [f"{key.replace('_', ' ')} {metadata[key]}" for key in bounds if key in metadata]
    return metadata["meaning"].replace("%", "%%") + (f" [{', '.join(limits)}]" if limits else "")


def parse(
    parser: Any,
    config: type,
    argv: Sequence[str],
    stored: dict[str, Any] | None = None,
    usual: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Parse `argv` and return the config dataclass and the extra options.

    Args:
        stored: The settings of a run, in the place of the defaults; of another version, they may
            hold some that are gone, which are left out.
        usual: Options in the place of the defaults, before a recipe.

    Raises:
        UserError: A setting is unknown, given twice or of the wrong type, or a recipe is missing.
            A path names a variable or a user that is unknown here.
    """
    from argparse import ArgumentError

    names = _names(parser)
    _check_arguments(argv, names)
    words = with_contents(argv, names)
    known = with_former_ways(known_settings(stored, names)) if stored else {}
    try:
        values = parser.parse_args([*usual, *([as_option(known)] if known else []), *words])
    except (ArgumentError, ValueError, yaml.YAMLError) as error:
        raise UserError(plain_words(error)) from None
    for name in PATHS & {*names}:
        group, _, field = name.rpartition(".")
        usual = known[group].get(field) if group in known else parser.get_default(name)
        # What a checkpoint names is not expanded: it could read secrets from the environment.
        given = values[name]
        if isinstance(given, list):
            values[name] = [expanded(name, each) for each in given]
        elif isinstance(given, str) and given != usual:  # `embed --index` is no path
            values[name] = expanded(name, given)
    hints = get_type_hints(config)
    groups = {group: kind(**vars(getattr(values, group))) for group, kind in hints.items()}
    extra = {k: v for k, v in vars(values).items() if k not in groups and k != "config"}
    return config(**groups), extra


def _names(parser: Any) -> list[str]:
    """Return the dotted names of all options."""
    return [o[2:] for a in parser._actions for o in a.option_strings if o.startswith("--")]


def _check_arguments(argv: Sequence[str], names: list[str]) -> None:
    """Raise UserError for unknown options, and for values that argparse would take for options."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name = word[2:].split("=", 1)[0]
        if word.startswith("--") and name not in names:
            raise UserError(f"unknown option --{name}{nearest(name, names)}")
        if word == f"--{name}" and re.match(r"-(?!h$)[^-\d.]", following):
            raise UserError(
                f"{word} {following} could be two options: where {following} is the value, write "
                f"{shlex.quote(f'{word}={following}')}"
            )


def option_values(argv: Sequence[str], option: str) -> list[str]:
    """Return the values that the command line gives to an option, in order."""
    words = list(argv)
    values = [
        (place, following)
        for place, (word, following) in enumerate(zip(words, words[1:], strict=False))
        if word == option
    ]
    values += [
        (place, word.split("=", 1)[1])
        for place, word in enumerate(words)
        if word.startswith(f"{option}=")
    ]
    return [value for _, value in sorted(values)]


def run_main(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> None:
    """Run a command's main and print its result as one JSON line, or its error as one line.

    When all ranks raise the same error, rank 0 prints it; a `local` error is printed by its rank.
    """
    have_standard_error()
    atexit.register(_leave_garbage)
    launch.end_with_launcher()
    slurm.answer_warnings()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, launch.stop)
    try:
        slurm.join()
        result = main(sys.argv[1:])
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # also while Python shuts down
    except (UserError, RunError) as error:
        rank = int(os.environ.get("RANK", "0"))
        local = getattr(error, "local", False)
        if local or rank:
            # The death of another rank may be the cause of a local error. A common error is told
            # by rank 0, which may first have to save or to close wandb.
            launch.wait_for_others(CONSEQUENCE_S if local else LAST_WORD_S)
        if local or not rank:
            launch.say(f"error: {f'rank {rank}: ' if rank else ''}{_fold(error)}")
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one ends it without a traceback
        launch.say_stopped(signal.SIGINT, "".join(f": {hint}" for hint in stopped.args))
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception:
        launch.wait_for_others(CONSEQUENCE_S)
        raise
    signal_number = result.pop("stopped_by", 0) if result else 0
    is_told = not result or _printed(result)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python shuts down
    if signal_number:
        if os.environ.get("RANK", "0") != "0":
            launch.wait_for_others(CONSEQUENCE_S)  # rank 0 prints the result
        sys.exit(128 + signal_number)
    if not is_told or (result and result.get("verdict") == "diverged"):
        sys.exit(1)


def _printed(result: dict[str, Any]) -> bool:
    """Print a result as one line; tell whether standard output took it."""
    try:
        print(json.dumps(result), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what Python holds back for its end
        if not isinstance(error, BrokenPipeError):
            launch.say(f"error: standard output does not take the result: {error.strerror}")
        return False
    return True


def _leave_garbage() -> None:
    """Keep Python from looking for garbage at its end in all that torch has made: it takes seconds.

    Libraries bound by nanobind, as Triton with torch 2.15, would print what is left as leaks.
    """
    if not any(kind.__module__ == "nanobind" for kind in type.__subclasses__(type)):
        gc.freeze()


def _fold(error: Exception) -> str:
    """Return the message on one line, with characters that cannot be printed escaped."""
    text = " ".join(str(error).split())
    return text.encode("utf-8", "backslashreplace").decode()
