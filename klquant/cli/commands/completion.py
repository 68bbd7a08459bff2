"""``klquant completion``: the script that lets a shell complete arguments."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a shell completion script.

    It completes commands, options, their values, file names, and the tensors of a calibration. Save it where your
    shell looks for completions, then start a new shell.

    \b
    Example:
      klquant completion bash > ~/.local/share/bash-completion/completions/klquant
      klquant completion zsh > "${fpath[1]}/_klquant"
      klquant completion fish > ~/.config/fish/completions/klquant.fish
    """  # noqa: D301
    from click.shell_completion import get_completion_class

    root = ctx.find_root()
    name = str(root.info_name)
    variable = f"_{name}_complete".replace("-", "_").upper()  # the name that click looks for
    kind = get_completion_class(shell)
    if kind is None:  # click supports all three
        raise NotImplementedError(shell)
    click.echo(kind(root.command, {}, name, variable).source())
