"""The command ``turbo-gguf``: one module per command, loaded when it is used; errors become a message, a hint and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import click

from turbo_gguf import __version__
from turbo_gguf.errors import report
from turbo_gguf.failures import explained

COMMANDS = {
    "plan": ("plan", "Say what each KV cache type takes on a model, and the longest context that fits."),
    "serve": ("serve", "Start llama-server on a model, with a KV cache that fits this machine."),
    "tune": ("tune", "Search the KV cache of a model that loses least under a budget."),
    "ppl-gate": ("gate", "Measure what our KV cache types cost in quality, and judge them against upstream's."),
    "bench": ("bench", "Measure prefill and decode speed against context depth."),
    "bench-serve": ("bench_serve", "Measure serving under load, in a fixed budget of KV memory."),
    "report": ("page", "Write one HTML file of all that was measured."),
    "calibrate": ("calibrate", "Write a calibration, with which a KV cache loses less."),
    "fuse": ("fuse", "Fold a calibration and the rotation of V into the weights of a model."),
    "codec": ("codec", "Say what a cache type costs in bits, memory and error."),
    "models": ("models", "Fetch, list and check model files."),
    "build": ("build", "Fetch, patch and compile llama.cpp."),
    "upstream": ("upstream", "List, fetch and try the llama.cpp snapshots that we work on."),
    "patch": ("patch", "Apply, check and write the patch set."),
    "doctor": ("doctor", "Say what is there, what is missing, and the command that fixes it."),
}
"""Name of a command -> module below ``turbo_gguf.cli`` that has it as ``command``, and its line in ``--help``."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_NO_READER = 128 + signal.SIGPIPE


class LazyGroup(click.Group):
    """Loads the module of a command when it is called; ``--help`` needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table: the main job first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"turbo_gguf.cli.{COMMANDS[cmd_name][0]}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn every error into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise  # click's own ways out
        except KeyboardInterrupt:
            report("interrupted", "the same command again continues where it stopped")
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # such as `| head`
            _discard_output()
            ctx.exit(EXIT_NO_READER)
        except Exception as error:
            found = explained(error)
            report(found.message, found.hint)
            ctx.exit(found.exit_code)


def _discard_output() -> None:
    """Nobody reads it any more, and Python must not try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="turbo-gguf")
def main() -> None:
    """KV caches of 2.25 to 4.5 bits per value for llama.cpp: patched, built, measured and gated.

    Exit codes: 0 pass, 1 gate failed, 2 usage, 3 environment or tool missing, 4 tool crashed or log not understood.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Leave through the ordinary way out, on which running tools are ended and locks released."""
    raise SystemExit(128 + number)
