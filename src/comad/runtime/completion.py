"""The verb `comad completion`: verbs, options and their values for the tab key, as each verb's own help lists them."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Mapping

Options = dict[str, list[str]]
"""Option → its values, none if it takes any."""

BASH = """_comad() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}" words=""
  if [[ $COMP_CWORD == 1 ]]; then words="{verbs}"; else
    case "$verb $before" in
{values}
      *) case "$verb" in
{options}
      esac ;;
    esac
    [[ $word == -* || $words != -* ]] || words=""
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _comad comad
"""
SHELLS = ("bash", "zsh", "fish")


def options_of(command: Callable[[list[str]], object]) -> Options:
    """Options that the help of a verb lists, with the values in braces behind them."""
    shown, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            command(["--help-all"])
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    found: Options = {}
    for option, values in re.findall(r"(--[a-z][\w.-]*)(?: \{([^}]+)\})?", shown.getvalue()):
        if not option.endswith("."):
            found[option] = found.get(option) or [value for value in values.split(",") if value not in ("", "None")]
    return dict(sorted(found.items()))


def script(shell: str, verbs: Mapping[str, Options]) -> str:
    """The lines that a shell reads.

    Raises:
        ValueError: no such shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"no completion for {shell!r}; say comad completion {'|'.join(SHELLS)}.")
    if shell == "fish":
        return "\n".join(_fish(verbs))
    values = [
        f"""      "{verb} {option}") words="{" ".join(allowed)}" ;;"""
        for verb, options in verbs.items()
        for option, allowed in options.items()
        if allowed
    ]
    options = [f"""        {verb}) words="{" ".join(found)}" ;;""" for verb, found in verbs.items()]
    text = BASH.format(verbs=" ".join(verbs), values="\n".join(values), options="\n".join(options))
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _fish(verbs: Mapping[str, Options]) -> list[str]:
    lines = [f"complete -c comad -n __fish_use_subcommand -f -a '{' '.join(verbs)}'"]
    for verb, options in verbs.items():
        for option, allowed in options.items():
            chosen = f" -x -a '{' '.join(allowed)}'" if allowed else ""
            lines.append(f"complete -c comad -n '__fish_seen_subcommand_from {verb}' -l {option[2:]}{chosen}")
    return lines
