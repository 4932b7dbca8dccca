"""The run file: what is refused and how it is said, what short forms mean, and that what is written reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fasttune import config as configs
from fasttune.config import SGD, AdamW, Full, Head, Lora, RunConfig
from fasttune.errors import ConfigError

WHOLE = """\
task: text-classification
model: some/model
data:
  train: train.csv
  valid: 0.2
strategy:
  kind: lora
  rank: 8
train:
  epochs: 2
  lr: 2e-4
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """read(text, *overrides) -> the config of a run file that holds this text."""

    def load(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return configs.load(path, overrides)

    return load


def build(*overrides: str, **values: Any) -> RunConfig:
    return configs.build({"task": "t", "model": "m", "data": {"train": "train.csv"}, **values}, overrides)


def test_a_run_file(read: Any) -> None:
    config = read(WHOLE)
    assert config.data.train == "train.csv"
    assert config.data.valid == 0.2
    assert config.strategy == Lora(rank=8)
    assert config.train.lr == 2e-4
    assert config.train.batch == 32


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("model:", "modle:", ["line 2", "modle", "unknown key", "'model'"]),
        ("  valid:", "  vaild:", ["line 5", "data.vaild", "'valid'"]),
        ("  rank:", "  rnak:", ["line 8", "strategy.rnak", "'rank'"]),
        ("  epochs:", "  epoch:", ["line 10", "train.epoch", "'epochs'"]),
        ("  lr:", "  learning_rate:", ["line 11", "train.learning_rate", "Known here: ", "lr"]),
    ],
)
def test_an_unknown_key_answers_with_its_line_and_the_nearest(
    read: Any, before: str, after: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(WHOLE.replace(before, after))
    assert "run.yaml" in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_all_faults_are_named_at_once(read: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        read(WHOLE.replace("epochs: 2", "epochs: -1").replace("rank: 8", "rank: many").replace("0.2", "7.0"))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    for line, key in ((5, "data.valid"), (8, "strategy.rank"), (10, "train.epochs")):
        assert any(f"line {line}: {key}: " in fault for fault in lines), lines


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch=0", ["train.batch", "greater than or equal to 1", "found 0"]),
        ("train.batch=2.5", ["train.batch", "found 2.5"]),
        ("train.batch=many", ["train.batch", "integer", "found 'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than 0"]),
        ("train.lr=-1", ["train.lr", "found -1"]),
        ("train.lr=fast", ["train.lr", "number", "found 'fast'"]),
        ("train.seed=-1", ["train.seed"]),
        ("train.precision=fp16", ["train.precision", "'bf16'", "found 'fp16'"]),
        ("train.accumulation=64", ["accumulation 64", "32 rows"]),
        ("train.optimizer.kind=adam", ["train.optimizer", "no kind 'adam'", "Did you mean 'adamw'?", "sgd"]),
        ("train.schedule.kind=cosin", ["train.schedule.kind", "'cosine'"]),
        ("train.schedule.final=2", ["train.schedule.final", "less than or equal to 1"]),
        ("train=3", ["train", "found 3"]),
        ("strategy.dropout=1.0", ["strategy.dropout", "less than 1"]),
        ("strategy=lorra", ["strategy", "no kind 'lorra'", "Did you mean 'lora'?", "full, head, lora"]),
        ("data.valid=1.5", ["data.valid", "between 0 and 1", "found 1.5"]),
        ("data.valid=0", ["data.valid", "between 0 and 1"]),
        ("data.on_error=ignore", ["data.on_error", "'skip'", "found 'ignore'"]),
        ("data.max_skip=2", ["data.max_skip"]),
        ("data.columns.text=3", ["data.columns.text", "string", "found 3"]),
        ("eval.every=0", ["eval.every"]),
        ("save.keep=0", ["save.keep"]),
        ("weights=none", ["weights", "'random'"]),
        ("train.optimizer={kind: sgd, momentum: 0, nesterov: true}", ["train.optimizer", "nesterov needs"]),
    ],
)
def test_types_and_ranges(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(override)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("key", ["task", "model", "data"])
def test_what_must_be_there(key: str) -> None:
    values = {"task": "t", "model": "m", "data": {"train": "train.csv"}}
    del values[key]
    with pytest.raises(ConfigError, match=f"^settings: {key}: is missing$"):
        configs.build(values)


@pytest.mark.parametrize(
    ("strategy", "key"),
    [
        ({"kind": "head", "rank": 8}, "rank"),
        ({"kind": "full", "rank": 8}, "rank"),
        ({"kind": "full", "cache_gb": 1}, "cache_gb"),
        ({"kind": "lora", "layer_decay": 0.9}, "layer_decay"),
        ({"kind": "head", "gradual_unfreezing": 0.5}, "gradual_unfreezing"),
        ({"layer_decay": 0.9}, "layer_decay"),
    ],
)
def test_a_strategy_takes_only_its_own_keys(strategy: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(strategy=strategy)
    message = str(refused.value)
    assert f"strategy.{key}: unknown key" in message
    known = message.partition("Known here: ")[2].split(", ")
    own = {"head": Head, "full": Full, "lora": Lora}[strategy.get("kind", "lora")]
    assert known == sorted(own.model_fields)


def test_keys_of_a_schedule_are_known_whatever_its_kind() -> None:
    with pytest.raises(ConfigError, match=r"train\.schedule\.warm_up: unknown key\. Did you mean 'warmup'\?"):
        build(train={"schedule": {"kind": "cosine", "warm_up": 0.1}})


def test_yaml_merge_keys(read: Any) -> None:
    config = read(
        "task: t\nmodel: m\ndata: {train: x}\noptions: {base: &base {epochs: 2, batch: 8}}\n"
        "train:\n  <<: *base\n  batch: 4\n"
    )
    assert config.train.epochs == 2
    assert config.train.batch == 4


@pytest.mark.parametrize(
    ("short", "meant"),
    [
        ("lora", Lora()),
        ("full", Full()),
        ("head", Head()),
        ({"rank": 4}, Lora(rank=4)),
        ({"kind": "full", "layer_decay": 0.9}, Full(layer_decay=0.9)),
    ],
)
def test_short_forms_of_a_strategy(short: Any, meant: Any) -> None:
    assert build(strategy=short).strategy == meant


def test_short_forms_elsewhere() -> None:
    config = build(train={"optimizer": "sgd", "schedule": "cosine"})
    assert config.train.optimizer == SGD()
    assert config.train.schedule.kind == "cosine"
    assert build("train.optimizer.eps=1e-6").train.optimizer == AdamW(eps=1e-6)


@pytest.mark.parametrize("written", ["2e-4", "2E-4", "2.0e-4", "0.0002", "+2e-4", "20e-5", ".2e-3"])
def test_numbers_as_people_write_them(read: Any, written: str) -> None:
    assert read(WHOLE.replace("2e-4", written)).train.lr == 2e-4
    assert read(WHOLE, f"train.lr={written}").train.lr == 2e-4


def test_set_wins_over_the_file_and_keeps_its_neighbours(read: Any) -> None:
    config = read(WHOLE, "train.epochs=5", "strategy.alpha=4", "data.columns.text=body", "train.epochs=6")
    assert config.train.epochs == 6
    assert config.train.lr == 2e-4
    assert config.strategy == Lora(rank=8, alpha=4)
    assert config.data.columns == {"text": "body"}


def test_set_reaches_into_a_short_form(read: Any) -> None:
    text = WHOLE.replace("strategy:\n  kind: lora\n  rank: 8\n", "strategy: lora\n")
    assert read(text, "strategy.rank=4").strategy == Lora(rank=4)
    assert read(text, "strategy=head").strategy == Head()


def test_set_takes_lists_and_text_with_equals_signs(read: Any) -> None:
    config = read(WHOLE, "strategy.targets=[query, value]", "output=runs/lr=2e-4")
    assert config.strategy.targets == ("query", "value")
    assert config.output == "runs/lr=2e-4"


@pytest.mark.parametrize(
    "override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "model.name=x", "data.train.a=b"]
)
def test_a_set_that_makes_no_sense(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(override)
    assert override in str(refused.value)


def test_set_of_broken_yaml() -> None:
    with pytest.raises(ConfigError, match=r"--set .*strategy\.targets=\[a.*not valid YAML"):
        build("strategy.targets=[a")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("task: [a\nmodel: m\n", ["line 2", "not valid YAML"]),
        ("task: a\n\tmodel: m\n", ["line 2", "not valid YAML"]),
        ("task: a\nmodel: m\ntask: b\n", ["line 3", "'task' is given twice"]),
        ("task: a\nmodel: m\ndata:\n  train: x\n  train: y\n", ["line 5", "'train' is given twice"]),
        ("- task\n- model\n", ["expected keys such as task", "found list"]),
        ("", ["expected keys such as task", "found NoneType"]),
        ("just words", ["found str"]),
        ("task: !!python/object/apply:os.system [echo]\n", ["line 1", "not valid YAML"]),
        ("task: a\nmodel: {{MODEL}}\n", ["line 2", "not valid YAML"]),  # a template that was not filled in
        ("task: a\n3: b\nmodel: m\ndata: {train: x}\n", ["line 2", "3"]),
    ],
)
def test_yaml_faults_name_the_line(read: Any, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read(text)
    assert "run.yaml" in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run file"):
        configs.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("task: Äpfel".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 6"):
        configs.load(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        configs.load(tmp_path)


@pytest.mark.parametrize(
    ("strategy", "width", "lr", "head_lr"),
    [
        ("full", 768, 5e-5, 5e-4),
        ("full", None, 5e-5, 5e-4),
        ("head", 768, 5e-3, 5e-3),
        ("lora", 768, 1e-3, 1e-3),
        ("lora", 384, 1.7e-3, 1.7e-3),
        ("lora", 4096, 2.7e-4, 2.7e-4),
    ],
)
def test_learning_rates_depend_on_strategy_and_width(
    strategy: str, width: int | None, lr: float, head_lr: float
) -> None:
    config = configs.resolve_rates(build(strategy=strategy), width)
    assert config.train.lr == pytest.approx(lr)
    assert config.train.head_lr == pytest.approx(head_lr)


def test_a_pretrained_head_learns_no_faster_than_the_rest() -> None:
    config = configs.resolve_rates(build(strategy="full"), 768, fresh_head=False)
    assert config.train.lr == config.train.head_lr == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("chosen", "of_the_model", "clip"), [(None, None, 1.0), (None, 0.1, 0.1), (0.5, 0.1, 0.5), (0.0, 0.1, 0.0)]
)
def test_clipping_is_as_chosen_or_as_the_model_wants_it(
    chosen: float | None, of_the_model: float | None, clip: float
) -> None:
    config = build() if chosen is None else build(f"train.clip={chosen}")
    assert configs.resolve_rates(config, 768, clip=of_the_model).train.clip == clip


def test_resolve_writes_out_what_depends_on_the_strategy() -> None:
    config = configs.resolve(build(strategy="lora", model="hub/some model"), precision="bf16")
    assert config.train.precision == "bf16"
    assert config.eval.batch == 64
    assert config.output == "runs/t-some-model"
    assert isinstance(config.strategy, Lora)
    assert config.strategy.alpha == 32


def test_choosing_another_kind_drops_the_settings_of_the_old_one() -> None:
    lora = {"kind": "lora", "rank": 8}
    assert build("strategy.kind=full", strategy=lora).strategy == Full()
    assert build('strategy.kind="lora"', strategy=lora).strategy == Lora(rank=8)
    assert build("strategy.kind=head", strategy={"rank": 8}).strategy == Head()


def test_resolve_keeps_what_was_chosen() -> None:
    chosen = build("train.lr=3e-3", "train.precision=fp32", "strategy.alpha=5", "eval.batch=7", "output=here")
    config = configs.resolve_rates(configs.resolve(chosen, precision="bf16"), 768)
    assert config.train.lr == config.train.head_lr == 3e-3
    assert config.train.precision == "fp32"
    assert config.strategy == Lora(alpha=5)
    assert config.eval.batch == 7
    assert config.output == "here"


@pytest.mark.parametrize(
    "strategy",
    ["full", "head", {"kind": "lora", "targets": ["query", "value"], "rslora": True}],
)
def test_the_resolved_file_reads_back_the_same(tmp_path: Path, strategy: Any) -> None:
    values = {"strategy": strategy, "options": {"class_weights": {"yes": 2.0, "Ä": 1e-7}}, "output": "läufe/eins"}
    config = configs.build(
        {"task": "t", "model": "m", "data": {"train": "a: b #c.csv", "columns": {"text": "yes", "label": "1"}}}
        | values,
        ["train.optimizer=sgd", "train.lr=1e-5"],
    )
    resolved = configs.resolve(config, precision="fp32")
    (tmp_path / "config.yaml").write_text(configs.dump(resolved), encoding="utf-8")
    read = configs.load(tmp_path / "config.yaml")
    assert read == resolved
    assert configs.resolve(read, precision="bf16") == resolved


def test_a_config_can_not_be_changed() -> None:
    config = build()
    with pytest.raises(ValidationError):
        config.train.lr = 1.0  # type: ignore[misc]
    values: dict[str, Any] = {"task": "t", "model": "m", "data": {"train": "x"}}
    configs.build(values, ["data.train=y", "train.lr=1"])
    assert values == {"task": "t", "model": "m", "data": {"train": "x"}}, "the caller's mapping was changed"


def test_every_key_is_documented() -> None:
    """A key without a word of explanation is one whose name says all; new ones need a docstring."""
    plain = {"kind", "train", "data", "strategy", "optimizer", "schedule", "eval", "save", "betas", "eps"}
    plain |= {"momentum", "nesterov", "seed", "dropout"}
    for section in (RunConfig, configs.Data, configs.Train, configs.Eval, configs.Save, Full, Head, Lora, AdamW):
        for name, field in section.model_fields.items():
            assert field.description or name in plain, f"{section.__name__}.{name} has no docstring"
