"""Options: a frozen dataclass makes the command line, refuses what cannot be, and is the record of a run."""

import argparse
import dataclasses
import inspect
import math
import os
import re
import sys
import typing
from pathlib import Path

from files import argument_parser, parse_json


LARGEST = 2**40  # of a whole number that has no bound of its own: what is larger is a slip of the keyboard


def parse_config(cls, recipes=None, argv=None, embedded=None):
    """An instance of the frozen dataclass `cls` from the command line: one flag a field, its trailing comment the help.

    A field without a default is a positional argument, and one of type tuple[str, ...] takes one or more values. An
    empty value of an option that may be None is None: --eval-data "" evaluates on nothing. `recipes` maps a name to
    overrides that --recipe applies before the flags; `embedded` names the one that is taken when neither --model nor
    --data is given. With --resume the options are those of the run in --out, and the flags. Unknown, abbreviated or
    mistyped flags, and values that cls.__post_init__ refuses with ValueError, end the program with one line and
    status 2.
    """
    parser = argument_parser(sys.modules[cls.__module__].__doc__)
    if recipes:
        parser.add_argument("--recipe", choices=recipes, help="a set of options; flags given beside it win" +
                            (f"; without --model and --data it is {embedded}" if embedded else ""))
    types = typing.get_type_hints(cls)
    source = inspect.getsource(cls)
    for f in dataclasses.fields(cls):
        add_option(parser, f, types[f.name], trailing_comment(source, f.name))
    given = vars(parser.parse_args(argv))
    recipe = given.pop("recipe", None)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = value = tuple(value)
        if isinstance(value, tuple) and not all(part.strip() for part in value):
            parser.error(f"{flag_of(name)}: one of its values is empty: leave it out")
        if value == "" and type(None) in typing.get_args(types[name]):
            given[name] = None
        elif isinstance(value, str) and not value.strip():
            parser.error(f"{flag_of(name)} is empty: give a value, or leave the option out")
    own = "model" in given or "data" in given
    chosen = recipe or (None if own else embedded)
    options = recipes[chosen] if chosen else {}
    try:
        if given.get("resume"):
            out = given.get("out") or options.get("out") or cls.out
            options = saved_options(cls, out) | (recipes[recipe] if recipe else {}) | {"out": out}
        return cls(**(options | given))
    except ValueError as e:
        parser.error(str(e))


def saved_options(cls, folder):
    """The options of the run in a folder, from its config.json; ValueError if they are not options of `cls`."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise ValueError(f"--resume: {file} is not there, so there is no run to resume; --out names the run's folder, "
                         "without --resume a run begins")
    try:
        record = parse_json(file.read_bytes())
        options, types = record["options"], typing.get_type_hints(cls)
        fits = set(options) <= set(types) and all(has_type(value, types[name]) for name, value in options.items())
        fits &= "resumed" not in record or isinstance(record["resumed"], list)
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if fits and "keep" in types:
        options = {"keep": 0} | options  # a run from before there was --keep kept all, and goes on to
    if not fits:
        raise ValueError(f"{file}: is not the config.json of a run of this script and version; it cannot be resumed")
    return options


def has_type(value, wanted):
    """Is a value from JSON one of an option's type? Whole numbers are floats, too; true and false are no numbers."""
    kinds = typing.get_args(wanted) or (wanted,)
    if float in kinds:
        kinds += (int,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def trailing_comment(source, name):
    """The comment behind a field in its class's source."""
    found = re.search(rf"^    {name}:.*?  # (.+)$", source, re.M)
    assert found, f"{name} needs a trailing comment: it is the option's help"
    return found[1].replace("%", "%%")  # argparse formats it


def add_option(parser, field, kind, text):
    """The flag of one field. Its default is suppressed: what comes back is what was given, and wins over a recipe."""
    flag = flag_of(field.name)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=field.name,
                            help=f"{text} (default: {field.default})")
        return
    several = "+" if typing.get_origin(kind) is tuple else None
    kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)  # str of tuple[str, ...], str | None
    if field.default is dataclasses.MISSING:
        parser.add_argument(field.name, type=kind, help=text, metavar=field.name.upper(), nargs=several)
        return
    default = " ".join(field.default) if several else field.default
    parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), dest=field.name,
                        help=f"{text} (default: {default})", nargs=several)


def check_at_least(cfg, low, *names):
    """ValueError names the first of these options that is below `low`, infinite, or not a number."""
    for name in names:
        value = getattr(cfg, name)
        if not low <= value < math.inf:
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"{flag_of(name)} must be at least {low}{finite}, got {value}")
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{flag_of(name)} must be at most {LARGEST}, got {value}")


def check_between(cfg, low, high, *names):
    """ValueError names the first of these options that is outside [low, high]."""
    for name in names:
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"{flag_of(name)} must be from {low} to {high}, got {getattr(cfg, name)}")


def check_choice(cfg, name, *choices):
    if getattr(cfg, name) not in choices:
        raise ValueError(f"{flag_of(name)} is {' or '.join(choices)}, got {getattr(cfg, name)!r}")


def check_training(cfg):
    """The options that both training loops have; ValueError names the one that cannot be."""
    for name in ("model", "data"):
        if not getattr(cfg, name):
            raise ValueError(f"{flag_of(name)} is missing: --model, a Hugging Face folder, and --data, a file, need "
                             "each other (without both: the generated task)")
    check_at_least(cfg, 1, "micro_tokens", "eval_pairs")
    check_at_least(cfg, 0, "lr", "weight_decay", "eval_every", "n_samples", "save_every", "keep")
    if cfg.lr == 0:
        raise ValueError("--lr must be above 0: at 0 nothing is learned")
    check_between(cfg, 0, 1, "final_lr_frac")
    check_between(cfg, 0, 4096, "threads")
    check_between(cfg, 0, 2**40 - 1, "seed")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{flag_of(name)} must be at least 0 and below 1, got {getattr(cfg, name)}")
    if not cfg.max_norm > 0:
        raise ValueError(f"--max-norm must be above 0 (inf does not clip), got {cfg.max_norm}")
    check_choice(cfg, "dtype", "float32", "bfloat16")
    if cfg.resume:  # evaluation may be switched off by --eval-data alone
        return
    if cfg.eval_every not in (0, type(cfg).eval_every) and not cfg.eval_data:
        raise ValueError(f"--eval-every {cfg.eval_every} needs --eval-data, the pairs to judge")
    if cfg.keep_best and not (cfg.eval_data and cfg.eval_every):
        raise ValueError("--keep-best compares evaluations: it needs --eval-data and an --eval-every above 0")


def check_sampler_ranks(cfg, batch_invariant=False):
    if cfg.sampler_ranks not in (1, 2, 4, 8):
        raise ValueError(f"--sampler-ranks is 1, 2, 4 or 8, got {cfg.sampler_ranks}")
    if cfg.sampler_ranks > 1 and batch_invariant:
        raise ValueError("--batch-invariant and --sampler-ranks above 1 do not go together: ranks that sample as one "
                         "sum a layer in parts, the trainer in one, so their bits differ")


def rank_and_world():
    """This process's number among those of torchrun, and how many they are; ValueError if only some of it is told: a
    rank 1 of 1 would train for hours and write nothing."""
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if told["RANK"] is None and told["WORLD_SIZE"] is None:
        return 0, 1
    numbers = [told[name] or "" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    if not told["MASTER_ADDR"] or not all(x.isdecimal() for x in numbers) or not int(numbers[0]) < int(numbers[1]):
        raise ValueError("the environment has " + ", ".join(f"{name}={value}" for name, value in told.items()) +
                         ": start with torchrun, which sets all of them, or unset RANK and WORLD_SIZE")
    return int(numbers[0]), int(numbers[1])


def refuse_ranks(script):
    """Before a script that would do the same work in every process, into the same files."""
    if rank_and_world()[1] > 1:
        raise ValueError(f"{script} needs one process: start it with python, not torchrun")


def flag_of(name):
    return "--" + name.rstrip("_").replace("_", "-")
