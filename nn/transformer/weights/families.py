"""How published Transformers name and shape their weights, and the fields of their config.json.

A layout is data, so that one table serves reading and writing. Names are those of the project's modules on the left
and those of the published files on the right, without `.weight` and `.bias`, which agree.

Source: the models of transformers 5.23; for GPT2_ML https://github.com/imcaspar/gpt2-ml, its conversion
https://github.com/ghosthamlet/gpt2-ml-torch, and bert4torch 0.6.2, which reads the same names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import TransformerConfig
from .layouts import Layout, Table

# Blocks

_BERT_BLOCK = "encoder.layer.{block}."
_BERT_BODY: Table = {
    "embedding.tokens": "embeddings.word_embeddings",
    "embedding.positions": "embeddings.position_embeddings",
    "embedding.segments": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
    "layers.blocks.*.attention.projection": (
        _BERT_BLOCK + "attention.self.query",
        _BERT_BLOCK + "attention.self.key",
        _BERT_BLOCK + "attention.self.value",
    ),
    "layers.blocks.*.attention.output": _BERT_BLOCK + "attention.output.dense",
    "layers.blocks.*.attention_norm": _BERT_BLOCK + "attention.output.LayerNorm",
    "layers.blocks.*.feedforward.inner": _BERT_BLOCK + "intermediate.dense",
    "layers.blocks.*.feedforward.outer": _BERT_BLOCK + "output.dense",
    "layers.blocks.*.feedforward_norm": _BERT_BLOCK + "output.LayerNorm",
}
_ALBERT_BLOCK = "encoder.albert_layer_groups.{group}.albert_layers.{inner}."
_ALBERT_BODY: Table = {
    **{name: theirs for name, theirs in _BERT_BODY.items() if name.startswith("embedding.")},
    "embedding.projection": "encoder.embedding_hidden_mapping_in",
    "layers.blocks.*.attention.projection": (
        _ALBERT_BLOCK + "attention.query",
        _ALBERT_BLOCK + "attention.key",
        _ALBERT_BLOCK + "attention.value",
    ),
    "layers.blocks.*.attention.output": _ALBERT_BLOCK + "attention.dense",
    "layers.blocks.*.attention_norm": _ALBERT_BLOCK + "attention.LayerNorm",
    "layers.blocks.*.feedforward.inner": _ALBERT_BLOCK + "ffn",
    "layers.blocks.*.feedforward.outer": _ALBERT_BLOCK + "ffn_output",
    "layers.blocks.*.feedforward_norm": _ALBERT_BLOCK + "full_layer_layer_norm",
}
_ROFORMER_BODY: Table = {
    **{name: theirs for name, theirs in _BERT_BODY.items() if name != "embedding.positions"},
    "embedding.projection": "embeddings_project",
}
_GPT2_LINEAR: Table = {
    "layers.blocks.*.attention.projection": "h.{block}.attn.c_attn",
    "layers.blocks.*.attention.output": "h.{block}.attn.c_proj",
    "layers.blocks.*.feedforward.inner": "h.{block}.mlp.c_fc",
    "layers.blocks.*.feedforward.outer": "h.{block}.mlp.c_proj",
}
_GPT2_TABLES: Table = {"embedding.tokens": "wte", "embedding.positions": "wpe"}

# Heads

_PREDICTIONS = {
    "masked_token_head.layer": "cls.predictions.transform.dense",
    "masked_token_head.norm": "cls.predictions.transform.LayerNorm",
    "masked_token_head": "cls.predictions",
}


def _tied(decoder: str, bias: str) -> dict[str, str]:
    return {f"{decoder}.weight": "embeddings.word_embeddings.weight", f"{decoder}.bias": f"{bias}.bias"}


# Fields of config.json

_BERT_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "feedforward_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "max_length": "max_position_embeddings",
    "num_segments": "type_vocab_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
}
_BERT_DEFAULTS = {
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "is_decoder": False,
}
_BERT_ALLOWED = {
    "position_embedding_type": ("absolute",),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "feedforward_dim": "n_inner",
    "dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "max_length": "n_positions",
    "activation": "activation_function",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
}
_GPT2_DEFAULTS = {
    "n_inner": None,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
}
_GPT2_ALLOWED = {
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
# What the networks are

_COMMON: dict[str, tuple[Any, ...]] = {
    "num_decoder_layers": (0,),
    "attention": ("softmax",),
    "attention_scale": ("sqrt",),
    "talking_heads": ("none",),
    "attention_bias": (True,),
    "output_projection": (True,),
    "gated": (False,),
    "feedforward_bias": (True,),
    "feedforward_dropout": (0.0,),
    "norm_kind": ("layer",),
    "first_position": (0,),
    "sharing": ("none",),
    "mask": ("full", "causal"),
}
_ENCODER: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "positions": ("learned",),
    "norm": ("post",),
    "embedding_norm": (True,),
}
_DECODER: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "positions": ("learned",),
    "mask": ("causal",),
    "num_segments": (0,),
}
_HEAD_WIDTHS = (("num_kv_heads", "num_heads"), ("key_size", "head_size"))


def _roformer_positions(config: TransformerConfig) -> Tensor:
    """The table of sines, then cosines, that RoFormer's files carry."""
    places = torch.arange(config.max_length, dtype=torch.float64)
    planes = torch.arange(0, config.key_size, 2, dtype=torch.float64)
    angles = places[:, None] * 10000.0 ** (-planes / config.key_size)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def _no_mapping(part: Callable[[int], Tensor]) -> Callable[[TransformerConfig], Tensor | None]:
    """ALBERT's files have a map from embeddings to blocks also where their widths agree: the identity here."""
    return lambda config: part(config.dim) if config.embedding_dim == config.dim else None


BERT = Layout(
    name="bert",
    prefix="bert.",
    body=_BERT_BODY,
    heads={
        "pooler": {"pooler.layer": "pooler.dense"},
        "sentence": {"sentence_head": "cls.seq_relationship"},
        "masked_lm": _PREDICTIONS,
    },
    fields={**_BERT_FIELDS, "mask": "is_decoder"},
    defaults=_BERT_DEFAULTS,
    allowed=_BERT_ALLOWED,
    fixed=_ENCODER,
    positive=("num_segments",),
    equal=(*_HEAD_WIDTHS, ("embedding_dim", "dim")),
    classes={
        "BertModel": ("pooler",),
        "BertForMaskedLM": ("masked_lm",),
        "BertForNextSentencePrediction": ("pooler", "sentence"),
        "BertForPreTraining": ("pooler", "sentence", "masked_lm"),
    },
    causal_classes={"BertForMaskedLM": "BertLMHeadModel"},
    twins=_tied("cls.predictions.decoder", "cls.predictions"),
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
)
ROBERTA = Layout(
    name="roberta",
    prefix="roberta.",
    body=_BERT_BODY,
    heads={
        "pooler": {"pooler.layer": "pooler.dense"},
        "masked_lm": {
            "masked_token_head.layer": "lm_head.dense",
            "masked_token_head.norm": "lm_head.layer_norm",
            "masked_token_head": "lm_head",
        },
    },
    fields={**_BERT_FIELDS, "mask": "is_decoder", "first_position": "pad_token_id"},
    defaults={**_BERT_DEFAULTS, "pad_token_id": 1},
    allowed={**_BERT_ALLOWED, "hidden_act": ("gelu",)},  # its masked-LM head has GELU whatever the blocks have
    fixed={name: values for name, values in _ENCODER.items() if name != "first_position"} | {"activation": ("gelu",)},
    positive=("num_segments", "first_position"),
    equal=BERT.equal,
    classes={
        "RobertaModel": ("pooler",),
        "RobertaForMaskedLM": ("masked_lm",),
    },
    causal_classes={"RobertaForMaskedLM": "RobertaForCausalLM"},
    twins=_tied("lm_head.decoder", "lm_head"),
    buffers=BERT.buffers,
)
ALBERT = Layout(
    name="albert",
    prefix="albert.",
    body=_ALBERT_BODY,
    heads={
        "pooler": {"pooler.layer": "pooler"},
        "sentence": {"sentence_head": "sop_classifier.classifier"},
        "masked_lm": {
            "masked_token_head.layer": "predictions.dense",
            "masked_token_head.norm": "predictions.LayerNorm",
            "masked_token_head": "predictions",
        },
    },
    fields={
        **_BERT_FIELDS,
        "embedding_dim": "embedding_size",
        "num_groups": "num_hidden_groups",
        "group_size": "inner_group_num",
    },
    defaults={
        **_BERT_DEFAULTS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu_new",
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    },
    allowed={**_BERT_ALLOWED, "is_decoder": (False,)},
    fixed={**_ENCODER, "mask": ("full",), "sharing": ("all", "none")},
    positive=("num_segments",),
    equal=_HEAD_WIDTHS,
    classes={
        "AlbertModel": ("pooler",),
        "AlbertForMaskedLM": ("masked_lm",),
        "AlbertForPreTraining": ("pooler", "sentence", "masked_lm"),
    },
    twins=_tied("predictions.decoder", "predictions"),
    computed={
        "encoder.embedding_hidden_mapping_in.weight": _no_mapping(torch.eye),
        "encoder.embedding_hidden_mapping_in.bias": _no_mapping(torch.zeros),
    },
    buffers=BERT.buffers,
)
ROFORMER = Layout(
    name="roformer",
    prefix="roformer.",
    body=_ROFORMER_BODY,
    heads={"masked_lm": _PREDICTIONS},
    fields={**_BERT_FIELDS, "mask": "is_decoder", "embedding_dim": "embedding_size"},
    defaults={**_BERT_DEFAULTS, "max_position_embeddings": 1536, "embedding_size": None},
    allowed={**_BERT_ALLOWED, "rotary_value": (False,)},
    fixed={**_ENCODER, "positions": ("rope",), "rope_base": (10000.0,)},
    positive=("num_segments",),
    equal=_HEAD_WIDTHS,
    classes={"RoFormerModel": (), "RoFormerForMaskedLM": ("masked_lm",)},
    causal_classes={"RoFormerForMaskedLM": "RoFormerForCausalLM"},
    twins=BERT.twins,
    computed={"encoder.embed_positions.weight": _roformer_positions},
    buffers=BERT.buffers,
)
GPT2 = Layout(
    name="gpt2",
    prefix="transformer.",
    body={
        **_GPT2_TABLES,
        **_GPT2_LINEAR,
        "layers.blocks.*.attention_norm": "h.{block}.ln_1",
        "layers.blocks.*.feedforward_norm": "h.{block}.ln_2",
        "layers.norm": "ln_f",
    },
    heads={"lm": {}},
    fields=_GPT2_FIELDS,
    defaults=_GPT2_DEFAULTS,
    allowed=_GPT2_ALLOWED,
    fixed={**_DECODER, "norm": ("pre",), "embedding_norm": (False,)},
    equal=BERT.equal,
    classes={"GPT2Model": (), "GPT2LMHeadModel": ("lm",)},
    transposed=tuple(_GPT2_LINEAR),
    twins={"lm_head.weight": "wte.weight"},
    buffers=("h.*.attn.bias", "h.*.attn.masked_bias"),
)
GPT2_ML = Layout(
    name="gpt2_ml",
    prefix="transformer.",
    body={
        **_GPT2_TABLES,
        "embedding.norm": "emb_norm",
        **_GPT2_LINEAR,
        "layers.blocks.*.feedforward_norm": "h.{block}.ln_1",
        "layers.blocks.*.output_norm": "h.{block}.ln_2",
    },
    heads={"lm": {}},
    fields=_GPT2_FIELDS,
    defaults={**_GPT2_DEFAULTS, "activation_function": "gelu"},
    allowed=_GPT2_ALLOWED,
    fixed={**_DECODER, "norm": ("gpt2_ml",), "embedding_norm": (True,)},
    equal=BERT.equal,
    transposed=GPT2.transposed,
    twins=GPT2.twins,
    buffers=GPT2.buffers,
)
LAYOUTS = {layout.name: layout for layout in (BERT, ROBERTA, ALBERT, ROFORMER, GPT2, GPT2_ML)}
