"""`deqcore check layer` as a user calls it: the table, JSON, exit codes and bad input."""

from __future__ import annotations

import json

import pytest

from deqcore.cli.app import main

pytest.importorskip("torch")

FILE = """
import torch
from deqcore.diagnostics import Claims, LayerUnderTest

print("loading")


class Layer(torch.nn.Module):
    def __init__(self, exact=False):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.exact = exact

    def cell(self, z, x):
        return self.a * z + x

    def forward(self, x):
        z = x / (1 - self.a)
        return {"z": z if self.exact else self.cell(z.detach(), x)}


class Nameless(torch.nn.Module):
    def forward(self, x):
        return x


def layer(a, x):
    return x / (1 - a)


def cell(z, a, x):
    return a * z + x


def outer(owner, z, x):
    return owner.a * z + x


inputs = (torch.full((2, 1), 0.5, dtype=torch.float64), torch.linspace(-1.0, 1.0, 2, dtype=torch.float64)[:, None])
x = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)
record = LayerUnderTest(Layer(), "cell", (x,), state="z")


def pair():
    return Layer(exact=True), x


def broken():
    raise OSError("no checkpoint")
"""


@pytest.fixture(autouse=True)
def _file(project):
    (project / "m.py").write_text(FILE)


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["check", "layer", *args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_table_and_exit_0_where_nothing_fails(capsys):
    code, out, _ = run(capsys, "m.py:pair", "--cell", "cell", "--state", "z")
    assert code == 0, out
    assert "equilibrium" in out
    assert "failed" not in out


def test_a_failing_line_says_what_was_expected_found_and_what_to_do(capsys):
    code, out, _ = run(capsys, "m.py:record")
    assert code == 1
    text = " ".join(out.split())
    assert "one-step" in text
    assert "gradient='approximate'" in text
    assert "1 failed" in text
    assert run(capsys, "m.py:record", "--gradient", "approximate")[0] == 0


@pytest.mark.parametrize(
    "args",
    [
        ("m.py:layer", "--inputs", "inputs"),
        ("m.py:layer", "--inputs", "inputs", "--cell", "cell"),
        ("m.py:pair", "--cell", "outer", "--state", "z"),
    ],
)
def test_functions_of_the_file_are_layers_and_cells(capsys, args):
    code, out, _ = run(capsys, *args)
    assert code == 0, out
    assert out.count("loading") == 1  # the file is executed once


def test_json_without_the_output_of_the_file(capsys):
    code, out, _ = run(capsys, "m.py:Layer", "--inputs", "x", "--state", "z", "--json")
    assert code == 1
    report = json.loads(out)
    failed = [finding for finding in report["findings"] if finding["status"] == "failed"]
    assert [finding["check"] for finding in failed] == ["gradient"]
    # u = g, and 2 g is exact
    assert failed[0]["figures"]["norm_ratio"] == pytest.approx(0.5)


def test_a_page_that_needs_no_network(capsys, project):
    pytest.importorskip("jinja2")
    assert run(capsys, "m.py:record", "--report", "card.html")[0] == 1
    page = (project / "card.html").read_text()
    assert "one-step gradient" in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("m.py",), "path/to/file.py:name"),
        (("no.py:x",), "does not exist"),
        (("m.py:recrd",), "Did you mean 'record'"),
        (("m.py:broken",), "no checkpoint"),
        (("m.py:Layer",), "--inputs NAME"),
        (("m.py:Nameless", "--inputs", "x"), "--cell NAME"),
        (("m.py:record", "--cell", "sell"), "Did you mean 'cell'"),
        (("m.py:record", "--state", "y"), "no part 'y'"),
        (("m.py:record", "--gradient", "exat"), "Did you mean 'exact'"),
        (("m.py:record", "--rtol", "-1"), "a number above 0"),
        (("m.py:record", "--dtype", "float61"), "Did you mean 'float64'"),
        (("m.py:layer",), "missing 2 required positional arguments"),
        (("m.py:layer", "--inputs", "inputs", "--cell", "sell"), "no part 'sell'"),
        (("m.py:record", "--report", "no/card.html"), "existing folder"),
        (("m.py:FILE",), "defines no 'FILE'"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(capsys, args, words):
    code, _, err = run(capsys, *args)
    assert code == 2
    assert words in " ".join(err.split())
