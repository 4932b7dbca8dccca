"""The README's commands and code run as they stand, in a folder that has what they name."""

import csv
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from fasttune import config
from fasttune.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny_bert):
    """A folder with `reviews.csv`, and a tiny model where the README names a hub id."""
    monkeypatch.chdir(tmp_path)
    Path("distilbert-base-uncased").symlink_to(tiny_bert)
    with Path("reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "sentiment"])
        for i in range(60):
            writer.writerow(
                [f"{'good fine' if i % 2 else 'bad poor'} thing number {i}", "pos" if i % 2 else "neg"]
            )
    return tmp_path


def test_the_commands_run(desk):
    ran = []
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("fasttune "):
            result = CliRunner().invoke(main, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran.append(line)
    assert len(ran) >= 3
    assert (desk / "runs/reviews/best/adapter_config.json").exists()
    assert (desk / "reviews-model/model.safetensors").exists()


def test_the_python_runs(desk, capsys):
    for code in blocks("python"):
        assert len(code.strip().splitlines()) < 11
        exec(compile(code, "README.md", "exec"), {})
    assert '"label"' in capsys.readouterr().out.replace("'", '"')


def test_the_run_file_runs(desk):
    text = blocks("yaml")[0].replace("{text: text, label: label}", "{text: review, label: sentiment}")
    Path("run.yaml").write_text(text)
    assert config.load("run.yaml").train.accumulation == 2
    result = CliRunner().invoke(main, ["run", "run.yaml"])
    assert result.exit_code == 0, result.output


def test_every_command_is_in_the_readme_and_every_one_there_exists():
    named = set(re.findall(r"\| `fasttune (\w+)", README))
    assert named == set(main.commands)


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
