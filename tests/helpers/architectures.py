"""Tiny models of transformers, built from configurations without a download, with batches and losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

N, WORDS, LENGTH, CLASSES = 4, 13, 6, 3
Batch = dict[str, Tensor]

MASK = (torch.arange(LENGTH) < torch.tensor([6, 4, 3, 5])[:, None]).long()
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_labels": CLASSES,
    **SPECIAL,
}
GPT = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **SPECIAL}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 4}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
IMAGE = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 2,
    "num_labels": CLASSES,
}
STAGES = {"num_channels": 2, "hidden_sizes": [4, 6], "depths": [1, 1], "num_labels": CLASSES}
SOUND = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": (4, 4),
    "conv_kernel": (4, 3),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 6,
    "vocab_size": WORDS,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}


def words(seed: int = 1) -> Tensor:
    return torch.randint(3, WORDS, (N, LENGTH), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(N, *shape, generator=generator, dtype=torch.float64)


def text(**more: Tensor) -> Batch:
    return {"input_ids": words(), "attention_mask": MASK, **more}


def causal() -> Batch:
    return text(labels=words().masked_fill(MASK == 0, -100))


def masked() -> Batch:
    hidden = (words(2) < 6) & (MASK == 1)
    hidden[:, 1] = True
    batch = text(labels=words().masked_fill(~hidden, -100))
    return {**batch, "input_ids": words().masked_fill(hidden, 3)}


def unpadded() -> Batch:
    return {**masked(), "attention_mask": torch.ones_like(MASK)}


def tokens() -> Batch:
    return text(labels=(words(3) % CLASSES).masked_fill(MASK == 0, -100))


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 0])


def translated() -> Batch:
    return text(labels=words(3).masked_fill(MASK.flip(0) == 0, -100))


def images(size: int = 8) -> Batch:
    return {"pixel_values": normal(2, size, size), "labels": classes()}


def segments() -> Batch:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(CLASSES, (N, 16, 16), generator=generator)
    labels[0, :, :5], labels[2, 3:] = 255, 255
    return {"pixel_values": normal(2, 16, 16), "labels": labels}


def sounds() -> Batch:
    return {"input_values": normal(60), "labels": classes()}


def spectra() -> Batch:
    return {
        "input_features": normal(4, 12),
        "labels": words(3).masked_fill(MASK == 0, -100),
    }


def answers() -> Batch:
    """Return answers to four questions; that of the last lies behind the text, and is ignored."""
    return text(
        start_positions=torch.tensor([0, 2, 1, 9]), end_positions=torch.tensor([1, 3, 2, 9])
    )


def counted(labels: Tensor) -> Tensor:
    return (labels != -100).flatten(1).sum(1)


def of_next_words(batch: Batch) -> Tensor:
    return counted(batch["labels"][:, 1:])


def of_labels(batch: Batch) -> Tensor:
    return counted(batch["labels"])


def of_pixels(batch: Batch) -> Tensor:
    return (batch["labels"] != 255).flatten(1).sum(1)


def of_answers(batch: Batch) -> Tensor:
    return (batch["start_positions"] < LENGTH).long()


def equal(batch: Batch) -> Tensor:
    return torch.ones(N)


class Architecture(NamedTuple):
    """A model of transformers with a batch, whose loss divides by a sum of the samples' weights."""

    model: str
    config: str
    options: dict[str, Any]
    batch: Callable[[], Batch]
    weights: Callable[[Batch], Tensor]


def _of(model: str, batch: Any, weights: Any, config: str = "", **options: Any) -> Architecture:
    family = next(model.removesuffix(task) for task in TASKS if model.endswith(task))
    return Architecture(model, f"{config or family}Config", options, batch, weights)


TASKS = (
    "LMHeadModel",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForImageClassification",
    "ForSemanticSegmentation",
)


def _causal(model: str, **options: Any) -> Architecture:
    return _of(f"{model}ForCausalLM", causal, of_next_words, **options)


def _masked(model: str, batch: Any = masked, **options: Any) -> Architecture:
    return _of(f"{model}ForMaskedLM", batch, of_labels, **{**TEXT, **options})


def _images(model: str, size: int = 8, **options: Any) -> Architecture:
    return _of(f"{model}ForImageClassification", lambda: images(size), equal, **options)


def _sequences(model: str, labels: Tensor, **options: Any) -> Architecture:
    return _of(f"{model}ForSequenceClassification", lambda: text(labels=labels), equal, **options)


def _translated(model: str, **options: Any) -> Architecture:
    return _of(f"{model}ForConditionalGeneration", translated, of_labels, **options)


ARCHITECTURES = {
    "GPT-2": _of("GPT2LMHeadModel", causal, of_next_words, **GPT),
    "LLaMA": _causal("Llama", **GROUPED),
    "Mistral": _causal("Mistral", **GROUPED, sliding_window=3),
    "Gemma": _causal("Gemma", **GROUPED),
    "Qwen2": _causal("Qwen2", **TEXT, num_key_value_heads=1),
    "Phi": _causal("Phi", **TEXT, partial_rotary_factor=0.5),
    "GPT-NeoX": _causal("GPTNeoX", **TEXT),
    "GPT-J": _causal("GPTJ", **GPT, rotary_dim=2),
    "OPT": _causal(
        "OPT",
        **{k: v for k, v in TEXT.items() if k != "intermediate_size"},
        ffn_dim=12,
        word_embed_proj_dim=8,
    ),
    "BLOOM": _causal("Bloom", vocab_size=WORDS, hidden_size=8, n_layer=1, n_head=2, **SPECIAL),
    "Falcon": _causal("Falcon", **TEXT),
    "Mixtral": _causal(
        "Mixtral",
        **TEXT,
        num_key_value_heads=1,
        num_local_experts=3,
        experts_implementation="eager",  # torch's grouped products are of single precision
    ),
    "Mamba": _causal(
        "Mamba",
        vocab_size=WORDS,
        hidden_size=8,
        state_size=3,
        num_hidden_layers=1,
        time_step_rank=2,
        **SPECIAL,
    ),
    "T5": _translated(
        "T5",
        vocab_size=WORDS,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        decoder_start_token_id=0,
    ),
    "BART": _translated("Bart", **SEQ2SEQ),
    "mBART": _translated("MBart", **SEQ2SEQ),
    "Pegasus": _translated("Pegasus", **SEQ2SEQ),
    "Whisper": _of(
        "WhisperForConditionalGeneration",
        spectra,
        of_labels,
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        num_mel_bins=4,
        max_source_positions=6,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "BERT": _masked("Bert"),
    "RoBERTa": _sequences("Roberta", classes(), **TEXT),
    "ALBERT": _masked("Albert", embedding_size=4),
    "DistilBERT": _of(
        "DistilBertForTokenClassification",
        tokens,
        of_labels,
        vocab_size=WORDS,
        dim=8,
        n_layers=1,
        n_heads=2,
        hidden_dim=12,
        max_position_embeddings=16,
        num_labels=CLASSES,
        pad_token_id=0,
    ),
    "ELECTRA": _masked("Electra", embedding_size=4),
    "DeBERTa": _of(
        "DebertaV2ForTokenClassification",
        tokens,
        of_labels,
        **TEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    ),
    "XLNet": _of(
        "XLNetForTokenClassification",
        tokens,
        of_labels,
        vocab_size=WORDS,
        d_model=8,
        n_layer=1,
        n_head=2,
        d_inner=12,
        num_labels=CLASSES,
        **SPECIAL,
    ),
    "MPNet": _masked("MPNet"),
    # With padding its own gradient is NaN in double precision: a mask of -1.8e308 in a single one.
    "Longformer": _masked("Longformer", unpadded, attention_window=8, sep_token_id=2),
    "BigBird": _masked("BigBird", attention_type="original_full", sep_token_id=2),
    "ViT": _images("ViT", **IMAGE),
    "DeiT": _images("DeiT", **IMAGE),
    "BEiT": _images("Beit", **IMAGE, vocab_size=5),
    "Swin": _images(
        "Swin",
        image_size=8,
        patch_size=2,
        num_channels=2,
        embed_dim=4,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=2,
        num_labels=CLASSES,
    ),
    "ConvNeXt": _images(
        "ConvNext", **STAGES, patch_size=2, num_stages=2, layer_scale_init_value=0.5
    ),
    "ResNet": _images("ResNet", **STAGES, embedding_size=4, layer_type="basic"),
    "RegNet": _images("RegNet", **STAGES, embedding_size=4, groups_width=2),
    "MobileViT": _images(
        "MobileViT",
        16,
        num_channels=2,
        image_size=16,
        patch_size=1,
        hidden_sizes=[4, 4, 4],
        neck_hidden_sizes=[2, 2, 2, 2, 2, 2, 4],
        num_attention_heads=1,
        mlp_ratio=1.0,
        expand_ratio=1.0,
        layer_norm_eps=0.1,  # normalised features of 1e-6 would have a curvature of 1e24
        num_labels=CLASSES,
    ),
    "SegFormer": _of(
        "SegformerForSemanticSegmentation",
        segments,
        of_pixels,
        **STAGES,
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[1, 1],
        decoder_hidden_size=6,
    ),
    "Wav2Vec2": _of("Wav2Vec2ForSequenceClassification", sounds, equal, **SOUND),
    "HuBERT": _of("HubertForSequenceClassification", sounds, equal, **SOUND),
    # Further losses.
    "BERT, token classes": _of("BertForTokenClassification", tokens, of_labels, **TEXT),
    "BERT, answers": _of(
        "BertForQuestionAnswering", answers, of_answers, **{**TEXT, "num_labels": 2}
    ),
    "BERT, regression": _sequences("Bert", normal(), **{**TEXT, "num_labels": 1}),
    "BERT, several labels": _sequences(
        "Bert",
        (normal(CLASSES) > 0).double(),
        **TEXT,
        problem_type="multi_label_classification",
    ),
}


def built(name: str) -> tuple[nn.Module, Batch]:
    """Return a model in double precision, and its batch."""
    import transformers

    found = ARCHITECTURES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, found.config)(**found.options)
        model: nn.Module = getattr(transformers, found.model)(config).double()
    for p in model.parameters():
        if p.dim() > 1:  # initialisations of 0.02 leave curvature of rounding's size
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model, found.batch()


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss
