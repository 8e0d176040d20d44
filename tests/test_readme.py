"""Runs the Python blocks of the README and of the documentation's pages.

A block fenced as ``python`` runs in the namespace of the blocks before it on its page;
after ``python fresh`` a new namespace begins; ``python no-run`` is only shown. Blocks
with ``>>>`` prompts run as doctests.
"""

import doctest
import pathlib
import re
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# What may follow the word python on a fence.
WORDS = ("", "fresh", "no-run")

FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})python(?![\w-])[ ]*(?P<word>[^\n`]*)\n"
    r"(?P<code>.*?)^(?P=indent)(?P=ticks)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced piece of Python."""

    line: int  # of its first line of code, counted from 1
    word: str  # what follows "python" on the fence
    code: str


def blocks(text: str) -> list[Block]:
    """The Python blocks of a Markdown text, in order."""
    found = []
    for match in FENCE.finditer(text):
        word = match["word"].strip()
        line = text.count("\n", 0, match.start("code")) + 1
        if word not in WORDS:
            raise ValueError(f"line {line - 1}: unknown word {word!r} after ```python")
        indent = re.compile(f"^{match['indent']}", re.MULTILINE)
        found.append(Block(line, word, indent.sub("", match["code"])))
    return found


def run_page(text: str, name: str) -> int:
    """Runs the blocks of a page; returns how many ran."""
    namespace = {"__name__": name}
    ran = 0
    for block in blocks(text):
        if block.word == "no-run":
            continue
        if block.word == "fresh":
            namespace = {"__name__": name}
        if ">>> " in block.code:
            _run_doctest(block, name, namespace)
        else:
            # The empty lines before it give tracebacks the page's own line numbers.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, name, "exec"), namespace)
        ran += 1
    return ran


def _run_doctest(block: Block, name: str, namespace: dict[str, object]) -> None:
    test = doctest.DocTestParser().get_doctest(
        block.code, namespace, name, name, block.line - 1
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=DOCTEST_FLAGS)
    # `run` works on the test's own copy of the names; later blocks want them too.
    runner.run(test, out=report.append, clear_globs=False)
    namespace.update(test.globs)
    if runner.failures:
        raise AssertionError("".join(report))


# What a build writes has no blocks of its own.
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page.relative_to(ROOT).parts[1] not in ("_build", "api")
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), str(page.relative_to(ROOT)))


def test_blocks_share_a_namespace_until_a_fresh_one():
    assert (
        run_page("```python\na = 1\n```\n\n```python\nassert a == 1\n```\n", "p") == 2
    )
    with pytest.raises(NameError, match="'a' is not defined"):
        run_page("```python\na = 1\n```\n\n```python fresh\na\n```\n", "p")


def test_only_python_blocks_that_may_run_are_run():
    page = "```python no-run\n1 / 0\n```\n```bash\nls\n```\n```pythonic\n1 / 0\n```\n"
    assert run_page(page, "p") == 0


def test_indented_and_longer_fences_are_read():
    page = "- item\n\n  ```python\n  for a in (1, 2):\n      pass\n  ```\n"
    assert blocks(page) == [Block(4, "", "for a in (1, 2):\n    pass\n")]
    assert (
        blocks("````python\na = '''\n```\n'''\n````\n")[0].code == "a = '''\n```\n'''\n"
    )


def test_an_error_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as info:
        run_page("# Title\n\n```python\na = 1\n1 / 0\n```\n", "page.md")
    last = info.traceback[-1]
    assert (str(last.path).endswith("page.md"), last.lineno + 1) == (True, 5)


def test_prompts_are_held_to_their_output_and_share_names():
    run_page(
        "```python\n>>> a = 2\n>>> a\n2\n```\n```python\nassert a == 2\n```\n", "p"
    )
    with pytest.raises(AssertionError, match="Expected"):
        run_page("```python\n>>> 1 + 1\n3\n```\n", "p")


def test_an_unknown_word_on_a_fence_is_refused():
    with pytest.raises(ValueError, match="line 1: unknown word 'norun'"):
        blocks("```python norun\n1 / 0\n```\n")
