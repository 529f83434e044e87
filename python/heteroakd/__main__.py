"""The command `heteroakd`, which Ctrl-C ends without a traceback from its first moment on."""

import signal
import sys


def main() -> int:
    """What `heteroakd.cli.main` returns. While its libraries load, Ctrl-C is the system's to handle: cli takes it back
    when there is something to be put in order."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from heteroakd.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
