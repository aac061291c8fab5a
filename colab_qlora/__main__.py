"""The command line: `python -m colab_qlora doctor|install|plan`.

A subcommand is one function that adds its parser and names its handler; `COMMANDS` lists them.
Handlers import what they need, so `--version` and `--help` work whatever is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from colab_qlora.errors import UserError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def _add_doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor", help="what machine this is, what is wrong, and the command that mends it"
    )
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    parser.set_defaults(handler=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from colab_qlora.doctor import run_doctor

    return run_doctor(options.json)


def _add_install(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "install", help="install what is missing and move nothing that is installed"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, change nothing")
    parser.add_argument(
        "--remove-torchao",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="remove a torchao that PEFT rejects (default: only on Colab and Kaggle)",
    )
    parser.add_argument(
        "--allow-torch", action="store_true", help="install torch too where there is none"
    )
    parser.add_argument(
        "--self-test", action="store_true", help="afterwards run a 4-bit layer for a few seconds"
    )
    parser.set_defaults(handler=_install)


def _install(options: argparse.Namespace) -> int:
    from colab_qlora.install import install_missing, self_test

    done = install_missing(
        dry_run=options.dry_run,
        remove_torchao=options.remove_torchao,
        allow_torch=options.allow_torch,
    )
    print(done)
    replaced = [name for name, (before, _) in done.changes.items() if before is not None]
    if replaced:
        # this process cannot see what a notebook that started it has imported
        print(f"restart the kernel of a notebook that has imported one of: {', '.join(replaced)}")
    if not done.ok:
        return 1
    if options.self_test and not options.dry_run:
        tested = self_test()
        print(tested)
        return 0 if tested.ok else 1
    return 0


def _add_plan(subparsers: Subparsers) -> None:
    from colab_qlora.plan_command import add_arguments, run_plan

    parser = subparsers.add_parser(
        "plan", help="what training a model needs on a GPU: does it fit, how long does it take"
    )
    add_arguments(parser)
    parser.set_defaults(handler=run_plan)


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_doctor, _add_install, _add_plan)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    from colab_qlora import __version__

    parser = argparse.ArgumentParser(
        prog="python -m colab_qlora", description="QLoRA fine-tuning on one small GPU."
    )
    parser.add_argument("--version", action="version", version=f"colab_qlora {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; a user's mistake gives 2 and one line."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.handler(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
