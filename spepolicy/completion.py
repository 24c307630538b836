"""Shell completion for `python -m spepolicy` and the script `spepolicy`.

Hydra completes a console script, but for `python` it expects a file as the first argument. This wrapper asks Hydra for
`python -m spepolicy` too, as if the script had been typed.
"""

from __future__ import annotations

__all__ = ["BASH", "HIDDEN", "for_typing"]

HIDDEN = "_name_"  # the setting that tells a composed configuration's policy; not for typing

BASH = """\
_spepolicy_complete() {
    local line=$COMP_LINE word=${COMP_WORDS[COMP_CWORD]} program=${COMP_WORDS[0]}
    case $program in
        *python*)
            if [[ ${COMP_WORDS[1]} != -m || ${COMP_WORDS[2]} != spepolicy ]]; then return; fi
            line="spepolicy${COMP_LINE#*-m spepolicy}"
            program="$program -m spepolicy"
            ;;
    esac
    local choices
    choices=$(COMP_LINE=$line COMP_POINT=${#line} $program -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _spepolicy_complete spepolicy python python3"""


# What Hydra offers, and what must be typed: these groups have no default, so they are added.
_ADDED = {"policy=": "+policy=", "experiment=": "+experiment="}


def for_typing(text: str) -> str:
    """Return Hydra's answer *text*, words on lines, without what nobody types and with + where it is needed."""
    lines = []
    for line in text.splitlines():
        words = [_ADDED.get(word, word) for word in line.split()]
        lines.append(" ".join(word for word in words if f".{HIDDEN}" not in word and not word.endswith("schema/")))
    return "".join(f"{line}\n" for line in lines)
