"""`python -m peft_subspace autoload enable | disable | status` and `python -m peft_subspace spectrum MODEL`"""

from __future__ import annotations

import argparse

from . import autoload


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m peft_subspace", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("autoload", help="make PEFT know our types in every process of this environment")
    command.add_argument("action", choices=["enable", "disable", "status"])
    command = commands.add_parser("spectrum", help="show how many singular values hold how much of a model's weights")
    command.add_argument("model", help="a folder or a Hub id")
    command.add_argument("--target-modules", nargs="+", default=["all-linear"], help="as in SvfitConfig; all-linear")
    command.add_argument("--energy", type=float, nargs="+", default=[0.9, 0.99], help="shares of the squared norm; 0.9 0.99")
    command.add_argument("--picture", help="write a picture too, such as spectrum.png")
    options = parser.parse_args(arguments)
    if options.command == "spectrum":
        show_spectrum(parser, options)
        return
    if options.action == "enable":
        autoload.enable()
    elif options.action == "disable":
        autoload.disable()
    print(f"autoload is {'enabled' if autoload.is_enabled() else 'disabled'} in this environment")


def show_spectrum(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Print the table of a model's spectra, and draw them if asked."""
    try:
        import matplotlib  # noqa: F401  # before minutes of work
        from rich.console import Console
    except ImportError as error:
        parser.exit(2, f"{error}. Install what draws: pip install 'peft-subspace[examples]'\n")
    from transformers import AutoModel

    from .spectrum import draw_spectrum, spectrum_table, weight_spectra

    try:
        spectra = weight_spectra(AutoModel.from_pretrained(options.model), options.target_modules, options.energy)
    except (OSError, ValueError) as error:  # no such model; a name or an energy that is none
        parser.exit(2, f"{error}\n")
    Console().print(spectrum_table(spectra))
    if options.picture:
        draw_spectrum(spectra, options.picture)
        print(f"Written: {options.picture}")


if __name__ == "__main__":
    main()
