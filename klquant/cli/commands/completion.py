"""``klquant completion``: what a shell needs to complete its arguments."""

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes a shell complete commands and names.

    It completes commands, options, their choices, files, and the tensors of a calibration. The script goes where the
    shell looks for such; a new shell finds it.

    \b
    Example:
      klquant completion bash > ~/.local/share/bash-completion/completions/klquant
      klquant completion zsh > "${fpath[1]}/_klquant"
      klquant completion fish > ~/.config/fish/completions/klquant.fish
    """  # noqa: D301
    from click.shell_completion import get_completion_class

    root = ctx.find_root()
    name = str(root.info_name)
    variable = f"_{name}_complete".replace("-", "_").upper()  # as click itself looks for it
    kind = get_completion_class(shell)
    if kind is None:  # click has all three of them
        raise NotImplementedError(shell)
    click.echo(kind(root.command, {}, name, variable).source())
