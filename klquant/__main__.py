"""The ``klquant`` command. It works, or names the extra to install, whatever is installed."""

import sys


def main() -> None:
    """Run the command line, or name the extra that it needs."""
    try:
        from klquant.cli import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "klquant":
            raise
        sys.stderr.write(f"klquant: the command line needs {error.name}: pip install 'klquant[cli]'\n")
        sys.exit(2)
    except KeyboardInterrupt:  # the exit code of an interrupted command
        sys.exit(130)
    cli(prog_name="klquant")


if __name__ == "__main__":
    main()
