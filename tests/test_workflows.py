"""The workflows take actions by commit, and no step can hang for hours."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((Path(__file__).parents[1] / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_and_time_limits(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    for step in [step for job in jobs.values() for step in job["steps"]]:
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step
        else:
            assert step["timeout-minutes"] > 0, step
    for name, job in jobs.items():
        steps = sum(step.get("timeout-minutes", 0) for step in job["steps"])
        assert job["timeout-minutes"] >= steps, f"{name}: its steps may take {steps} minutes"


def test_only_what_a_virtual_macs_gpu_says_may_fail():
    jobs = yaml.safe_load((WORKFLOWS[0].parent / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert set(jobs) == {"linux", "mac", "coreml-and-swift"}
    may_fail = [step for job in jobs.values() for step in job["steps"] if step.get("continue-on-error")]
    assert [("GPU" in step["run"], "CPU" in step["run"]) for step in may_fail] == [(True, False)]
    mac, swift = (jobs[name]["strategy"]["matrix"]["include"] for name in ("mac", "coreml-and-swift"))
    assert {"macos-15", "macos-26"} == {one["runs-on"] for one in mac + swift}
    assert all(one.get("xcode") for one in swift)
