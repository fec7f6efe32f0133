"""Prints debian/copyright with the licences of the Python packages in an environment, from what they bring themselves.

    bundled_licences.py SITE_PACKAGES debian/copyright

Runs in the release that the package is built for, with nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

OURS = "llamacpp-mqtt-deploy"
INSTALLED_AT = "opt/llamacpp-mqtt-deploy/lib/*/site-packages"
_LICENCE_FILE = re.compile(r"(?i)(^|/)(licen[cs]e|copying|notice|edl-|epl-|authors)[^/]*$")
# Debian has this text in one place, and its checker wants it nowhere else.
_WHOLE_APACHE = re.compile(
    r"(?s)[ \t]*Apache License\s+Version 2\.0, January 2004.*?accepting any such warranty or additional liability\."
    r"(\s+END OF TERMS AND CONDITIONS(.*?limitations under the License\.)?)?"
)
_IN_DEBIAN = "Apache License, Version 2.0: its text is in /usr/share/common-licenses/Apache-2.0 on Debian systems."
_COPYRIGHT = re.compile(r"(?im)^\W*copyright (?:\(c\) |© )?(\d{4}.*)$")


def folded(text: str) -> str:
    """A licence as a continued field: each line behind a blank, empty ones as a dot."""
    text = _WHOLE_APACHE.sub(_IN_DEBIAN, text)
    return "\n".join(f" {line.rstrip()}" if line.strip() else " ." for line in text.expandtabs(4).strip().splitlines())


def field(package: Distribution, name: str) -> str:
    return str(package.metadata[name] if name in package.metadata else "")  # noqa: SIM401 - typeshed knows no get() here


def licence_name(package: Distribution) -> str:
    found = field(package, "License-Expression") or field(package, "License")
    short = found.strip().splitlines()[0] if found.strip() else ""
    if not short or len(short) > 60:
        named = [
            text.rpartition(" :: ")[2] for text in package.metadata.get_all("Classifier", []) if "License ::" in text
        ]
        short = " and ".join(named) or "see the text"
    return short


def texts(package: Distribution) -> Iterator[tuple[str, str]]:
    """The names and contents of the licence files that the package brings."""
    for file in package.files or ():
        if ".dist-info/" in str(file) and _LICENCE_FILE.search(str(file)):
            yield file.name, Path(str(file.locate())).read_text("utf-8", "replace")


def stanza(package: Distribution) -> str:
    """Raises SystemExit for a package that brings no text of its licence: somebody has to look."""
    name, found = package.metadata["Name"], list(texts(package))
    if not found:
        raise SystemExit(f"{name} {package.version} brings no text of its licence ({licence_name(package)}).")
    holders = dict.fromkeys(holder.strip() for _, text in found for holder in _COPYRIGHT.findall(text))
    author = field(package, "Author-email") or field(package, "Author") or f"the authors of {name}"
    holder = list(holders) or [author]
    whole = "\n\n".join(f"{file}:\n\n{text}" if len(found) > 1 else text for file, text in found)
    return "\n".join(
        (
            f"Files: {INSTALLED_AT}/*",
            "Copyright: " + "\n ".join(holder),
            f"License: {name}",
            folded(whole),
            f"Comment: {name} {package.version}, licence by its own metadata: {licence_name(package)}",
        )
    ).replace(f"{INSTALLED_AT}/*", f"{INSTALLED_AT}/{top_level(package)}", 1)


def top_level(package: Distribution) -> str:
    """What its files have in common, as a pattern."""
    tops = {str(file).split("/", 1)[0] for file in package.files or () if not str(file).startswith("..")}
    return f"\n {INSTALLED_AT}/".join(
        sorted(f"{top}/*" if "." not in top or top.endswith("-info") else top for top in tops)
    )


def main() -> None:
    site, head = Path(sys.argv[1]), Path(sys.argv[2])
    text = re.sub(
        r"(?m)^@FILE (\S+)@$", lambda found: folded(Path(found[1]).read_text("utf-8")), head.read_text("utf-8")
    )
    packages = sorted(distributions(path=[str(site)]), key=lambda package: package.metadata["Name"].lower())
    if not packages:
        raise SystemExit(f"there is no package in {site}")
    print(text.rstrip())
    for package in packages:
        if package.metadata["Name"] != OURS:
            print(f"\n{stanza(package)}")


if __name__ == "__main__":
    main()
