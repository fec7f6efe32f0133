"""Says whether a text fits a GBNF grammar, without llama.cpp: the grammar is read as one recursive regular expression."""

from __future__ import annotations

import regex

_TOKEN = regex.compile(
    r"""(?P<blank>\s+)
      | (?P<literal>"(?:[^"\\]|\\.)*")
      | (?P<chars>\[(?:[^\]\\]|\\.)*\])
      | (?P<name>[A-Za-z][A-Za-z0-9-]*)
      | (?P<repeat>\{[0-9]+(?:,[0-9]*)?\}|[*+?])
      | (?P<sign>[()|])
    """,
    regex.VERBOSE,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def fits(grammar: str, text: str) -> bool:
    """Whether the rule `root` takes the whole text. Raises ValueError for a grammar that llama.cpp would refuse as well."""
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines() if line)
    if "root" not in rules:
        raise ValueError("the grammar has no root")
    define = "".join(f"(?P<{_group(name)}>{_body(body, rules)})" for name, body in rules.items())
    return regex.fullmatch(f"(?(DEFINE){define})(?&root)", text, timeout=10.0) is not None


def _group(name: str) -> str:
    return name.replace("-", "_")


def _body(body: str, rules: dict[str, str]) -> str:
    parts: list[str] = []
    at = 0
    while at < len(body):
        token = _TOKEN.match(body, at)
        if token is None:
            raise ValueError(f"not GBNF: {body[at:]}")
        at = token.end()
        said = token.group()
        match token.lastgroup:
            case "literal":
                parts.append(f"(?:{regex.escape(_unescaped(said[1:-1]))})")
            case "name":
                if said not in rules:
                    raise ValueError(f"there is no rule {said}")
                parts.append(f"(?&{_group(said)})")
            case "chars":
                parts.append(said)
            case "repeat":
                # A grammar has no order of trying: where the expression took too much it has to give back.
                parts.append(said)
            case "sign":
                parts.append("(?:" if said == "(" else said)
            case _:
                pass
    return "".join(parts)


def _unescaped(text: str) -> str:
    def one(found: regex.Match[str]) -> str:
        code = found.group(1)
        return chr(int(code[1:], 16)) if code.startswith("U") else _ESCAPES.get(code, code)

    return regex.sub(r"\\(U[0-9A-F]{8}|.)", one, text)
