"""Teachers: pretrained encoders from a local folder or the user's hub cache, as our own networks.

`transformers` reads configuration, weights and tokenizer; nothing is downloaded. From then on the
teacher is a `nas.search_spaces.bert` network, whose outputs are tested to be those of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nas import checkpoint
from nas.data.text import Wrapping
from nas.errors import NasctlError, UsageError
from nas.search_spaces.bert import Arch, Bert, Frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: model types of the library whose weights are read, with the names of people's models of them
FAMILIES = {"bert": "BERT, MiniLM, TinyBERT and sentence encoders made of them"}

#: ours -> the library's, of one layer
LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.expand": "intermediate.dense",
    "mlp.shrink": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder in eval mode, and what turns text into its tokens."""

    net: Bert
    tokenizer: PreTrainedTokenizerBase

    @property
    def fingerprint(self) -> str:
        return checkpoint.digest(self.net)

    @property
    def wrapping(self) -> Wrapping:
        return Wrapping(self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of the tokens of each text, nothing added."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, verbose=False
        )["input_ids"]
        return found


def load(name: str) -> Teacher:
    """The teacher in the folder `name`, or of that name in the hub cache.

    Raises NasctlError for an absent library, model or tokenizer and for another family.
    """
    library = _library()
    where = f"--teacher {name}"
    config = _read(library.AutoConfig, name, "configuration")
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"a teacher of the family '{config.model_type}'",
            where=where,
            allowed=(f"{family} ({made})" for family, made in FAMILIES.items()),
        )
    frame, arch = _sizes(config, where)
    source = _read(library.AutoModel, name, "weights")
    tokenizer = _read(library.AutoTokenizer, name, "tokenizer")
    _check(tokenizer, frame, where)
    return Teacher(converted(source.state_dict(), frame, arch), tokenizer)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise NasctlError(
            "reading a teacher needs the library transformers",
            where="--teacher",
            next="Install it: pip install 'nasctl[text]'.",
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _read(reader: Any, name: str, what: str) -> Any:
    """One part of a model, from disk alone."""
    try:
        return reader.from_pretrained(name, local_files_only=True)
    # what the library raises
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        there = "in this folder" if Path(name).is_dir() else "no such folder, nor in the hub cache"
        first = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise NasctlError(
            f"no {what} to read: {there} ({first})",
            where=f"--teacher {name}",
            next="Nothing is downloaded: fetch the model first (hf download NAME).",
        ) from error


def _check(tokenizer: PreTrainedTokenizerBase, frame: Frame, where: str) -> None:
    """Raises NasctlError for a tokenizer that is none: where its files are absent the library makes
    one that knows no word, and says nothing."""
    words = len(tokenizer) - len(tokenizer.all_special_tokens)
    if words <= 0:
        raise NasctlError(
            "no tokenizer to read",
            where=where,
            next="Its folder needs tokenizer.json, or vocab.txt, beside the weights.",
        )
    if len(tokenizer) > frame.vocabulary:
        raise NasctlError(
            f"the tokenizer knows {len(tokenizer)} tokens, the network {frame.vocabulary}",
            where=where,
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise NasctlError("the tokenizer has no [CLS] or [SEP]", where=where)


def _sizes(config: Any, where: str) -> tuple[Frame, Arch]:
    """Raises UsageError for what our networks cannot express."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise UsageError(f"{heads} heads do not divide {hidden} channels", where=where)
    if config.hidden_act != "gelu":
        raise UsageError(f"activation {config.hidden_act}", where=where, allowed="gelu")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise UsageError(f"{positions} positions", where=where, allowed="absolute")
    frame = Frame(
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        head=hidden // heads,
        padding=config.pad_token_id or 0,
        eps=config.layer_norm_eps,
    )
    layers = tuple(range(config.num_hidden_layers))
    return frame, Arch(layers, hidden, heads, config.intermediate_size)


def converted(weights: dict[str, Tensor], frame: Frame, arch: Arch) -> Bert:
    """A network with the library's weights. The vector of segment 0 joins every position's; the
    head, which the library's encoder lacks, begins at zero."""
    net = Bert(arch, frame, classes=2)
    before = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "places.weight": weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": weights["embeddings.LayerNorm.weight"],
        "norm.bias": weights["embeddings.LayerNorm.bias"],
        "head.weight": torch.zeros(2, arch.hidden),
        "head.bias": torch.zeros(2),
    }
    for number in arch.layers:
        for ours, theirs in LAYER.items():
            for part in ("weight", "bias"):
                source = weights[f"encoder.layer.{number}.{theirs}.{part}"]
                before[f"layers.{number}.{ours}.{part}"] = source
    net.load_state_dict(before)
    return net.eval().requires_grad_(False)
