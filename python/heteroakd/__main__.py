"""`python -m heteroakd`: the command `heteroakd` without its entry point."""

import sys

from heteroakd.cli import main

if __name__ == "__main__":
    sys.exit(main())
