"""Plugins from outside: real packages, installed into a throw-away folder and used by the command line."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

SOURCES = Path(__file__).parent / "third_party"
PARITY_MODEL = "from fasttune_parity.model import ParityModel; ParityModel().save_pretrained({!r})"

SETTINGS = ["--set", "train.epochs=10", "--set", "train.batch=8", "--set", "train.precision=fp32"]
SETTINGS += ["--set", "train.lr=2e-2", "--set", "train.head_lr=2e-2"]
MANY = """
import json, sys
from click.testing import CliRunner
from fasttune.cli import main
answers = []
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (command, result.output, result.exc_info)
    answers.append(result.stdout)
print(json.dumps(answers))
"""


def install(target: Path, build: Path, *packages: str) -> Path:
    """As `pip install` does it, entry points and all; from a copy, since setuptools builds inside the sources."""
    for package in packages:
        shutil.copytree(SOURCES / package, build / package)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    done = subprocess.run(
        [*command, *(str(build / package) for package in packages)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


class Shell:
    """A shell in which further packages are installed."""

    def __init__(self, folder: Path, *sites: Path):
        path = os.pathsep.join([*map(str, sites), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Bytecode of the packages under test would be written into the folder that the other tests share.
        self.env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.folder = folder

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)

    def fasttune(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name("fasttune")
        return subprocess.run(
            [str(script), *arguments], cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("environments")
    return {
        "plugins": install(folder / "plugins", folder / "build", "good", "broken", "future"),
        "rival": install(folder / "rival", folder / "build", "rival"),
    }


@pytest.fixture
def shell(sites: dict[str, Path], tmp_path: Path) -> Shell:
    """The good, the broken and the future plugin."""
    return Shell(tmp_path, sites["plugins"])


@pytest.fixture
def crowded(sites: dict[str, Path], tmp_path: Path) -> Shell:
    """And a second package that claims the good one's task."""
    return Shell(tmp_path, sites["plugins"], sites["rival"])


@pytest.fixture(scope="module")
def parity(sites: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, train.jsonl and valid.jsonl."""
    folder = tmp_path_factory.mktemp("parity")
    made = Shell(folder, sites["plugins"]).python("-c", PARITY_MODEL.format("model"))
    assert made.returncode == 0, made.stderr
    chance = random.Random(4)
    for name, count in (("train", 120), ("valid", 30)):
        rows = []
        for _ in range(count):
            lengths = [chance.randrange(1, 15) for _ in range(chance.randrange(1, 9))]
            tags = ["odd" if length % 2 else "even" for length in lengths]
            rows.append({"sentence": " ".join("x" * length for length in lengths), "tags": tags})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_arguments(parity: Path, task: str = "sentence-parity") -> list[str]:
    data = ["--data", str(parity / "train.jsonl"), "--valid", str(parity / "valid.jsonl")]
    return ["run", task, "--model", str(parity / "model"), *data, "--output", "run"]


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""


def test_tasks_lists_all_and_says_what_is_wrong(shell: Shell) -> None:
    done = shell.fasttune("tasks")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for task in ("text-classification", "image-classification", "audio-classification"):
        assert "fasttune-classification" in lines[task]
        assert lines[task].endswith("ok")
    assert "fasttune-parity 1.2.3" in lines["sentence-parity"]
    assert lines["sentence-parity"].endswith("ok")
    broken = lines["sentence-repair"]
    assert "fasttune-broken 0.3.1" in broken
    assert "ImportError: libparity.so.3: cannot open shared object file" in broken
    assert "fasttune-future 2.0.0" in lines["sentence-future"]
    assert "v2" in lines["sentence-future"]
    assert "was imported" not in done.stdout, "a task of another contract is explained, not imported"


def test_tasks_as_json(shell: Shell) -> None:
    found = {task["name"]: task for task in json.loads(shell.fasttune("tasks", "--json").stdout)["tasks"]}
    assert {name for name, task in found.items() if not task["ok"]} == {"sentence-repair", "sentence-future"}
    assert found["sentence-parity"]["distribution"] == "fasttune-parity"


def test_a_task_describes_its_columns_and_options(shell: Shell) -> None:
    done = shell.fasttune("tasks", "sentence-parity")
    assert done.returncode == 0
    for part in ("words (text), also found as: sentence", "word_accuracy (max, primary)", "lowest_length = 1"):
        assert part in done.stdout


def test_a_task_on_a_model_of_its_own_trains(shell: Shell, parity: Path) -> None:
    done = shell.fasttune(*run_arguments(parity), "--strategy", "full", "--quiet", *SETTINGS)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((shell.folder / "run" / "metrics.json").read_text())["valid"]
    assert metrics["word_accuracy"] > 0.95, "chance is 0.5"
    assert f"word_accuracy {metrics['word_accuracy']:.4f}" in done.stdout


def test_every_strategy_and_command_serves_it(shell: Shell, parity: Path) -> None:
    """In one process, since each start costs seconds."""
    commands = []
    for strategy in ("head", "lora"):
        run = [*run_arguments(parity)[:-1], strategy, "--strategy", strategy, "--quiet", *SETTINGS]
        commands += [run, ["evaluate", strategy, "--data", str(parity / "valid.jsonl"), "--json"]]
        commands += [["predict", strategy, "--input", "x xx xxx"], ["export", strategy, "--to", f"{strategy}-out"]]
    commands.append(["check", *run_arguments(parity)[1:], "--json"])
    done = shell.python("-c", MANY, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for (strategy, *_), (_, evaluated, predicted, _) in zip(
        (("head",), ("lora",)), (answers[:4], answers[4:8]), strict=True
    ):
        metrics = json.loads((shell.folder / strategy / "metrics.json").read_text())["valid"]
        assert metrics["word_accuracy"] > 0.9, strategy
        assert json.loads(evaluated) == metrics
        assert json.loads(predicted) == ["odd", "even", "odd"]
        assert (shell.folder / f"{strategy}-out" / "weights.safetensors").is_file()
    assert json.loads(answers[8])["rows"] == "120 train, 30 valid"


def test_bad_rows_of_its_own_are_named(shell: Shell, parity: Path) -> None:
    rows = [json.dumps({"sentence": "one two", "tags": ["odd"]}), json.dumps({"sentence": "", "tags": []})]
    (shell.folder / "bad.jsonl").write_text("\n".join([(parity / "valid.jsonl").read_text().strip(), *rows]))
    done = shell.fasttune(*run_arguments(parity), "--valid", "bad.jsonl")
    assert_refused(
        done, "bad.jsonl, row 31, column 'tags': expected a list of 2 tags", "row 32, column 'sentence'"
    )
    assert not (shell.folder / "run").exists()


@pytest.mark.parametrize("command", ["run", "tasks"])
def test_the_broken_one_costs_only_itself(shell: Shell, parity: Path, command: str) -> None:
    arguments = run_arguments(parity, "sentence-repair") if command == "run" else ["tasks", "sentence-repair"]
    done = shell.fasttune(*arguments)
    assert_refused(done, "sentence-repair", "fasttune-broken 0.3.1", "libparity.so.3: cannot open shared object")
    assert not (shell.folder / "run").exists()


@pytest.mark.parametrize("name", ["sentence-party", "sentence_parity", "sentences-parity"])
def test_a_near_miss_gets_a_suggestion(shell: Shell, name: str) -> None:
    done = shell.fasttune("tasks", name)
    assert_refused(done, f"no installed task is named {name!r}", "Did you mean 'sentence-parity'?")


def test_another_contract_is_explained(shell: Shell) -> None:
    done = shell.fasttune("tasks", "sentence-future")
    assert_refused(done, "fasttune-future 2.0.0", "made for contract v2", "this fasttune speaks v1")


def test_two_claimants_are_an_error_that_names_both(crowded: Shell) -> None:
    done = crowded.fasttune("init", "run.yaml", "--task", "sentence-parity")
    assert_refused(
        done, "claimed by 2 distributions", "fasttune-parity:sentence-parity", "fasttune-rival:sentence-parity"
    )
    assert not (crowded.folder / "run.yaml").exists()


def test_distribution_and_task_choose_between_claimants(crowded: Shell, parity: Path) -> None:
    described = crowded.fasttune("tasks", "fasttune-rival:sentence-parity")
    assert "rival_words" in described.stdout
    quick = ["--strategy", "full", "--set", "train.steps=1", "--set", "train.precision=fp32", "--quiet"]
    done = crowded.fasttune(*run_arguments(parity, "fasttune-parity:sentence-parity"), *quick)
    assert done.returncode == 0, done.stderr
    config = (crowded.folder / "run" / "config.yaml").read_text()
    assert "task: fasttune-parity:sentence-parity" in config
    plugin: dict[str, Any] = yaml.safe_load(config)["provenance"]["plugin"]
    assert (plugin["distribution"], plugin["version"]) == ("fasttune-parity", "1.2.3")


def test_the_plugins_own_conformance_test_passes(shell: Shell) -> None:
    done = shell.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "fasttune_parity")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
