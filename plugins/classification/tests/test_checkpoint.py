"""What can be wrong with a model's folder: each is a ModelError that says what to do."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from fasttune.errors import ModelError
from fasttune.task import Source
from fasttune_classification.audio import AudioClassification
from fasttune_classification.image import ImageClassification
from fasttune_classification.text import TextClassification

LABELS = ["a", "b", "c"]


def refused(folder, match, task=TextClassification):
    with pytest.raises(ModelError, match=match) as caught:
        task().build(Source(str(folder)), LABELS)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (settings | changes).items() if v is not None}))


def test_folder_without_weights(bert):
    (bert / "model.safetensors").unlink()
    refused(bert, "has no weights; expected model.safetensors, found config.json")


def test_empty_folder(tmp_path):
    refused(tmp_path, r"has no config\.json; .* found an empty folder")


def test_pickled_weights(bert):
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(weights, bert / "pytorch_model.bin")
    refused(bert, r"only as pytorch_model\.bin, .* Convert it to safetensors")


def test_adapter(bert):
    (bert / "adapter_config.json").write_text("{}")
    refused(bert, "is an adapter")


def test_unknown_model_type(bert):
    edit(bert / "config.json", model_type="bertt")
    refused(bert, "of model_type 'bertt', can't be loaded")


def test_no_model_type(bert):
    edit(bert / "config.json", model_type=None, architectures=None)
    refused(bert, "states no model_type")


def test_broken_config(bert):
    (bert / "config.json").write_text('{"model_type": "bert",')
    refused(bert, r"config\.json is not valid JSON")


def test_config_of_wrong_types(bert):
    edit(bert / "config.json", hidden_size="many")
    refused(bert, "expected int, got str")


def test_config_that_makes_no_model(bert):
    edit(bert / "config.json", num_attention_heads=5)
    refused(bert, r"is not a multiple of the number of attention")


def test_no_such_model(tmp_path):
    refused(tmp_path / "nowhere", "is no local folder, and the hub can't serve it")


def test_file_instead_of_folder(bert):
    refused(bert / "config.json", "is a file; name the folder")


def test_cut_weights(bert):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(bert, "its weights can't be loaded")


def test_weights_of_another_family(bert):
    config = hf.DistilBertConfig(vocab_size=16, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    hf.DistilBertModel(config).save_pretrained(bert / "other")
    (bert / "other" / "model.safetensors").replace(bert / "model.safetensors")
    refused(bert, r"don't fit its configuration \(bert\): \d+ of the backbone's \d+ tensors are not in")


def test_weights_that_lack_one_layer(bert):
    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output.dense" not in name}
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    refused(bert, r"4 of the backbone's .* such as bert\.encoder\.layer\.1\.output\.dense\.bias")


def test_weights_of_another_size(bert):
    edit(bert / "config.json", intermediate_size=64)
    refused(bert, "has another shape, and 5 more differ")


def test_missing_tokenizer(bert):
    for path in bert.glob("tokenizer*"):
        path.unlink()
    refused(bert, "has no tokenizer; expected tokenizer.json")


def test_broken_tokenizer(bert):
    (bert / "tokenizer.json").write_text("{}")
    refused(bert, "its tokenizer can't be loaded")


def test_other_family(bert, tmp_path):
    refused(
        bert, "of type 'bert', .* can't use for image-classification.*text-classification", ImageClassification
    )
    refused(bert, "can't use for audio-classification", AudioClassification)
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    hf.ViTModel(config).save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", "of type 'vit', .* do: image-classification")


def test_missing_image_processor(tmp_path):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    hf.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    refused(tmp_path / "resnet", r"its image processor \(preprocessor_config\.json\)", ImageClassification)


def test_missing_feature_extractor(tmp_path):
    config = hf.ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    hf.ASTModel(config).save_pretrained(tmp_path / "ast")
    refused(tmp_path / "ast", "has no feature extractor", AudioClassification)


@pytest.mark.skipif(hf.utils.is_timm_available(), reason="timm is installed")
@pytest.mark.parametrize(
    "settings", [{"model_type": "timm_wrapper", "architecture": "vgg11"}, {"architecture": "vgg11"}]
)
def test_timm_model_without_timm(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_classes": 2, "num_features": 8}))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, "is a timm model: install timm", ImageClassification)


def test_remote_code_is_not_run(bert):
    edit(bert / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (bert / "mine.py").write_text("raise SystemExit('ran')")
    refused(bert, "'mine', can't be loaded")
