"""The beginning of the command line, as `lmd` and as `python -m llamacpp_mqtt_deploy`."""

from __future__ import annotations

import os
import signal
import sys

_CANCELLED = 130
"""As in `cli`, which is not loaded yet."""


def main() -> None:
    # While modules load, Ctrl-C would raise in whatever line of them runs: a traceback, or a warning and no end at all.
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where the caller has it ignored
    if heard:
        signal.signal(signal.SIGINT, lambda _signal, _frame: os._exit(_CANCELLED))
    from llamacpp_mqtt_deploy.cli import main as command_line

    try:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command_line()
    except KeyboardInterrupt:  # before the command line takes it
        sys.exit(_CANCELLED)


if __name__ == "__main__":
    main()
