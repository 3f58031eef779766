"""`normswap.drift`: its figures are those of z, and its ways out hold them: a dict, a CSV file, TensorBoard, and `normswap watch`."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap
from normswap.cli.app import app
from normswap.errors import LoadError, UsageError
from normswap.report.watch import HEADER, curve, run_of, watch_table


def network() -> nn.Module:
    """A converted net of two norms, in train mode, whose input is unlike its statistics."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)).eval()
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
    return normswap.convert(net, torch.randn(2, 3, 9, 8)).model.train()


def stepped(net: nn.Module, x: Tensor) -> normswap.Drift:
    net.zero_grad()
    net(x).square().mean().backward()
    return normswap.drift(net)


def test_it_is_there_as_documented() -> None:
    found = stepped(network(), torch.randn(4, 3, 9, 8))
    assert isinstance(found, normswap.Drift)
    assert list(found) == ["1", "4"]
    assert found["1"]._fields == ("mean_z", "mean_z2", "dead_channels", "limit_hits")


def test_mean_z2_is_one_where_the_statistics_fit() -> None:
    layer = normswap.BatchlessNorm(3, aux="auto", dtype=torch.float64)
    x = torch.randn(64, 3, dtype=torch.float64) * torch.tensor([0.5, 2.0, 3.0]) + 1
    layer.set_statistics(x.mean(0), x.std(0, correction=0))
    layer.train()(x).sum().backward()
    assert normswap.drift(layer)[""].mean_z2.item() == pytest.approx(1, abs=1e-9)
    layer.zero_grad()
    layer.set_statistics(x.mean(0), x.std(0, correction=0) / 2)
    layer(x).sum().backward()
    assert normswap.drift(layer)[""].mean_z2.item() == pytest.approx(4, abs=1e-9)


@pytest.mark.parametrize("form", ["log", "abs", "inv"])
@pytest.mark.parametrize("stats", ["natural", "raw"])
def test_a_channel_that_does_not_vary_is_dead(form: str, stats: str) -> None:
    layer = normswap.BatchlessNorm(4, aux="auto", std=form, stats=stats).train()
    layer.set_statistics(torch.tensor([0.0, 1.0, -1.0, 2.0]), torch.tensor([1.0, 0.5, 2.0, 1.5]))
    x = torch.randn(32, 4)
    x[:, 1], x[:, 3] = 1.25, 2.0 + 1e-3 * torch.randn(32)
    layer(x).sum().backward()
    assert normswap.drift(layer)[""].dead_channels.item() == 2


def test_as_a_dict() -> None:
    found = stepped(network(), torch.randn(4, 3, 9, 8))
    told = found.to_dict()
    assert list(told) == ["1", "4"]
    for name, layer in found.items():
        assert told[name] == {what: pytest.approx(value.item()) for what, value in layer._asdict().items() if value is not None}
    assert normswap.drift(network()).to_dict() == {}


def test_as_a_csv_file(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "run.csv"
    for step in range(3):
        stepped(net, torch.randn(4, 3, 9, 8)).to_csv(path, step)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == HEADER
    assert [(row["step"], row["layer"]) for row in rows] == [(str(step), layer) for step in range(3) for layer in "14"]
    last = normswap.drift(net)
    assert float(rows[-1]["mean_z2"]) == pytest.approx(last["4"].mean_z2.item(), rel=1e-5)


def test_another_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "thesis.csv"
    path.write_text("chapter,pages\n1,20\n")
    with pytest.raises(UsageError, match="begins with 'chapter,pages'; expected step,layer,mean_z"):
        stepped(network(), torch.randn(4, 3, 9, 8)).to_csv(path, 0)
    assert path.read_text() == "chapter,pages\n1,20\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own
def test_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    found = stepped(network(), torch.randn(4, 3, 9, 8))
    with SummaryWriter(str(tmp_path)) as writer:
        found.to_tensorboard(writer, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {f"normswap/{name}/mean_z2" for name in "14"} <= set(events.Tags()["scalars"])
    (event,) = events.Scalars("normswap/4/mean_z2")
    assert (event.step, event.value) == (7, pytest.approx(found["4"].mean_z2.item()))


# --- normswap watch -----------------------------------------------------------------------------------------------------------------------

LINES = "step,layer,mean_z,mean_z2,dead_channels,limit_hits\n0,a,0.1,1.1,0,\n0,,0.2,3.5,2,0.25\n1,a,0.1,0.9,0,\n1,,0.3,4,1,0.5\n"


def test_watch_shows_the_last_step(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(LINES)
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run.csv")])
    assert (done.exit_code, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.strip() and "─" not in line]
    assert rows[1] == ["a", "0.1", "0.9", "0", "▅▄"] or rows[1][:4] == ["a", "0.1", "0.9", "0"]
    assert rows[2][:6] == ["(the", "model)", "0.3", "4", "1", "50%"]
    assert done.stdout.splitlines()[-1] == ("step 1, 2 in the file: 1 of 2 layers have a mean z^2 below 0.5 or above 2; 1 dead channels")


def test_a_line_that_is_being_written_is_left_out() -> None:
    assert run_of(LINES + "2,a,0.1", "run.csv").step == 1
    assert watch_table(run_of(LINES, "run.csv")).row_count == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.csv does not begin with step,layer,mean_z"),
        ("a,b\n", "run.csv does not begin with step,layer,mean_z"),
        (LINES.splitlines()[0] + "\n", "run.csv has no step yet"),
        (LINES + "2,a,x,1,0,\n", "line 6 of run.csv is not one that normswap wrote: '2,a,x,1,0,'"),
        (LINES + "2,a\n", "line 6 of run.csv is not one that normswap wrote: '2,a'"),
    ],
)
def test_another_file_is_an_error(text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        run_of(text, "run.csv")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run.csv")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no file" in done.stderr


def test_the_curve_is_low_below_one_and_high_above() -> None:
    assert curve([0.01, 0.25, 4, 100, math.nan]) == "▁▁██!"
    assert curve([0.5]) < curve([1.0]) < curve([2.0])
