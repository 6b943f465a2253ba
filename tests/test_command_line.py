"""The command line: what it prints, writes and returns."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.command_line import main


def net():
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 8 * 8, 4)),
    )


NET = "test_command_line:net"
INPUT = ("--input", "2,3,8,8")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [str(folder / name) for name in ("net.safetensors", "net.onnx")]
    assert (
        main(["leanify", NET, *INPUT, "--channels", "4", "-o", paths[0], "--onnx", paths[1]]) == 0
    )
    return paths


def test_plan_prints_the_plan(capsys):
    assert main(["plan", NET, *INPUT, "--channels", "8", "--skip", "2"]) == 0
    assert (
        capsys.readouterr().out
        == f"{lean_fx.plan(net(), torch.rand(2, 3, 8, 8), channels=8, skip=['2'])}\n"
    )
    assert main(["plan", NET, "--json", "--channels", "0.5"]) == 0
    plan = lean_fx.Plan.from_json(capsys.readouterr().out)
    assert plan == lean_fx.plan(net(), channels=0.5)


def test_leanify_writes_what_load_reads(files):
    inputs = torch.rand(2, 3, 8, 8)
    lean = lean_fx.load(files[0], net(), inputs)
    torch.manual_seed(0)
    made_again = lean_fx.leanify(net(), torch.rand(2, 3, 8, 8), channels=4)
    assert lean_fx.plan_of(files[1]) == lean_fx.plan_of(lean) == lean_fx.plan_of(made_again)
    assert [each.shape for each in lean.parameters()] == [
        each.shape for each in made_again.parameters()
    ]


def test_leanify_says_what_it_wrote(tmp_path, capsys):
    out = str(tmp_path / "net.safetensors")
    assert main(["leanify", NET, *INPUT, "-o", out, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [out]
    assert said["parameters"] == sum(each.numel() for each in net().parameters())
    assert main(["leanify", NET, *INPUT, "-o", out]) == 0
    assert capsys.readouterr().out.endswith(
        f"{said['parameters']:,} -> {said['parameters_reduced']:,} parameters, written to {out}\n"
    )


def test_compare_times_files(files, tmp_path, capsys):
    base = str(tmp_path / "base.onnx")
    lean_fx.export_onnx(net(), base, torch.rand(2, 3, 8, 8))
    assert main(["compare", base, files[1], "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["file", base, files[1]]
    assert "[1, 3, 8, 8]; threads 1, 2 rounds in turn" in out
    assert main(["compare", base, files[1], "--rounds", "2", "--json", "--input", "5,3,8,8"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [base, files[1]]
    assert rows[0]["ratio"] == 1
    assert rows[1]["bytes"] == Path(files[1]).stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.bool, torch.uint8])
def test_inputs_are_of_the_dtypes_of_the_file(dtype, tmp_path, capsys):
    class Cast(nn.Module):
        def forward(self, x):
            return x.float() + 1

    file = tmp_path / "net.onnx"
    lean_fx.export_onnx(Cast(), file, torch.ones(2, 3).to(dtype))
    assert main(["compare", str(file), "--rounds", "2"]) == 0
    assert "[1, 3]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere:net"], "nowhere:net: cannot be made (ModuleNotFoundError: No module na"),
        (["plan", "torch.nn:Linear"], "torch.nn:Linear: cannot be made (TypeError: "),
        (["plan", "builtins:dict"], "builtins:dict: makes a dict, which is not an nn.Module"),
        (
            ["plan", "torch.nn"],
            "'torch.nn' is not a MODULE:FACTORY such as torchvision.models:resnet18",
        ),
        (
            ["plan", NET, "--input", "2,a"],
            "--input '2,a' is not a shape; give 1,3,224,224, or 8,16:",
        ),
        (
            ["plan", NET, "--input", "2:half_a_dtype"],
            "--input '2:half_a_dtype' is not a shape; give",
        ),
        (["plan", NET, "--channels", "-1"], "channels=-1"),
        (["plan", NET, "--reduction", "mush"], "reduction='mush'"),
        (["compare", "nowhere.onnx"], "nowhere.onnx: nowhere.onnx is not a file; export the model"),
        (
            ["leanify", NET, *INPUT, "-o", "/nowhere/net.safetensors"],
            "/nowhere/net.safetensors: ca",
        ),
    ],
)
def test_an_error_is_one_line_and_status_1(arguments, message, capsys):
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["mush"], ["plan"], ["leanify", NET], ["leanify", NET, "--onnx", "a.onnx"], ["compare"]],
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: lean_fx" in capsys.readouterr().err


def test_other_inputs_than_the_file_takes(files, capsys):
    assert main(["compare", files[1], "--input", "1,3,8,8", "--input", "2"]) == 1
    assert "--input is given 2 times; " in capsys.readouterr().err


def test_warnings_are_lines_of_their_own(capsys):
    assert main(["plan", "test_command_line:Branching", "--input", "2,32"]) == 0
    assert capsys.readouterr().err.startswith("warning: Branching: ")


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        return self.a(x) if float(x.sum()) > 0 else x


def test_it_runs_as_a_module_and_finds_files_beside_it(tmp_path):
    (tmp_path / "own.py").write_text("from torch import nn\nnet = nn.Linear(32, 2)\n")
    command = [sys.executable, "-m", "lean_fx", "plan", "own:net"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Plan for Linear: 0 reductions")


def loud():
    print("hello")
    return net()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written():
    command = [sys.executable, "-m", "lean_fx", "plan", NET, *INPUT]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"error: stdout: cannot be written (No space left on device)\n"


def test_a_reader_that_stops_early():
    command = [sys.executable, "-m", "lean_fx", "plan", NET, *INPUT]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_what_a_factory_prints_is_not_in_the_output(capsys):
    assert main(["plan", "test_command_line:loud", "--json"]) == 0
    out, err = capsys.readouterr()
    assert lean_fx.Plan.from_json(out) == lean_fx.plan(net())
    assert err.startswith("hello\n")


class Loud(nn.Linear):
    def forward(self, x):
        print("hello")
        return super().forward(x)


def loud_forward():
    return nn.Sequential(Loud(8, 32), nn.ReLU(), nn.Linear(32, 4))


def test_what_forward_prints_is_not_in_the_output(capsys):
    assert main(["plan", "test_command_line:loud_forward", "--input", "2,8", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(lean_fx.Plan.from_json(out).sites) == 1
    assert "hello" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", NET, "--seed", "9" * 30], "--seed 9{30} is not an int of 64 bits; give 0"),
        (["plan", NET, "--input", "99999999999,3,8,8"], "--input '9+,3,8,8' cannot be made"),
        (["plan", NET, "--input", "1,3,8,8:qint8"], "--input '1,3,8,8:qint8' cannot be made"),
        (["compare", "{file}", "--threads", "20000"], "time_onnx: threads=20000 is above"),
        (["compare", "a.onnx", "a.onnx"], "compare: a.onnx is given twice; give another file"),
    ],
)
def test_absurd_values_are_told_in_one_line(arguments, message, files, capsys):
    assert main([each.format(file=files[1]) for each in arguments]) == 1
    assert re.match(f"error: {message}", capsys.readouterr().err)


def test_one_file_for_two_outputs_is_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["leanify", NET, *INPUT, "-o", "same.onnx", "--onnx", "same.onnx"])
    assert ended.value.code == 2
    assert "-o and --onnx both name same.onnx; give two files" in capsys.readouterr().err
