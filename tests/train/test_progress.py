"""What a running job says where its output is a file."""

import io
import time

from rich.console import Console

from apd_jax.train import progress


def test_cost_and_time_left_are_said_after_the_first_call(monkeypatch):
    """Two calls of 10 steps out of 1,000: 20 s with compiling, then 5 s."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=out, width=40)
    with progress.ProgressDisplay("job", 1000, console=console, begun=0) as display:
        now[0] = 20.0
        display.update(10, {"total": 1.0})
        now[0] = 25.0
        display.update(20, {"total": 0.5})  # too soon after the last line
        now[0] = 31.0
        display.update(30, {"total": 0.25})
    first, second = out.getvalue().splitlines()
    # 20 s for 10 steps; 990 left at 2 s.
    assert first == "job: step 10/1000  at most 2 s/step, at most 33.0 min left  total 1"
    # 11 s for the 20 steps since then; 970 left.
    assert second == "job: step 30/1000  0.55 s/step, 8.9 min left  total 0.25"


def test_durations():
    shown = [progress.duration(s) for s in (5.0, 119.0, 120.0, 7200.0, 2e5)]
    assert shown == ["5 s", "119 s", "2.0 min", "2.0 h", "2.3 days"]
