"""The command ``decal``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2."""
    # Waiting threads that spin make every small operation slow on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import click
        import rich  # noqa: F401
    except ImportError as error:
        sys.exit(_fail(f"the command needs packages that aren't installed ({error.name}); pip install 'decal[eval]'"))
    from decal.eval.commands import cli
    from decal.samplers.errors import DecalError

    try:
        cli(standalone_mode=False)
    except DecalError as error:
        sys.exit(_fail(str(error)))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "decal"
        sys.exit(_fail(f"{error.format_message()} (see {command} --help)"))
    except (click.Abort, KeyboardInterrupt):
        print("decal: interrupted; what was computed is kept and used by the next run", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str) -> int:
    # What servers say begins so already.
    print(f"decal: {message.removeprefix('decal: ')}", file=sys.stderr)
    return 2
