"""`python -m peft_subspace autoload enable | disable | status`"""

from __future__ import annotations

import argparse

from . import autoload


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m peft_subspace", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("autoload", help="make PEFT know our types in every process of this environment")
    command.add_argument("action", choices=["enable", "disable", "status"])
    action = parser.parse_args(arguments).action
    if action == "enable":
        autoload.enable()
    elif action == "disable":
        autoload.disable()
    print(f"autoload is {'enabled' if autoload.is_enabled() else 'disabled'} in this environment")


if __name__ == "__main__":
    main()
