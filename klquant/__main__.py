"""The ``klquant`` command. It checks that the command line is installed, and runs it."""

import sys


def main() -> None:
    """Run the command line, or say which package it needs."""
    try:
        from klquant.cli import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "klquant":
            raise
        sys.stderr.write(f"klquant: the command line needs {error.name}: pip install 'klquant[cli]'\n")
        sys.exit(2)
    except KeyboardInterrupt:  # the exit status that the command line itself uses
        sys.exit(130)
    cli(prog_name="klquant")


if __name__ == "__main__":
    main()
