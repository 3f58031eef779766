"""Two gloo processes with half the batch each do what one process does with the whole: DistributedDataParallel and FSDP2, on CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from doc_blocks import blocks
from processes import REPOSITORY, run
from torch import Tensor
from torch.distributed import TCPStore
from two_processes import BOTH, CASES, CHECKPOINTED, COUPLED, LATE, NOT_ATTACHED, WRAPS, Case, X, Y, build, full, trained
from warm import Warm

import normswap.layer.coupling
from normswap.layer import gradient_trend, sample_limit

STATISTICS = ("1.mean", "1.log_std", "4.mean", "4.log_std")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    directory = tmp_path_factory.mktemp("two")
    warm.together(REPOSITORY / "tests/support/two_processes.py", directory, [[str(rank), str(directory)] for rank in (0, 1)])
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return [torch.load(directory / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[Case, dict[str, Any]]:
    """What one process finds with the whole batch in one pass."""
    cases = [Case(None, aux, stats) for aux, stats in BOTH] + [Case(None, frozen=True)]
    cases += {counterpart(case) for case in COUPLED.values()}
    return {case: trained(case, X, Y) for case in cases}


def counterpart(case: Case) -> Case:
    return case._replace(wrap=None, micro=1, synchronised=False)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reference_is_worth_comparing_with(alone: dict[Case, dict[str, Any]]) -> None:
    """Every gradient is there, the halves of the batch differ, and the doors and the steps have an effect."""
    auto, raw = (alone[Case(None, "auto", stats)] for stats in ("natural", "raw"))
    assert all(t.abs().max() > 1e-4 for t in auto["grads"].values())
    half = trained(Case(None), X[:4], Y[:4])
    untouched = build("auto", "natural").state_dict()
    for name in STATISTICS:
        assert (half["grads"][name] - auto["grads"][name]).abs().max() > 1e-3, name
        assert (raw["grads"][name] - auto["grads"][name]).abs().max() > 1e-2, name
        assert (auto["state"][name] - untouched[name]).abs().max() > 1e-2, name
    assert {n for n in auto["grads"] if n not in alone[Case(None, frozen=True)]["grads"]} == {"0.weight", "0.bias", *STATISTICS[:2]}


def test_the_coupled_reference_is_worth_comparing_with(alone: dict[Case, dict[str, Any]]) -> None:
    """All five norms are coupled, with a trend; samples reach the limit, and gradients of producers are clipped."""
    (case,) = {counterpart(c) for c in COUPLED.values() if c.aux == "auto"}
    changes = {
        "limit": (sample_limit, "LIMIT", 1e9),
        "clip": (normswap.layer.coupling, "TURN", 1e9),
        "trend": (gradient_trend, "RATE", 0.0),
    }
    assert {n for n in alone[case]["grads"] if "input_mean" in n} == {f"{i}.input_mean" for i in (1, 4, 6, 8, 12)}
    for module, name, value in changes.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            other = trained(case, X, Y)["state"]
            assert max((other[n] - t).abs().max() for n, t in alone[case]["state"].items()) > 1e-3, name


@pytest.mark.parametrize("name", [*CASES, *COUPLED])
def test_half_the_batch_each(name: str, found: list[dict[str, Any]], alone: dict[Case, dict[str, Any]]) -> None:
    """The gradients of one process with the whole batch, weights and statistics, and its state after the steps. Nothing is warned of."""
    expected = alone[counterpart((CASES | COUPLED)[name])]
    for rank in (0, 1):
        assert found[rank][name]["warnings"] == []
        assert_same(found[rank][name]["grads"], expected["grads"])
        assert_same(found[rank][name]["state"], expected["state"])


@pytest.mark.parametrize("name", [*CASES, *NOT_ATTACHED, *COUPLED])
def test_both_processes_hold_the_same(name: str, found: list[dict[str, Any]]) -> None:
    """Bit for bit: a statistic that stepped with the gradients of its own process alone would part here."""
    first, second = (found[rank][name]["state"] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


@pytest.mark.parametrize("name", NOT_ATTACHED)
def test_accumulation_without_attach_is_put_right(name: str, found: list[dict[str, Any]], alone: dict[Case, dict[str, Any]]) -> None:
    for rank in (0, 1):
        (warning,) = found[rank][name]["warnings"]
        assert "Say normswap.attach(model, accumulate=...)" in warning
        assert_same(found[rank][name]["state"], alone[Case(None)]["state"])


def test_fsdp_with_a_plain_optimizer_is_put_right_from_the_second_step_on(found: list[dict[str, Any]]) -> None:
    """Nothing of the optimizer's parameters is known before its first step, when the gradients of several passes are one already."""
    attached = trained(LATE._replace(wrap=None), X, Y)
    for rank in (0, 1):
        (warning,) = found[rank]["late"]["warnings"]
        assert "Say normswap.attach(model, accumulate=...)" in warning
        first, second = found[rank]["late"]["states"]
        moved = {n: (second[n] - first[n], attached["states"][1][n] - attached["states"][0][n]) for n in ("1.mean", "4.mean")}
        assert not torch.allclose(first["1.mean"], attached["states"][0]["1.mean"])
        for mine, expected in moved.values():
            assert (mine / expected).abs().max() < 1.2


@pytest.mark.parametrize(("wrap", "coupling"), CHECKPOINTED)
def test_a_norm_in_eval_mode_whose_statistics_are_not_frozen(wrap: str, coupling: str, found: list[dict[str, Any]]) -> None:
    error = "Expected to have finished reduction" if wrap == "ddp" else ""
    assert all(found[rank][f"{wrap} {coupling} unused"].startswith(error) for rank in (0, 1))
    assert bool(found[0][f"{wrap} {coupling} unused"]) == bool(error)


def test_a_producer_in_another_unit_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert found[rank]["apart"].startswith(
            "a BatchlessNorm of 4 channels is coupled to a conv or linear in another unit of fully_shard"
        )
        assert "fully_shard([producer, norm])" in found[rank]["apart"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_two_forward_passes_before_one_backward_pass(wrap: str, found: list[dict[str, Any]], alone: dict[Case, dict[str, Any]]) -> None:
    """Each of a quarter of the batch, and each with the term: twice the statistics' gradient of the whole."""
    expected = alone[Case(None)]["grads"]
    for rank in (0, 1):
        assert_same(found[rank][f"{wrap} two forwards"], {n: 2 * t for n, t in expected.items()})


@pytest.mark.parametrize("wrap", WRAPS)
def test_micro_batches(wrap: str, found: list[dict[str, Any]], alone: dict[Case, dict[str, Any]]) -> None:
    """Of 3 and 1 samples in each process."""
    expected = alone[Case(None)]["grads"]
    for rank in (0, 1):
        assert_same(found[rank][f"{wrap} micro-batches"], expected)


def test_clipping_is_noticed_behind_the_average(found: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        (warning,) = found[rank]["ddp clipped"][True]
        assert warning.startswith("the gradients of the statistics of 2 BatchlessNorm layers (first: module.4) were changed between")


@pytest.mark.parametrize("wrap", WRAPS)
def test_clipping_the_others_is_not_taken_for_it(wrap: str, found: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert found[rank][f"{wrap} clipped"][False] == []


@pytest.mark.parametrize("wrap", ["ddp", "view"])
def test_a_pass_that_was_thrown_away(wrap: str, found: list[dict[str, Any]], alone: dict[Case, dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert_same(found[rank][f"{wrap} thrown away"], alone[Case(None)]["states"][0])


@pytest.mark.parametrize(("wrap", "coupling"), CHECKPOINTED)
def test_checkpoints_round_trip(wrap: str, coupling: str, found: list[dict[str, Any]]) -> None:
    """Bit for bit, with the optimizer: the next step of the loaded model is that of the saved one."""
    for rank in (0, 1):
        result = found[rank][f"{wrap} {coupling} checkpoint"]
        assert all(not torch.equal(result["untouched"][n], result["saved"][n]) for n in STATISTICS)
        assert all(not torch.equal(result["after"][0][n], result["saved"][n]) for n in STATISTICS)
        for one, other in ((result["saved"], result["loaded"]), result["after"]):
            assert one.keys() == other.keys()
            assert [n for n in one if not torch.equal(one[n], other[n])] == []


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint, that there is one process
@pytest.mark.parametrize(("wrap", "coupling"), CHECKPOINTED)
def test_one_process_reads_the_checkpoint_of_two(wrap: str, coupling: str, found: list[dict[str, Any]], directory: Path) -> None:
    model = build("auto", "natural", coupling)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=directory / f"{wrap} {coupling}.checkpoint")
    model.load_state_dict(state["model"])
    saved = found[0][f"{wrap} {coupling} checkpoint"]["saved"]
    assert {n for n, t in model.state_dict().items() if not torch.equal(full(t), saved[n])} == set()


@pytest.mark.parametrize("alone", [True, False])
def test_norms_by_themselves_keep_their_precision(alone: bool, found: list[dict[str, Any]]) -> None:
    """FSDP with a policy of bfloat16 rounds the statistics too, unless the norms are units of their own. Each step warns of that, once."""
    dtypes, warned = found[0]["mixed"][alone]
    assert dtypes == [torch.float32 if alone else torch.bfloat16, torch.float32, torch.bfloat16]
    about = "the statistics of 2 BatchlessNorm layers (first: 4) were in half precision since the last step"
    assert [w.partition(",")[0] for w in warned] == ([] if alone else [about] * 2)


def test_the_documented_example_runs(tmp_path: Path, warm: Warm) -> None:
    """As torchrun starts it: each process is told its number, how many there are and where they meet."""
    (example,) = blocks(REPOSITORY / "docs/training.md", "py")
    (tmp_path / "train.py").write_text(example)
    (tmp_path / "fixtures").symlink_to(REPOSITORY / "fixtures")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a free port; they join it, as torchrun's
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    warm.together(tmp_path / "train.py", tmp_path, [[], []], [meet | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")])


@pytest.mark.slow
def test_the_documented_example_runs_under_torchrun(tmp_path: Path) -> None:
    (example,) = blocks(REPOSITORY / "docs/training.md", "py")
    (tmp_path / "train.py").write_text(example)
    (tmp_path / "fixtures").symlink_to(REPOSITORY / "fixtures")
    run([[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]], cwd=tmp_path)
