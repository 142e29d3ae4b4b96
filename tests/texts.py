"""A tiny teacher as the library writes them, and text that it can read."""

from __future__ import annotations

import torch

TEXT = "the cat sat on a mat and dog ran far away good bad film is was very not so dull"
WORDS = TEXT.split()


def save_teacher(folder, *, layers=4, hidden=64, heads=4, seed=0):
    """A random BERT with a tokenizer of whole words; returns the library's model."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, **{f"{name}_token": token for name, token in special.items()}
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    return model


def prose(n, seed=0):
    """`n` lines of words."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS), (n, 9), generator=generator).tolist()
    return "\n".join(" ".join(WORDS[at] for at in row) for row in rows) + "\n"
