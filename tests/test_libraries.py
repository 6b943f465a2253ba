"""The script that asks models of other libraries, on models that are written here."""

import torch
from torch import nn

import libraries
from lean_fx.files import make_folder
from support import library_rows
from support.library_models import MODELS, PACKAGES
from support.library_rows import LibraryRow, ask_library, read_library_row, write_library_row


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, scale=1.0):
        return {"logits": self.head(torch.relu(self.body(self.embed(tokens)))) * scale}


def asked(monkeypatch, make):
    monkeypatch.setitem(library_rows.MODELS, "own/net", make)
    return ask_library("own/net")


def test_a_model_that_does_everything(monkeypatch):
    row = asked(monkeypatch, lambda: (Net(), {"tokens": torch.randint(0, 9, (2, 5))}))
    assert (row.ended, row.form) == ("done", "graph")
    assert (row.sites, row.reduced, row.module_reduced) == (2, 1, 1)
    assert row.reasons == {"its parameter is used elsewhere": 1}
    assert (row.batch, row.size, row.trains, row.exports) == ("yes", "yes", "yes", "yes")


def test_a_model_that_takes_nothing_else(monkeypatch):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            if tuple(x.shape) != (2, 8):
                raise ValueError("2 rows of 8")
            return self.b(self.a(x))

    row = asked(monkeypatch, lambda: (Fixed(), (torch.rand(2, 8),)))
    assert (row.batch, row.size, row.trains) == ("-", "-", "yes")


def test_a_model_that_does_not_run(monkeypatch):
    row = asked(monkeypatch, lambda: (nn.Linear(3, 4), (torch.rand(2, 8),)))
    assert row.ended.startswith("the model itself does not run: RuntimeError: ")
    assert not row.form


def test_the_report(monkeypatch, tmp_path):
    rows = [
        LibraryRow(
            "a/one", "graph", 4, 3, 2, {"its weight is frozen": 1}, "yes", "-", ended="done"
        ),
        LibraryRow("b/two", ended="the model itself does not run: no module"),
        LibraryRow("b/three", ended="CaptureError: no"),
    ]
    text = libraries.report(rows)
    assert "1 models of 1 libraries; 1 refused: b/three. Of 4 sites 3 (75.0%) read" in text
    assert "2 (50.0%) with form=" in text
    assert "1 its weight is frozen" in text

    folder = make_folder(tmp_path / "runs")
    make_folder(folder / "models")
    file = libraries._file(folder, "b/three")
    assert not libraries._is_finished(folder, "b/three", again=False)
    write_library_row(rows[2], file)
    assert read_library_row(file) == rows[2]
    assert libraries._is_finished(folder, "b/three", again=False)
    assert not libraries._is_finished(folder, "b/three", again=True)


def test_every_model_is_of_a_library_that_is_named():
    assert {name.partition("/")[0] for name in MODELS} == set(PACKAGES)
