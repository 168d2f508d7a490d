"""`bilevel completion SHELL`: a script that completes commands, options, methods and files on Tab."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bilevel.solvers import METHODS

GOOD = 0
SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """\
Print a script that lets the shell complete the commands and options of bilevel
on Tab.
"""

DETAILS = """\
bash: bilevel completion bash > ~/.local/share/bash-completion/completions/bilevel
zsh:  bilevel completion zsh > ~/.zfunc/_bilevel   (fpath+=~/.zfunc before compinit)
fish: bilevel completion fish > ~/.config/fish/completions/bilevel.fish

exit codes: 0 done, 2 there is no such shell
"""


def add_completion_command(commands: Any) -> None:
    """Add `completion` to the commands of an argument parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script for completion on Tab",
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run_completion(options: argparse.Namespace, parser: argparse.ArgumentParser, log: Callable[[str], None]) -> int:
    """Log the script, and return the exit code."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]
    log(write(_commands(parser)))
    return GOOD


Option = tuple[list[str], str, list[str]]  # flags, help, values to choose from


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[Option]]]:
    """Return help and options of each command, as argparse knows them; a position has no flags."""
    choices: Any = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help or "" for action in choices._choices_actions}
    return {
        name: (
            helps.get(name, ""),
            [(list(a.option_strings), (a.help or "") % _known(a), _values(a)) for a in command._actions],
        )
        for name, command in choices.choices.items()
    }


def _values(action: argparse.Action) -> list[str]:
    """Return the words that may stand behind an option, where they are known."""
    if {"--method", "--methods", "--reference"} & set(action.option_strings):
        return list(METHODS)
    return [str(choice) for choice in action.choices or ()]


def _known(action: argparse.Action) -> dict[str, Any]:
    return {"default": action.default, "prog": "bilevel"}


def _words(options: list[Option]) -> str:
    flags = [flag for flags, _, _ in options for flag in flags]
    return " ".join([*flags, *dict.fromkeys(value for _, _, values in options for value in values)])


def _bash(commands: dict[str, tuple[str, list[Option]]]) -> str:
    cases = "\n".join(f'    {name}) words="{_words(options)}" ;;' for name, (_, options) in commands.items())
    return f"""\
_bilevel() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{" ".join([*commands, "--help", "--version"])}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "$word" in -*) ;; *) [ "$COMP_CWORD" -gt 1 ] && COMPREPLY+=($(compgen -f -- "$word")) ;; esac
}}
complete -o filenames -F _bilevel bilevel"""


def _zsh(commands: dict[str, tuple[str, list[Option]]]) -> str:
    named = "\n".join(f"    {_quoted(f'{name}:{text}')}" for name, (text, _) in commands.items())
    cases = "\n".join(f"    {name}) compadd -- {_words(options)} ;;" for name, (_, options) in commands.items())
    return f"""\
#compdef bilevel
_bilevel() {{
  local -a commands=(
{named}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case $words[2] in
{cases}
  esac
  _files
}}
(( $+functions[compdef] )) && compdef _bilevel bilevel
[ "$funcstack[1]" = _bilevel ] && _bilevel "$@" """.rstrip()


def _fish(commands: dict[str, tuple[str, list[Option]]]) -> str:
    lines = []
    for name, (text, options) in commands.items():
        lines.append(f"complete -c bilevel -f -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
        for flags, said, choices in options:
            long = "".join(f" -l {flag[2:]}" for flag in flags if flag.startswith("--"))
            short = "".join(f" -s {flag[1:]}" for flag in flags if not flag.startswith("--"))
            values = f" -a {_quoted(' '.join(choices))}" if choices else ""
            if long or short or values:
                where = f"complete -c bilevel -n '__fish_seen_subcommand_from {name}'"
                lines.append(f"{where}{short}{long}{values} -d {_quoted(said)}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'" if "'" not in text else '"' + text.replace('"', "").replace("`", "") + '"'
