"""`fewstep COMMAND [FILE.yaml] [key=value ...] [--key value ...] [--dry-run]`.

Exit codes: 0 done, 1 a failure of ours (with its traceback), 2 bad input (one line), 130 Ctrl-C, 141 the reader of the
output left, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fewstep.cluster.commands import COMMANDS, Command
from fewstep.platform.config import ConfigKey, config_keys, load_config, render_config
from fewstep.platform.errors import ConfigError, FewstepError, UserError
from fewstep.platform.registry import nearest

_USAGE = "fewstep COMMAND [FILE.yaml] [key=value ...] [--key value ...] [--dry-run]"


class _Parser(argparse.ArgumentParser):
    """argparse, with its own mistakes reported like every other user error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", message, _USAGE, f"see `{self.prog} --help`")

    @property
    def options(self) -> list[str]:
        """Every option as it is spelled."""
        return [option for action in self._actions for option in action.option_strings]


class _Override(argparse.Action):
    """`--key value` becomes one more override, applied after every `key=value`."""

    def __init__(self, *args: Any, key: ConfigKey, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key
        self.texts: list[str] = []

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            values = "false" if (option_string or "").startswith("--no-") else "true"
        kinds = {kind.strip() for kind in self.key.type.split("|")}
        # A prompt or a path is taken as it is; `key=value` on the other hand is always YAML.
        as_it_is = self.key.num_values > 1 or bool(kinds & {"str", "Path"})
        text = json.dumps(values, ensure_ascii=False) if as_it_is else values
        if self.key.repeats:
            # Once it is a value, several times a list of them.
            self.texts.append(text)
            text = text if len(self.texts) == 1 else f"[{', '.join(self.texts)}]"
        namespace.overrides.append(f"{self.key.path}={text}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except FewstepError as error:
        # One raised in an actor arrives wrapped, with the remote traceback as its text and itself as the cause.
        cause = getattr(error, "cause", None)  # of an ActorDied that is a text, part of the message
        message = str(cause if isinstance(cause, FewstepError) else error)
        print("fewstep: error: " + " ".join(message.split()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("fewstep: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has left (`fewstep ... | head`). What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    # Unwinds the stack, so that every session and temporary file is closed on the way out.
    raise SystemExit(128 + signum)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"fewstep {version('fewstep')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        hint = nearest(name, list(COMMANDS))
        raise ConfigError("command", repr(name), ", ".join(COMMANDS), "choose one of them" + hint)
    return _run(name, COMMANDS[name], rest)


def _run(name: str, command: Command, argv: list[str]) -> int:
    config_class = command.config_class()
    parser = _parser(name, command, config_keys(config_class))
    arguments, unknown = parser.parse_known_intermixed_args(argv, argparse.Namespace(overrides=[]))
    for option in unknown:
        hint = nearest(option.partition("=")[0], sorted(parser.options))
        raise ConfigError(
            option, "an unknown option", f"see `fewstep {name} --help`", "check its spelling" + hint
        )
    files = [arguments.config] if arguments.config else []
    bare = [item for item in arguments.items if "=" not in item]
    overrides = [item for item in arguments.items if "=" in item] + arguments.overrides
    if command.operands:
        words = [item for item in bare if not item.endswith((".yaml", ".yml"))]
        if len(words) > len(command.operands):
            allowed = " ".join(command.operands).upper()
            raise ConfigError("command line", " and ".join(words), allowed, "leave out the rest")
        given = [
            f"{key}={json.dumps(word, ensure_ascii=False)}"
            for key, word in zip(command.operands, words, strict=False)
        ]
        overrides = given + overrides
        bare = [item for item in bare if item not in words]
    files += bare
    if len(files) > 1:
        raise ConfigError("command line", " and ".join(files), "one configuration file", "name one of them")
    config = load_config(config_class, Path(files[0]) if files else None, overrides)
    if arguments.dry_run:
        print(render_config(config), end="")
        command.show_plan(config)
        return 0
    if command.ray:
        command.execute(config, arguments.ray_address, arguments.ray_cpus)
    else:
        command.execute(config)
    return 0


def _parser(name: str, command: Command, keys: list[ConfigKey]) -> _Parser:
    parser = _Parser(
        prog=f"fewstep {name}",
        usage=_USAGE.replace("COMMAND", " ".join([name, *(f"[{key.upper()}]" for key in command.operands)])),
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog="Every key can be given in the file, as key=value (the value is YAML), or as --key value; the last form wins.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items", nargs="*", metavar="FILE.yaml | key=value", help="configuration file and overrides"
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="the configuration file, if its name has a `=` in it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    if command.ray:
        parser.add_argument(
            "--ray-address", metavar="HOST:PORT", help="join this Ray cluster; default: start one"
        )
        parser.add_argument(
            "--ray-cpus", metavar="N", type=int, help="logical CPUs of the Ray that is started"
        )
    group = parser.add_argument_group("keys")
    for key in keys:
        detail = " ".join(part for part in (key.description, f"[{key.type}; {key.default}]") if part)
        spelled = key.path.replace("_", "-")
        flag = key.type == "bool"
        shape: dict[str, Any] = {"nargs": 0} if flag else {"metavar": "VALUE"}
        if key.num_values > 1:
            shape["nargs"] = key.num_values
        group.add_argument(
            *((f"--{spelled}", f"--no-{spelled}") if flag else (f"--{spelled}",)),
            action=_Override,
            key=key,
            dest="overrides",
            default=argparse.SUPPRESS,
            help=detail.replace("%", "%%"),
            **shape,
        )
    return parser


def _overview() -> str:
    lines = [
        f"usage: {_USAGE}",
        "",
        "Serve diffusion language models and train them to need fewer denoising steps.",
        "",
    ]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "`fewstep COMMAND --help` lists the keys of a command; `--dry-run` prints what it would use.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
