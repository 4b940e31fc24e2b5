"""The workflows take actions by commit and tools by version, and no step can hang for hours."""

import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


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


def steps_that_may_fail(job):
    return [step["name"] for step in job["steps"] if step.get("continue-on-error")]


def test_only_what_a_virtual_macs_gpu_says_may_fail():
    jobs = yaml.safe_load((WORKFLOWS[0].parent / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert {name: steps_that_may_fail(job) for name, job in jobs.items()} == {
        "fast": [],
        "linux": [],
        "mac": ["Everything, with MLX on the GPU"],
        "coreml-and-swift": ["Those of the GPU and the Neural Engine are too"],
    }
    (quick,) = (step["run"] for step in jobs["mac"]["steps"] if "pytest" in step.get("run", ""))
    assert "--cpu" in quick  # which may not fail
    mac, swift = (jobs[name]["strategy"]["matrix"]["include"] for name in ("mac", "coreml-and-swift"))
    assert {"macos-15", "macos-26"} == {one["runs-on"] for one in mac + swift}
    assert all(one.get("xcode") for one in swift)
    kernels = yaml.safe_load((WORKFLOWS[0].parent / "kernels.yml").read_text(encoding="utf-8"))["jobs"]
    may_fail = {name: steps_that_may_fail(job) for name, job in kernels.items()}
    assert set(may_fail) == {"apples-compiler", "metal-short", "metal-all"}
    short = may_fail.pop("metal-short")
    assert len(short) == 3
    assert all(name.endswith(", on the GPU") for name in short)
    assert not any(may_fail.values())
    runs = " && ".join(step.get("run", "") for step in jobs["fast"]["steps"])
    for command in ("ruff check .", "ruff format --check .", "mypy --platform darwin", "pytest"):
        assert runs.count(command) == 1, command


def test_one_commit_of_an_action_everywhere_with_its_version_beside_it():
    used = {}
    for path in WORKFLOWS:
        for action, commit, version in re.findall(
            r"uses: ([\w./-]+)@(\w+)(?:  # (v\d+\.\d+\.\d+))?$", path.read_text(encoding="utf-8"), re.M
        ):
            assert version, f"{path.name}: {action}"
            used.setdefault(action, set()).add((commit, version))
    assert len(used) >= 6
    assert {action for action, versions in used.items() if len(versions) > 1} == set()


def test_only_the_last_job_of_a_release_may_write():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path.name
        writing = {name for name, job in workflow["jobs"].items() if "permissions" in job}
        assert writing == ({"publish"} if path.stem == "release" else set())


def test_a_release_says_where_it_was_built_and_what_it_is_installed_with():
    jobs = yaml.safe_load((WORKFLOWS[0].parent / "release.yml").read_text(encoding="utf-8"))["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == dict.fromkeys(("id-token", "attestations", "artifact-metadata"), "write")
    names = [step.get("uses", "").split("@")[0] for step in publish["steps"]]
    attested = [
        step["with"] for step in publish["steps"] if step.get("uses", "").startswith("actions/attest@")
    ]
    assert [set(given) for given in attested] == [{"subject-path"}, {"subject-path", "sbom-path"}]
    assert {given["subject-path"] for given in attested} == {"dist/*"}
    assert names[-1] == "pypa/gh-action-pypi-publish"  # nothing is published that is not attested
    (made,) = (step["run"] for step in jobs["build"]["steps"] if "cyclonedx" in step.get("run", ""))
    assert attested[1]["sbom-path"] in made


def test_oldest_and_newest_versions_are_tried_each_week():
    workflow = yaml.safe_load((WORKFLOWS[0].parent / "versions.yml").read_text(encoding="utf-8"))
    (when,) = workflow[True]["schedule"]  # `on` is YAML for true
    assert re.fullmatch(r"\d+ \d+ \* \* \d", when["cron"])
    (job,) = workflow["jobs"].values()
    matrix = job["strategy"]["matrix"]
    newer = matrix.pop("include")
    assert matrix == {
        "runs-on": ["ubuntu-latest", "macos-15"],
        "versions": ["oldest", "newest"],
        "python-version": ["3.11"],
    }
    assert {(one["runs-on"], one["python-version"]) for one in newer} == {
        (machine, python) for machine in matrix["runs-on"] for python in ("3.13", "3.14")
    }
    assert any("--resolution lowest-direct" in step.get("run", "") for step in job["steps"])
    assert job["steps"][-1]["run"] == "pytest"


def test_every_target_is_fuzzed_each_week_on_what_earlier_weeks_found():
    workflow = yaml.safe_load((WORKFLOWS[0].parent / "fuzzing.yml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d+ \d+ \* \* \d", workflow[True]["schedule"][0]["cron"])
    assert set(workflow["jobs"]) == {"readers", "native"}
    for name, job in workflow["jobs"].items():
        steps = {step.get("uses", "").split("@")[0]: step for step in job["steps"]}
        restored, saved = (steps[f"actions/cache/{what}"] for what in ("restore", "save"))
        assert restored["with"]["path"] == saved["with"]["path"] == "corpus"
        assert restored["with"]["restore-keys"] == f"{name}-"
        assert saved["if"] == "always()"  # what a run found it found on the way
        (run,) = (step["run"] for step in job["steps"] if "--corpus" in step.get("run", ""))
        assert 'corpus/$target"' in run
        assert "--list" in run
    assert "--atheris" in str(workflow["jobs"]["readers"]["steps"])


def test_tools_of_a_release_have_one_version_each():
    """Wherever they are installed, and a bot proposes newer ones."""
    tools = (ROOT / ".ci/requirements.txt").read_text(encoding="utf-8")
    names = re.findall(r"^([a-z-]+)==[\d.]+$", tools, re.M)
    assert names == sorted(names)
    assert {"build", "twine", "cyclonedx-bom", "uv", "wheel"} == set(names)
    found = set()
    for path in [*WORKFLOWS, ROOT / ".ci/run"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            for name in names:
                if re.search(rf"pip\"? install .*(?<=\s){name}(?=\s|$)", line):
                    assert "--constraint .ci/requirements.txt" in line, (path.name, line)
                    found.add(name)
    assert found == set(names)
    bot = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text(encoding="utf-8"))
    watched = {(one["package-ecosystem"], one["directory"]) for one in bot["updates"]}
    assert watched == {("github-actions", "/"), ("pip", "/.ci")}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_a_release_gives_apps_a_repository_of_the_swift_package_alone(tmp_path):
    jobs = yaml.safe_load((WORKFLOWS[0].parent / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["swift-repository"]["needs"] == "publish"
    assert ".ci/swift_repository.sh" in jobs["swift-repository"]["steps"][-1]["run"]
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "trunk", remote], check=True)
    for tag in ("v1.0.0", "v1.1.0", "v1.1.0"):  # the last again
        command = [ROOT / ".ci/swift_repository.sh", remote, tag]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    clone = tmp_path / "clone"
    subprocess.run(
        ["git", "clone", "-q", "--branch", "v1.1.0", remote, clone], check=True, capture_output=True
    )
    log = subprocess.run(["git", "log", "--format=%s"], cwd=clone, check=True, capture_output=True, text=True)
    assert log.stdout.split() == ["v1.1.0", "v1.0.0"]
    files = [path.relative_to(clone) for path in clone.rglob("*") if path.is_file()]
    files = {path.as_posix() for path in files if path.parts[0] != ".git"}
    tracked = subprocess.run(
        ["git", "ls-files", "swift/ParaRNN", "swift/ParaRNNFoundationModels", "swift/pararnn-chat"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert files == {"Package.swift", "README.md", "LICENSE", ".spi.yml", *tracked}
    manifest = (clone / "Package.swift").read_text(encoding="utf-8")
    assert "testTarget" not in manifest
    linked = re.findall(r'path: "(swift/[^"]*)"', manifest.split("usesStub\n      ?")[0])
    assert len(linked) == 3
    assert all((clone / path).is_dir() for path in linked)
