"""docs/tools/prose.py finds what it lists, and nothing in sentences that are right."""

import sys
from importlib import util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "docs" / "tools" / "prose.py"


@pytest.fixture(scope="module")
def prose():
    spec = util.spec_from_file_location("deqcore_docs_prose", PATH)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def faults(prose, tmp_path, text, suffix=".py"):
    path = tmp_path / f"text{suffix}"
    path.write_text(text, encoding="utf-8")
    return [finding.fault for finding in prose.faults(path)]


@pytest.mark.parametrize(
    "sentence",
    [
        "The user is told the cause.",
        "The error says in words what failed.",
        "It is wrong without\na word.",
        "This is no number.",
        "The second is likewise small.",
        "The mask is drawn anew.",
        "Write a solver of one's own.",
        "Use torch in place of jax.",
        "Nobody reads it.",
        "The report confesses its error.",
        "A faster way was not to be had.",
        "Nothing came of it.",
        "There is a file, but no table in it.",
        "The solve goes on.",
        "Everything is right but for the sign.",
        "The key stands on each line.",
        "The cell takes inputs beside z.",
        "The file is to be read first.",
        "The residual says nothing of the error.",
        "JSON knows no NaN.",
        "The sample ends alone as in company.",
        "The cell learns digits by heart.",
        "Each cell hears from its row.",
        "Whoever installs it can use it.",
    ],
)
def test_each_phrase_is_found_in_every_kind_of_text(prose, tmp_path, sentence):
    comment = "\n".join(f"# {line}" for line in sentence.split("\n"))
    assert faults(prose, tmp_path, sentence, ".md")
    assert faults(prose, tmp_path, f"<p>{sentence}</p>", ".j2")
    assert faults(prose, tmp_path, comment, ".toml")
    assert faults(prose, tmp_path, f"{comment}\nx = 1\n")
    assert faults(prose, tmp_path, f'"""{sentence}"""\n')
    assert faults(prose, tmp_path, f"x = {sentence!r}\n")


@pytest.mark.parametrize(
    "sentence",
    [
        "The path is no longer needed.",
        "The error is no more than 1e-6.",
        "`is no word` is code, as is [a link](is no link).",
        "Each solve has its own mask.",
        "There is one solution. But f is not a contraction.",
        "There is no table in the file.",
        "Environment variables go on top.",
    ],
)
def test_right_sentences_pass(prose, tmp_path, sentence):
    assert not faults(prose, tmp_path, sentence, ".md")


def test_code_is_not_prose(prose, tmp_path):
    assert not faults(prose, tmp_path, "```python\nraise ValueError('this is no number')\n```\n", ".md")
    assert not faults(prose, tmp_path, 'def f():\n    """Return x.\n\n    >>> told = 1\n    """\n')
    assert not faults(prose, tmp_path, "{% if told %}<span class='anew'>{{ likewise }}</span>{% endif %}", ".j2")


@pytest.mark.parametrize(
    ("docstring", "right"),
    [
        ("Return the norm.", True),
        ("Pass the mask on.", True),
        ("‖v‖ of each row.", True),
        ("`x` in units of 1.", True),
        ("The norm.", False),
        ("Whether it holds.", False),
        ("Returns the norm.", False),
        ("Rows of the mask.", False),
        ("Computing the norm.", False),
    ],
)
def test_docstrings_of_functions_open_with_an_imperative_verb(prose, tmp_path, docstring, right):
    assert prose.is_imperative(docstring) is right
    function = f'def f():\n    """{docstring}"""\n'
    assert bool(faults(prose, tmp_path, function)) is not right
    assert not faults(prose, tmp_path, f'class A:\n    """{docstring}"""\n')
    assert not faults(prose, tmp_path, f'class A:\n    @property\n    def f(self):\n        """{docstring}"""\n')


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("steps must be at least 1 (got 0).", None),
        ("No such file. Name an existing one.", None),
        ("steps must be at least 1 (got 0)", "end the message with a period"),
        ("The file does not exist.", "say how to fix it"),
        ("steps = 0, but a number is expected. Use 1.", "'is expected', write 'must be … (got …)'"),
    ],
)
def test_messages_have_a_remedy_and_an_end(prose, tmp_path, message, fault):
    found = faults(prose, tmp_path, f"raise ConfigError({message!r})\n")
    assert found == ([] if fault is None else [fault])
    assert faults(prose, tmp_path, f"raise ConfigError(f'{{x}} {message[1:]}')\n") == found


def test_a_finding_can_be_allowed(prose, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("First.\n\nThis is no number.\n", encoding="utf-8")
    (finding,) = prose.check(["page.md"])
    assert str(finding).startswith("page.md:3: 'is no', write")
    monkeypatch.setattr(prose, "allowed", lambda: [("page.md", "is no number")])
    assert not prose.check(["page.md"])


def test_it_reads_every_folder(prose):
    """`make check` runs it on all of them."""
    packages = {path.name for path in prose.ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert packages - {"build", "dist", "site"} <= set(prose.FOLDERS), "a folder that the check does not read"
