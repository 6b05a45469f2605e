"""The `jaxsim` command.

`commands` parses and turns what happens into an exit status, `process` is what every command does with its process,
`run`, `listing` and `imports` are the commands that belong to no other unit.

Imports are inside the commands, so that `--help` and `--version` answer at once.
"""

from jaxsim.cli.commands import main

__all__ = ["main"]
