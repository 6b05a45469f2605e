"""`python -m jaxsim` is the `jaxsim` command."""

import os
import sys

try:
    from jaxsim.cli import main
except KeyboardInterrupt:
    # The command itself sees to Ctrl-C from its first line on.
    os.write(2, b"jaxsim: interrupted\n")
    os._exit(130)

if __name__ == "__main__":
    sys.exit(main())
