"""The command line: `python -m spepolicy` and the script `spepolicy`.

What needs no configuration (the list of policies, the help, a misspelt policy) is answered before Hydra is imported.
Everything else is composed by Hydra and handed to `spepolicy.lab.run`. Exit status: 0 for success, 2 for whatever the
user can correct, with one message on standard error, 130 after Ctrl-C; a bug keeps its traceback and gives 1.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spepolicy.errors import ConfigurationError, SpePolicyError, nearest

if TYPE_CHECKING:
    from spepolicy.launch import Session

__all__ = ["main"]

USER_ERROR = 2
INTERRUPTED = 130
FULL_ERROR = "HYDRA_FULL_ERROR"

# Flags of Hydra that show something instead of running a policy, and flags that take a value.
_SHOWS = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--experimental-rerun"}
_COMPLETES = {"--shell-completion", "-sc"}
_CONFIG_SOURCES = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
_VALUED = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"} | _CONFIG_SOURCES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with *argv* (default: the process's arguments) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = os.environ.get(FULL_ERROR) == "1"
    try:
        answer = _quick_answer(arguments)
        return _compose(arguments, show_traceback) if answer is None else answer
    except SpePolicyError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# ---- without Hydra ---------------------------------------------------------------------------------------------------


def _quick_answer(arguments: list[str]) -> int | None:
    """Answer what needs no configuration; return the exit status, or None if Hydra must compose one."""
    if not _COMPLETES.isdisjoint(arguments):
        return None
    if "--version" in arguments:
        from spepolicy.version import program_version

        print(f"spepolicy {program_version()}")
        return 0
    if "--completion" in arguments:
        return _print_completion(arguments)
    words = _words(arguments)
    if "--help" in arguments or "-h" in arguments:
        return _print_help(words)
    names = _policy_names(words)
    _check_words(words)
    if words == ["task=plugins"]:
        from spepolicy.plugin_list import plugin_table

        print(plugin_table())
        return 0
    if names is None and not _may_have_policy(arguments, words):
        from spepolicy.usage import policy_list

        if words:
            print("error: no policy is chosen; add +policy=NAME", file=sys.stderr)
        print(policy_list())
        return USER_ERROR
    if _CONFIG_SOURCES.isdisjoint(arguments):  # the user's own configuration may add names to the group
        from spepolicy.plugins import find_policy

        for name in names or ():
            find_policy(name)
        _check_choices(words)
    return None


def _print_help(words: list[str]) -> int:
    from spepolicy.schema import GROUPS
    from spepolicy.usage import group_help, overview, policy_help

    groups = [word for word in words if "=" not in word]
    names = _policy_names(words)
    if names:
        print("\n\n".join(policy_help(name) for name in names))
    elif groups:
        for group in groups:
            if group not in GROUPS:
                known = ", ".join(GROUPS)
                raise ConfigurationError(f"--help {group}: no such group. Known: {known}.{nearest(group, GROUPS)}")
        print("\n\n".join(group_help(group) for group in groups))
    else:
        print(overview())
    return 0


def _print_completion(arguments: list[str]) -> int:
    from spepolicy.completion import BASH

    shell = arguments[arguments.index("--completion") + 1 :][:1]
    if shell != ["bash"]:
        raise ConfigurationError(
            f"--completion {' '.join(shell)}: the shell must be bash. For the script spepolicy, Hydra also knows fish "
            "and zsh: see --hydra-help."
        )
    print(BASH)
    return 0


def _words(arguments: list[str]) -> list[str]:
    """Return the arguments that are neither flags nor values of flags."""
    words = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if not word.startswith("-") and before not in _VALUED:
            words.append(word)
    return words


def _policy_names(words: list[str]) -> list[str] | None:
    """Return the policies that the words name plainly, or None if no word chooses any."""
    found: list[str] | None = None
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.lstrip("+").partition("@")[0] == "policy":
            if not key.startswith("+"):
                _explain_plus(words, value)
            found = found or []
            if all(part.strip().isidentifier() for part in value.split(",")):
                found += [part.strip() for part in value.split(",")]
    return found


def _explain_plus(words: list[str], value: str) -> None:
    if not any(word.lstrip("+").startswith("experiment=") for word in words):  # a preset may choose one in its defaults
        raise ConfigurationError(
            f"policy={value}: a policy is added, as there is no default to change. Use +policy={value}."
        )


def _check_words(words: list[str]) -> None:
    """Reject a word that is no KEY=VALUE, with what it may have meant."""
    from spepolicy.plugins import installed_policies

    for word in words:
        if (not word.partition("=")[0] or "=" not in word) and not word.startswith("~"):
            meant = f" Did you mean +policy={word}?" if word in installed_policies() else ""
            raise ConfigurationError(f"{word}: not of the form KEY=VALUE.{meant} See --help.")


def _check_choices(words: list[str]) -> None:
    """Reject GROUP=NAME where the package's group has no such file, in so far as NAME is one plain name."""
    from spepolicy.messages import missing_choice
    from spepolicy.schema import GROUPS
    from spepolicy.usage import conf_names

    for word in words:
        group, _, name = word.partition("=")
        has_files = group in GROUPS and group not in ("policy", "experiment")
        if has_files and re.fullmatch(r"[\w.-]+", name) and name not in conf_names(group):
            raise ConfigurationError(missing_choice(group, name, conf_names(group)))


def _may_have_policy(arguments: list[str], words: list[str]) -> bool:
    """Whether something other than +policy=NAME can choose the policy, or none is needed."""
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    from_preset = any(key == "experiment" or key.startswith("hydra.sweeper") for key in keys)
    return from_preset or "task=catalogue" in words or not (_CONFIG_SOURCES | _SHOWS).isdisjoint(arguments)


# ---- with Hydra ------------------------------------------------------------------------------------------------------


def _compose(arguments: list[str], show_traceback: bool) -> int:
    """Let Hydra compose the configuration and run it, once or once a job of a sweep; return the exit status."""
    from spepolicy.launch import Session

    session = Session(show_traceback)
    if not _COMPLETES.isdisjoint(arguments):
        return _complete(session, arguments)
    try:
        with _hydra_environment(_flags_first(arguments)) as ordered:
            session.start(ordered)
    except SystemExit as stop:  # Hydra ends so after --hydra-help
        return stop.code if isinstance(stop.code, int) else 0
    return USER_ERROR if session.failed else 0


def _flags_first(arguments: list[str]) -> list[str]:
    """Return *arguments* with the flags before the words: Hydra's parser takes no words on both sides of a flag."""
    words = _words(arguments)
    flags = [argument for argument in arguments if argument not in words]
    return [*flags, *(["--", *words] if words else [])]


def _complete(session: Session, arguments: list[str]) -> int:
    """Answer the shell's completion request. What cannot be composed yet completes to nothing; it is no error."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from spepolicy.completion import for_typing

    text = StringIO()
    try:
        with _hydra_environment(arguments), redirect_stdout(text), redirect_stderr(StringIO()):
            session.start(arguments)
    except (Exception, SystemExit):
        if session.show_traceback:
            raise
        return 0
    query = any(argument.startswith("query=") for argument in arguments)
    print(for_typing(text.getvalue()) if query else text.getvalue(), end="")
    return 0


@contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[list[str]]:
    """Give Hydra our arguments, and make it raise its errors instead of printing them; undo all of it afterwards."""
    import logging

    root = logging.getLogger()
    saved_logging = (list(root.handlers), root.level)
    saved_argv, saved_flag = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = ["spepolicy", *arguments]
    os.environ[FULL_ERROR] = "1"
    try:
        yield arguments
    finally:
        root.handlers[:], level = saved_logging
        root.setLevel(level)
        sys.argv = saved_argv
        if saved_flag is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = saved_flag
