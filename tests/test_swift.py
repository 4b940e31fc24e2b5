"""What the Swift tests compare with is what MLX-LM and Hugging Face's tokenizers compute today.

The Swift package itself is built and tested by swift/linux/test.sh.
"""

import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

SWIFT = Path(__file__).parents[1] / "swift"
APP = SWIFT.parent / "examples/ChatApp"


def script(name):
    spec = spec_from_file_location(name, SWIFT / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name):
    return json.loads((SWIFT / "ParaRNNTests" / "Data" / name).read_text(encoding="ascii"))


def test_probabilities_are_mlx_lms():
    ours, now = committed("sampling.json"), script("make_vectors").sampling_cases()
    assert len(ours) == len(now)
    for a, b in zip(ours, now, strict=True):
        assert {k: a[k] for k in ("options", "logits", "recent")} == {
            k: b[k] for k in ("options", "logits", "recent")
        }
        np.testing.assert_allclose(a["probabilities"], b["probabilities"], rtol=0, atol=1e-6)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the characters are those of Python 3.11's Unicode"
)
def test_tokens_are_hugging_faces():
    assert committed("tokenizers.json") == script("make_vectors").tokenizer_cases()


def test_completions_are_pythons():
    ours, now = committed("completions.json"), script("make_vectors").completion_cases()
    assert [case["prefix"] for case in ours] == [case["prefix"] for case in now]
    for a, b in zip(ours, now, strict=True):
        assert [piece["text"] for piece in a["pieces"]] == [piece["text"] for piece in b["pieces"]]
        probabilities = [[piece["probability"] for piece in case["pieces"]] for case in (a, b)]
        np.testing.assert_allclose(*probabilities, rtol=0, atol=1e-6)


@pytest.fixture
def xcode(tmp_path):
    """Runs the app's build phase, with stand-ins for commands; returns what it says and the resources."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "mlx-pararnn": 'mkdir -p "$4/model.mlpackage"\necho "$2" > "$4/model.mlpackage/of"\n'
        'echo {} > "$4/tokenizer.json"',
        "xcrun": 'mkdir "$4/model.mlmodelc" && cp "$3/of" "$4/model.mlmodelc/"',
    }

    repository = tmp_path / "repository"  # which has no environment of its own
    (repository / "examples/ChatApp").mkdir(parents=True)
    shutil.copy(APP / "demo-model.sh", repository / "examples/ChatApp")
    (repository / "mlx_pararnn").symlink_to(APP.parents[1] / "mlx_pararnn")

    def build(missing=(), **settings):
        for name, text in commands.items():
            (tools / name).unlink(missing_ok=True)
            if name not in missing:
                (tools / name).write_text(f'#!/bin/sh\necho "{name} $*"\n{text}\n')
                (tools / name).chmod(0o755)
        resources = tmp_path / "products/ChatApp.app"
        environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "SRCROOT": str(repository / "examples/ChatApp"),
            "DERIVED_FILE_DIR": str(tmp_path / "derived"),
            "TARGET_BUILD_DIR": str(tmp_path / "products"),
            "UNLOCALIZED_RESOURCES_FOLDER_PATH": "ChatApp.app",
        }
        (tmp_path / "derived").mkdir(exist_ok=True)
        run = subprocess.run(
            [repository / "examples/ChatApp/demo-model.sh"],
            env=environment | settings,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout, resources

    return build


def test_the_app_gets_a_demo_model(xcode):
    said, resources = xcode()
    assert "mlx-pararnn convert" in said
    assert "--to coreml" in said
    model = Path((resources / "model.mlmodelc/of").read_text().strip())
    assert (model / "config.json").is_file()  # the model that the package brings
    assert (resources / "tokenizer.json").is_file()
    said, _ = xcode()
    assert "mlx-pararnn" not in said
    assert "xcrun coremlcompiler" in said


@pytest.mark.skipif(
    any(os.access(f"{folder}/mlx-pararnn", os.X_OK) for folder in ("/opt/homebrew/bin", "/usr/local/bin")),
    reason="this machine has the command where the build phase looks for it",
)
def test_without_an_exporter_the_app_has_no_model(xcode):
    said, resources = xcode(missing=["mlx-pararnn"])
    assert said.startswith("note: ")
    assert not resources.exists()


def test_an_empty_setting_leaves_the_model_out(xcode):
    said, resources = xcode(DEMO_MODEL="")
    assert said.startswith("note: ")
    assert not resources.exists()


def test_the_shared_scheme_names_the_project_target():
    project = (APP / "ChatApp.xcodeproj/project.pbxproj").read_text(encoding="utf-8")
    scheme = ElementTree.parse(APP / "ChatApp.xcodeproj/xcshareddata/xcschemes/ChatApp.xcscheme").getroot()
    targets = {r.attrib["BlueprintIdentifier"] for r in scheme.iter("BuildableReference")}
    assert len(targets) == 1
    assert re.search(rf"{targets.pop()} /\* ChatApp \*/ = {{\s+isa = PBXNativeTarget;", project)
    for action in ("LaunchAction", "ProfileAction", "ArchiveAction"):
        assert scheme.find(action).attrib["buildConfiguration"] == "Release"
    phases = re.search(r"buildPhases = \((.*?)\)", project, re.DOTALL).group(1)
    for identifier in re.findall(r"[A-F0-9]{24}", phases):
        assert len(re.findall(rf"\n\t\t{identifier} ", project)) == 1
    assert "demo-model.sh" in project


# Apple's categories of functions whose use an app has to give a reason for, and their names.
REASONED = {
    "FileTimestamp": r"\b(creationDate|\w*[mM]odificationDate\w*|l?stat(at)?\()",
    "SystemBootTime": r"\b(systemUptime|mach_absolute_time)\b",
    "DiskSpace": r"\b(volume\w*Capacity\w*|system(Free)?Size|statv?fs)\b",
    "UserDefaults": r"\b(UserDefaults|AppStorage)\b",
    "ActiveKeyboards": r"\bactiveInputModes\b",
}


def test_the_privacy_manifest_gives_a_reason_for_what_is_used():
    text = "\n".join(p.read_text(encoding="utf-8") for p in (SWIFT / "ParaRNN").rglob("*.swift"))
    used = {
        f"NSPrivacyAccessedAPICategory{name}" for name, names in REASONED.items() if re.search(names, text)
    }
    manifest = plistlib.loads((SWIFT / "ParaRNN/PrivacyInfo.xcprivacy").read_bytes())
    given = manifest["NSPrivacyAccessedAPITypes"]
    assert {one["NSPrivacyAccessedAPIType"] for one in given} == used
    timestamps = "NSPrivacyAccessedAPICategoryFileTimestamp"
    assert given == [{"NSPrivacyAccessedAPIType": timestamps, "NSPrivacyAccessedAPITypeReasons": ["C617.1"]}]
    assert manifest["NSPrivacyTracking"] is False
    package = (SWIFT.parent / "Package.swift").read_text(encoding="utf-8")
    assert 'path: "swift/ParaRNN",\n      resources: [.copy("PrivacyInfo.xcprivacy")]' in package


def test_docs_have_swift_samples():
    samples = script("doc_samples").samples()
    for name in ("ParaRNNModel(contentsOf", "model.generate(", "chat.respond(", "chat.save()"):
        assert name in samples
    assert "AutoTokenizer" not in samples
