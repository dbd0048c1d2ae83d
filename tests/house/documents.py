"""The documents of this repository, as a reader meets them: commands, links, headings. Not for: judging them."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(```+)(\w*)[^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4,}[^\n]*\n|\n(?= {4,}))+)")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SHELLS = ("", "sh", "bash", "console", "shell")


@dataclass(frozen=True)
class Document:
    """A Markdown file.

    Attributes:
        path: on disk.
        name: path below the repository.
        text: all of it.
    """

    path: Path
    name: str
    text: str

    def shell_lines(self) -> Iterator[str]:
        """Lines of blocks that a reader would type, without comments; continued ones in one."""
        without_fences = _FENCE.sub("\n", self.text)
        fenced = (found[3] for found in _FENCE.finditer(self.text) if found[2] in _SHELLS)
        for block in (*fenced, *_INDENTED.findall(without_fences)):
            for line in block.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")

    def spans(self) -> Iterator[str]:
        """What stands in backticks, in one line each."""
        prose = _INDENTED.sub("\n", _FENCE.sub("\n", self.text))
        return (" ".join(found[2].split()) for found in _SPAN.finditer(prose))

    def links(self) -> Iterator[str]:
        """Targets of links in prose."""
        prose = _SPAN.sub("", _INDENTED.sub("\n", _FENCE.sub("\n", self.text)))
        return (found[1] for found in _LINK.finditer(prose))

    def anchors(self) -> set[str]:
        """What a link may name in it, as GitHub makes it of headings, and as it is written."""
        prose = _FENCE.sub("\n", self.text)
        seen: Counter[str] = Counter()
        found = set(re.findall(r'<a id="([^"]+)"', prose))
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose, re.MULTILINE):
            plain = _LINK.sub(lambda link: link[0].partition("](")[0].lstrip("["), heading)
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        return found


def documents_of(repository: Path) -> list[Document]:
    """Every Markdown file of the repository."""
    paths = [repository / "README.md"]
    for folder in ("engine", "jobs", "k8s", "tests"):
        paths += sorted((repository / folder).rglob("*.md"))
    return [
        Document(path, str(path.relative_to(repository)), path.read_text(encoding="utf-8")) for path in paths
    ]


def words_of(line: str) -> list[str]:
    """A shell line's first command as words: what follows a pipe, a comment or another command is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|&;<>"):
            break
        words.append(word)
    return words
