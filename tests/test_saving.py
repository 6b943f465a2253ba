"""save and load: one file, no pickle, the same numbers in another process."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError

X = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(12).reshape(2, 6)


class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 5)),
        )


class Branches(Conv):
    """No graph can be made of it: every layer reduces its own input."""

    def forward(self, x):
        h = super().forward(x)
        return h if h.sum() > 0 else -h


class Tied(nn.Module):
    """Its decoder's weight is its embedding's; two blocks are one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(12, 32), nn.Linear(32, 12, bias=False)
        self.decoder.weight = self.embedding.weight
        self.first = self.second = nn.Linear(32, 32)
        self.rnn = nn.LSTM(32, 32, batch_first=True)

    def forward(self, x):
        h, _ = self.rnn(torch.relu(self.second(torch.relu(self.first(self.embedding(x))))))
        return self.decoder(h)


def trained(lean, x):
    """After a step, so that weights and running means are no other model's."""
    optimizer = torch.optim.SGD(lean.parameters(), 0.1)
    lean.train()(x).square().mean().backward()
    optimizer.step()
    return lean.eval()


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize(("kind", "x"), [(Conv, X), (Branches, X), (Tied, TOKENS)])
def test_a_loaded_model_is_the_one_that_was_saved(kind, x, tmp_path):
    lean = trained(lean_fx.leanify(kind(), x), x)
    assert lean_fx.plan_of(lean).sites
    lean_fx.save(lean, tmp_path / "net.safetensors")
    loaded = lean_fx.load(tmp_path / "net.safetensors", kind(), x).eval()
    assert lean_fx.plan_of(loaded) == lean_fx.plan_of(lean)
    assert list(loaded.state_dict()) == list(lean.state_dict())
    assert torch.equal(loaded(x), lean(x))
    assert len(list(loaded.parameters())) == len(list(lean.parameters()))  # what was tied, is


def test_in_another_process(tmp_path):
    lean = trained(lean_fx.leanify(Conv(), X), X)
    lean_fx.save(lean, tmp_path / "net.safetensors")
    torch.save((X, lean(X)), tmp_path / "tensors.pt")
    code = (
        "import torch, lean_fx; from test_saving import Conv\n"
        "x, y = torch.load('tensors.pt')\n"
        "lean = lean_fx.load('net.safetensors', Conv(), x).eval()\n"
        "print(torch.equal(lean(x), y))"
    )
    command = [sys.executable, "-c", code]
    tests = {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, cwd=tmp_path, env=tests, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("reduction", sorted(lean_fx.reductions()))
def test_every_reduction(reduction, tmp_path):
    lean = lean_fx.leanify(Conv(), X, reduction=reduction, channels=8).eval()
    lean_fx.save(lean, tmp_path / "net")
    assert torch.equal(lean_fx.load(tmp_path / "net", Conv().eval(), X)(X), lean(X))


def test_the_dtype_is_that_of_the_model(tmp_path):
    lean_fx.save(lean_fx.leanify(Conv(), X).double(), tmp_path / "net")
    loaded = lean_fx.load(tmp_path / "net", Conv().double(), X.double())
    assert loaded(X.double()).dtype == torch.float64
    text = f"{tmp_path}/net: '0.weight' is of torch.float64, and torch.float32 in the model; "
    with pytest.raises(lean_fx.DataError, match=re.escape(text)):
        lean_fx.load(tmp_path / "net", Conv(), X)


@pytest.fixture
def saved(tmp_path):
    lean_fx.save(lean_fx.leanify(Conv(), X), tmp_path / "net")
    return tmp_path / "net"


def rewritten(path, change):
    """The same file with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda meta, _: meta.pop("lean_fx.plan"), "holds no plan; give a file that lean_fx.save"),
        (lambda _, held: held.pop("3.bias"), "holds no '3.bias', which the model has; give the"),
        (
            lambda _, held: held.update(more=torch.ones(2)),
            "holds 'more', which the model has not; give the model that was saved",
        ),
        (
            lambda _, held: held.update({"3.bias": torch.ones(2)}),
            "'3.bias' has shape (2,), and (32,) in the model; give the model that was saved",
        ),
        *(
            (lambda meta, _, text=text: meta.update({"lean_fx.tied": text}), "its lean_fx.tied is")
            for text in ("[1]", "{", "7", '{"a": "no such"}', '{"a": []}', "[" * 100_000)
        ),
    ],
)
def test_a_file_that_does_not_fit(saved, change, text):
    rewritten(saved, change)
    with pytest.raises(lean_fx.DataError, match="^" + re.escape(f"{saved}: {text}")):
        lean_fx.load(saved, Conv(), X)


def test_a_plan_that_does_not_fit(saved):
    other = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(lean_fx.PlanError, match="'3'"):
        lean_fx.load(saved, other, torch.rand(2, 32))
    rewritten(saved, lambda meta, _: meta.update({"lean_fx.plan": json.dumps({"format": "no"})}))
    with pytest.raises(lean_fx.PlanError):
        lean_fx.load(saved, Conv(), X)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(lean_fx.DataError, match="net: there is no such file; give one that"):
        lean_fx.load(tmp_path / "net", Conv(), X)
    for content in (b"", b"no tensors", b"\xff" * 64):
        (tmp_path / "net").write_bytes(content)
        with pytest.raises(lean_fx.DataError, match="net: is not a safetensors file"):
            lean_fx.load(tmp_path / "net", Conv(), X)
    with pytest.raises(lean_fx.DataError, match="is not a safetensors file"):
        lean_fx.load(tmp_path, Conv(), X)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(lean_fx.ArgumentError, match="Conv object holds no plan; give what leanify"):
        lean_fx.save(Conv(), tmp_path / "net")
    with pytest.raises(lean_fx.ArgumentError, match="^save: dict object is not a module; give a"):
        lean_fx.save({}, tmp_path / "net")
    lean = lean_fx.leanify(Conv(), X)
    with pytest.raises(lean_fx.WriteError, match="cannot be written"):
        lean_fx.save(lean, tmp_path / "missing" / "net")
    lean.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(lean_fx.ArgumentError, match="^save: 'sparse' of the model's state_dict is"):
        lean_fx.save(lean, tmp_path / "net")
    lean.sparse = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(
        lean_fx.ArgumentError, match="^save: safetensors has no dtype torch.complex"
    ):
        lean_fx.save(lean, tmp_path / "net")
    with pytest.raises(lean_fx.ArgumentError, match="is not a dense tensor with data"):
        lean_fx.save(lean_fx.leanify(Conv(), X).to("meta"), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def checkpoint(net, prefix="net.", **more):
    state = {f"{prefix}{name}": each for name, each in net.state_dict().items()}
    state |= {"loss.weight": torch.ones(3)} if prefix else {}
    return {"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": state, **more}


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("prefix", ["net.", "task.model.", ""])
def test_a_checkpoint_of_lightning(prefix, form, tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.rand(3, 4)
    lean = lean_fx.leanify(net, x, form=form)
    held = checkpoint(lean, prefix, **{"lean_fx.plan": lean_fx.plan_of(lean).to_json()})
    torch.save(held, tmp_path / "last.ckpt")
    again = lean_fx.load(tmp_path / "last.ckpt", net, x)
    assert type(again).__name__ == "Sequential"
    torch.testing.assert_close(again(x), lean(x), rtol=0, atol=0)


class Trained(lightning.LightningModule):
    """As users write one, with the plan in its checkpoints."""

    def __init__(self, width=32):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def on_save_checkpoint(self, checkpoint):
        held = self if "lean_fx.plan" in getattr(self, "meta", {}) else self.net
        checkpoint["lean_fx.plan"] = lean_fx.plan_of(held).to_json()


@pytest.mark.parametrize("whole", [True, False], ids=["the module", "what it holds"])
def test_a_checkpoint_that_lightning_has_written(whole, tmp_path):
    x = torch.rand(6, 4)
    task = Trained()
    if whole:
        task = lean_fx.leanify(task, x, form="module")
    else:
        task.net = lean_fx.leanify(task.net, x)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 3))
    file = tmp_path / "last.ckpt"
    trainer.save_checkpoint(file)
    original = Trained() if whole else Trained().net
    again = lean_fx.load(file, original, x)
    assert isinstance(again, Trained) == whole
    torch.testing.assert_close(again(x), task(x), rtol=0, atol=0)


def test_checkpoints_that_are_refused(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.rand(3, 4)
    lean, file = lean_fx.leanify(net, x), tmp_path / "last.ckpt"
    plan = {"lean_fx.plan": lean_fx.plan_of(lean).to_json()}
    cases = {
        r"holds no plan; put plan_of\(model\).to_json\(\) into the checkpoint's 'lean_fx.plan'": checkpoint(
            lean
        ),
        r"is not a checkpoint of Lightning that holds only plain values and tensors": {"epoch": 3},
        r"holds no '0.weight', which the model has": {**checkpoint(lean), "state_dict": {}, **plan},
    }
    for text, held in cases.items():
        torch.save(held, file)
        with pytest.raises(lean_fx.DataError, match=text):
            lean_fx.load(file, net, x)
    torch.save(checkpoint(lean, model=lean), file)  # a pickle of a class
    with pytest.raises(lean_fx.DataError, match="is not a checkpoint of Lightning"):
        lean_fx.load(file, net, x)


def test_a_model_without_values_gets_those_of_the_file(tmp_path):
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.rand(4, 16)
    lean = lean_fx.leanify(net, x)
    lean_fx.save(lean, tmp_path / "net.safetensors")
    loaded = lean_fx.load(tmp_path / "net.safetensors", copy.deepcopy(net).to("meta"))
    torch.testing.assert_close(loaded(x), lean(x), rtol=0, atol=0)


class TiedOnMeta(nn.Module):
    def __init__(self, persistent=True):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("scale", torch.arange(8.0), persistent=persistent)

    def forward(self, tokens):
        return self.out(self.b(torch.relu(self.a(self.table(tokens)))) * self.scale)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_what_is_tied_on_the_meta_device_is_tied_in_the_result(form, tmp_path):
    tokens, path = torch.randint(0, 10, (4,)), tmp_path / "net.safetensors"
    lean = lean_fx.leanify(TiedOnMeta(), tokens, form=form)
    lean_fx.save(lean, path)
    with torch.device("meta"):
        empty = TiedOnMeta()
    loaded = lean_fx.load(path, empty, tokens.to("meta"))
    assert loaded.get_submodule("out").weight is loaded.get_submodule("table").weight
    assert torch.equal(loaded(tokens), lean(tokens))


def test_what_the_file_does_not_hold_cannot_be_given_to_the_meta_device(tmp_path):
    tokens, path = torch.randint(0, 10, (4,)), tmp_path / "net.safetensors"
    lean_fx.save(lean_fx.leanify(TiedOnMeta(persistent=False), tokens), path)
    with torch.device("meta"):
        empty = TiedOnMeta(persistent=False)
    with pytest.raises(
        lean_fx.DataError, match="does not hold 'scale', which is no part of the st"
    ):
        lean_fx.load(path, empty, tokens.to("meta"))


def test_a_checkpoint_with_two_copies_of_the_model(tmp_path):
    net, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.rand(4, 16)
    lean = lean_fx.leanify(net, x)
    average, trained = (checkpoint(lean, prefix)["state_dict"] for prefix in ("ema.", "net."))
    held = checkpoint(lean, **{"lean_fx.plan": lean_fx.plan_of(lean).to_json()})
    torch.save({**held, "state_dict": average | trained}, tmp_path / "last.ckpt")
    with pytest.raises(lean_fx.DataError, match="the model more than once, as ema and net; write"):
        lean_fx.load(tmp_path / "last.ckpt", net, x)


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_refused(path):
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    lean = lean_fx.leanify(net)
    for call in (lambda: lean_fx.save(lean, path), lambda: lean_fx.load(path, net)):
        with pytest.raises(ArgumentError, match="is not a path; give the name of a file$"):
            call()
    with pytest.raises(lean_fx.DataError, match="is not a path; give a file that lean_fx.save"):
        lean_fx.load("a\0b", net)


def test_a_model_that_is_reduced_already(tmp_path):
    model, inputs = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.rand(2, 8)
    lean = lean_fx.leanify(model, inputs, form="module")
    lean_fx.save(lean, tmp_path / "net.safetensors")
    with pytest.raises(
        lean_fx.PlanError, match=r"'2' cannot be rebuilt \(it holds reduction, which a"
    ):
        lean_fx.load(tmp_path / "net.safetensors", lean, inputs)
