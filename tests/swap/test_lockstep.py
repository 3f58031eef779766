"""Passes that stop and go on: one at a time, each with its own thread state, and ended where they stopped."""

from __future__ import annotations

import threading

import pytest
import torch

from normswap.swap.lockstep import Pass, Passes


def test_a_pass_stops_where_it_is_told_and_goes_on_from_there() -> None:
    seen: list[str] = []

    def run(one: Pass, name: str) -> None:
        seen.append(f"{name} begins")
        one.stop(1)
        seen.append(f"{name} goes on")
        one.stop(2)
        seen.append(f"{name} ends")

    with Passes() as passes:
        a = passes.add(lambda: run(a, "a"))
        b = passes.add(lambda: run(b, "b"))
        assert not seen
        assert [a.resume(), b.resume(), a.resume(), a.resume(), b.resume(), b.resume()] == [1, 1, 2, None, 2, None]
    assert seen == ["a begins", "b begins", "a goes on", "a ends", "b goes on", "b ends"]


def test_what_is_kept_per_thread_stays_with_its_pass() -> None:
    """One stops inside autocast: the others, and this thread, are not in it. None has gradients."""

    def run(one: Pass, cast: bool) -> None:
        with torch.autocast("cpu", enabled=cast):
            one.stop(None)
            one.stop((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    with Passes() as passes:
        a = passes.add(lambda: run(a, True))
        b = passes.add(lambda: run(b, False))
        a.resume()
        assert not torch.is_autocast_enabled("cpu")
        b.resume()
        assert a.resume() == (True, False)
        assert b.resume() == (False, False)
        assert torch.is_grad_enabled()


def test_a_pass_knows_itself() -> None:
    with Passes() as passes:
        a = passes.add(lambda: a.stop(passes.current))
        b = passes.add(lambda: b.stop(passes.current))
        assert passes.current is None
        assert (b.resume(), a.resume()) == (b, a)


def test_what_the_model_raises_is_raised_by_resume() -> None:
    def run() -> None:
        raise KeyError("position_ids")

    with Passes() as passes, pytest.raises(KeyError, match="position_ids"):
        passes.add(run).resume()


def test_an_unfinished_pass_is_ended_even_by_a_model_that_catches_exceptions() -> None:
    ended: list[str] = []
    threads = threading.active_count()

    def run(one: Pass) -> None:
        try:
            try:
                one.stop(1)
            except Exception:
                ended.append("caught")
            ended.append("went on")
        finally:
            ended.append("left")

    with Passes() as passes:
        a = passes.add(lambda: run(a))
        passes.add(lambda: None)  # one that never began
        a.resume()
    assert ended == ["left"]
    assert threading.active_count() == threads


def test_a_default_device_of_the_caller_holds_in_the_pass() -> None:
    with torch.device("meta"), Passes() as passes:
        a = passes.add(lambda: a.stop(torch.zeros(2).device.type))
        assert a.resume() == "meta"


def test_a_pass_that_still_runs_is_not_waited_for() -> None:
    """Ctrl-C comes while the model runs: `resume` raises in the main thread, and the pass ends where it would stop."""
    go, ended = threading.Event(), threading.Event()

    def run(one: Pass) -> None:
        go.wait()
        try:
            one.stop(1)
        finally:
            ended.set()

    with Passes() as passes:
        a = passes.add(lambda: run(a))
        a._thread.start()
        a._runs = True  # as in a `resume` that was interrupted
    go.set()
    assert ended.wait(60)
