"""A model that no library knows: word lengths to tags, saved as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_SHAPE = "parity.json"
_WEIGHTS = "weights.safetensors"


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.linear(x)))


class ParityModel(nn.Module):
    """lengths [N, words] -> logits [N, words, 2]."""

    def __init__(self, width: int = 16, blocks: int = 2):
        super().__init__()
        self.config = {"width": width, "blocks": blocks}  # a plain dictionary, unlike transformers' own
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 2)

    def forward(self, lengths: Tensor) -> Tensor:
        x = self.embedding(lengths)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / _WEIGHTS)
        (folder / _SHAPE).write_text(json.dumps(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path, random_weights: bool = False) -> ParityModel:
        model = cls(**json.loads((Path(folder) / _SHAPE).read_text()))
        if not random_weights:
            model.load_state_dict(load_file(Path(folder) / _WEIGHTS))
        return model
