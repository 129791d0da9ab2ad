"""The Transformer against the models of transformers: scores, hidden states, gradients, on the same random weights."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.transformer import Transformer, TransformerConfig, from_pretrained, to_pretrained
from kexue.nn.transformer.weights import LAYOUTS

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
GPT2_SIZES = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20, "n_inner": 40}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}


def case(model: str, config: str, attention: str = "eager", **values: Any) -> Any:
    sizes = GPT2_SIZES | GPT2_OFF if config == "GPT2Config" else SIZES | OFF
    extra = ",".join(f"{name}={value}" for name, value in values.items())
    return pytest.param(model, config, attention, {**sizes, **values}, id=f"{model}-{attention}{extra and '-'}{extra}")


CASES = [
    *(case("BertForPreTraining", "BertConfig", attention) for attention in ("eager", "sdpa")),
    case("BertForPreTraining", "BertConfig", hidden_act="gelu_new"),
    case("BertForMaskedLM", "BertConfig", hidden_act="relu", layer_norm_eps=1e-3),
    case("BertLMHeadModel", "BertConfig", is_decoder=True, use_cache=False),
    case("BertModel", "BertConfig", hidden_act="silu", type_vocab_size=3),
    *(case("RobertaForMaskedLM", "RobertaConfig", attention) for attention in ("eager", "sdpa")),
    case("RobertaModel", "RobertaConfig", pad_token_id=0, type_vocab_size=1),
    *(
        case("AlbertForPreTraining", "AlbertConfig", "sdpa", embedding_size=8, num_hidden_groups=g, inner_group_num=i)
        for g, i in ((1, 1), (2, 1), (1, 2))
    ),
    case("AlbertForPreTraining", "AlbertConfig", embedding_size=8, num_hidden_groups=2, inner_group_num=2),
    case("RoFormerForMaskedLM", "RoFormerConfig"),
    case("RoFormerForMaskedLM", "RoFormerConfig", embedding_size=8, hidden_act="gelu_pytorch_tanh"),
    case("RoFormerForCausalLM", "RoFormerConfig", is_decoder=True, use_cache=False),
    *(case("GPT2LMHeadModel", "GPT2Config", attention) for attention in ("eager", "sdpa")),
    case("GPT2LMHeadModel", "GPT2Config", reorder_and_upcast_attn=True),
]


def build(model: str, config: str, attention: str, values: dict[str, Any]) -> nn.Module:
    """A model whose weights are all far from 0 and 1, in training mode without dropout."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(**values, attn_implementation=attention)
    if hasattr(made, "classifier_dropout_prob"):
        made.classifier_dropout_prob = 0.0
    net = getattr(transformers, model)(made).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def batch(padding: str, segments: bool = True) -> dict[str, Tensor]:
    """Ids without special tokens, with padding (id 0, or 1 for RoBERTa) on one side of the second row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.long)
    if padding != "none":
        gone = slice(6, None) if padding == "right" else slice(None, 3)
        mask[1, gone] = 0
    kinds = torch.randint(2, (3, 9), generator=generator) if segments else torch.zeros_like(ids)
    return {"ids": ids, "mask": mask, "segments": kinds}


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()


@dataclass
class Outputs:
    states: list[Tensor]
    scores: dict[str, Tensor]

    def loss(self, real: Tensor) -> Tensor:
        """A number that everything at real places has its own weight in."""
        total = torch.zeros(())
        for tensor in [*self.scores.values(), self.states[-1]]:
            weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.shape[-1]))
            total = total + ((weights * tensor)[real] if tensor.dim() == 3 else weights * tensor).sum()
        return total


def their_outputs(net: Any, inputs: dict[str, Tensor]) -> Outputs:
    ids, keys = inputs["ids"], inputs["mask"]
    kind = net.config.model_type
    if kind == "roberta":
        ids = ids.masked_fill(keys == 0, net.config.pad_token_id)
    arguments = {} if kind == "gpt2" else {"token_type_ids": inputs["segments"]}
    found = net(ids, attention_mask=keys, output_hidden_states=True, **arguments)
    names = {
        "logits": "tokens",
        "prediction_logits": "tokens",
        "seq_relationship_logits": "sentence",
        "sop_logits": "sentence",
        "pooler_output": "pooled",
    }
    return Outputs(list(found.hidden_states), {ours: found[name] for name, ours in names.items() if name in found})


def our_outputs(net: Transformer, inputs: dict[str, Tensor]) -> Outputs:
    ids = inputs["ids"]
    if net.config.first_position:
        ids = ids.masked_fill(inputs["mask"] == 0, net.config.first_position - 1)
    states = net.hidden_states(ids, inputs["mask"], inputs["segments"])
    scores = {}
    if {"masked_lm", "lm"} & set(net.config.heads):
        scores["tokens"] = net.logits(states[-1])
    if "sentence" in net.config.heads:
        scores["sentence"] = net.sentence_logits(states[-1])
    elif "pooler" in net.config.heads:
        scores["pooled"] = net.pooled(states[-1])
    return Outputs(states, scores)


def gradients(ours: Transformer, theirs: nn.Module) -> dict[str, float]:
    """Error of the gradient of each parameter of ours against those that it was made of."""
    layout, other = LAYOUTS[theirs.config.model_type], dict(theirs.named_parameters())
    errors = {}
    for name, parameter in ours.named_parameters():
        address = layout.address(name, range(ours.config.depth), ours.config.group_size)
        names = (n if n in other else layout.prefixed(n, address.head) for n in address.names)
        grads = [other[n].grad for n in names]
        if parameter.grad is None:
            assert grads == [None]
        else:
            errors[name] = error(parameter.grad, torch.cat([g.T if address.transposed else g for g in grads]))
    return errors


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("model", "config", "attention", "values"), CASES)
def test_parity(model: str, config: str, attention: str, values: dict[str, Any], padding: str, tmp_path: Path) -> None:
    theirs = build(model, config, attention, values)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    inputs = batch(padding, segments=theirs.config.model_type not in ("roberta", "gpt2"))
    real = inputs["mask"].bool()
    found, expected = our_outputs(ours, inputs), their_outputs(theirs, inputs)
    if padding == "left":  # the first token, which is pooled, is padding
        for outputs in (found, expected):
            outputs.scores = {name: scores for name, scores in outputs.scores.items() if name == "tokens"}
    assert len(found.states) == len(expected.states)
    assert max(error(a[real], b[real]) for a, b in zip(found.states, expected.states, strict=True)) < 1e-5
    assert found.scores.keys() == expected.scores.keys()
    for name, scores in found.scores.items():
        at = real if name == "tokens" else slice(None)
        assert error(scores[at], expected.scores[name][at]) < 1e-5
    for outputs in (found, expected):
        outputs.loss(real).backward()
    errors = gradients(ours, theirs)
    assert len(errors) > 20
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("model", "config", "attention", "values"), CASES)
def test_what_is_saved_opens_in_transformers(
    model: str, config: str, attention: str, values: dict[str, Any], tmp_path: Path
) -> None:
    theirs = build(model, config, attention, values).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    to_pretrained(ours, tmp_path / "ours")
    named = transformers.AutoConfig.from_pretrained(tmp_path / "ours").architectures
    assert named == [model]
    again, report = getattr(transformers, model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    inputs = batch("right", segments=theirs.config.model_type not in ("roberta", "gpt2"))
    found, expected = their_outputs(again.eval(), inputs), their_outputs(theirs, inputs)
    for name, scores in found.scores.items():
        assert error(scores, expected.scores[name]) < 1e-5
    other = from_pretrained(tmp_path / "ours")
    assert other.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


def test_double_precision_shows_that_the_rest_is_rounding(tmp_path: Path) -> None:
    theirs = build("BertForPreTraining", "BertConfig", "eager", SIZES | OFF).double()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, dtype=torch.float64)
    inputs = batch("right")
    found, expected = our_outputs(ours, inputs), their_outputs(theirs, inputs)
    assert max(error(a, b) for a, b in zip(found.states, expected.states, strict=True)) < 1e-13
    assert error(found.scores["tokens"], expected.scores["tokens"]) < 1e-13


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_cache_changes_nothing(kind: str, tmp_path: Path) -> None:
    values = {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", "eager", GPT2_SIZES | GPT2_OFF),
        "bert": ("BertLMHeadModel", "BertConfig", "eager", SIZES | OFF | {"is_decoder": True}),
    }
    theirs = build(*values[kind]).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = batch("none")["ids"]
    with torch.no_grad():
        expected = theirs(ids).logits
        cache = ours.new_cache()
        steps = [ours.logits(ours(part, cache=cache)) for part in ids.split((4, 1, 1, 3), dim=1)]
    assert error(torch.cat(steps, dim=1), expected) < 1e-5


@pytest.mark.parametrize(("model", "config", "attention", "values"), CASES)
def test_the_length_of_padding_changes_nothing(
    model: str, config: str, attention: str, values: dict[str, Any], tmp_path: Path
) -> None:
    build(model, config, attention, values).save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids = batch("none")["ids"]
    long, mask = F.pad(ids, (0, 5), value=1), F.pad(torch.ones_like(ids), (0, 5))
    assert error(ours(long, mask)[:, :9], ours(ids)) < 1e-5


def gpt2_ml_reference(state: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """Scores of the three-norm block, written plainly in the names and the precision of the file."""
    width = state["wte.weight"].shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def conv1d(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    length = ids.shape[1]
    hidden = norm(state["wte.weight"][ids] + state["wpe.weight"][:length], "emb_norm")
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    for layer in range(layers):
        parts = conv1d(hidden, f"h.{layer}.attn.c_attn").chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / (width // heads) ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        hidden = hidden + conv1d(mixed, f"h.{layer}.attn.c_proj")
        inner = F.gelu(conv1d(norm(hidden, f"h.{layer}.ln_1"), f"h.{layer}.mlp.c_fc"))
        hidden = norm(hidden + conv1d(inner, f"h.{layer}.mlp.c_proj"), f"h.{layer}.ln_2")
    return hidden @ state["wte.weight"].T


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_ml"])
def test_gpt2_ml_is_its_formula(kind: str, tmp_path: Path) -> None:
    """Published folders say "gpt2" in config.json; the names of their weights tell them apart."""
    torch.manual_seed(0)
    width, inner = 12, 20
    shapes = {
        "wte.weight": (30, width),
        "wpe.weight": (9, width),
        "emb_norm.weight": (width,),
        "emb_norm.bias": (width,),
    }
    for layer in range(2):
        for name, shape in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "ln_1": (width,),
            "ln_2": (width,),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[-1:]}
    state = {name: 0.5 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    extra = {"h.0.attn.bias": torch.ones(1, 1, 9, 9), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**state, **extra}, tmp_path / "model.safetensors")
    values = {"model_type": kind, "vocab_size": 30, "n_embd": width, "n_layer": 2, "n_head": 3, "n_positions": 9}
    values |= {"n_inner": inner, "activation_function": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours = from_pretrained(tmp_path, dtype=torch.float64)
    assert ours.config.norm == "gpt2_ml"
    ids = torch.randint(30, (2, 9))
    expected = gpt2_ml_reference(state, ids, heads=3)
    assert error(ours.logits(ours(ids)), expected) < 1e-13
    to_pretrained(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "gpt2_ml"
    again = from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert torch.equal(again(ids), ours(ids))


def count(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def albert(dim: int, layers: int, heads: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=30000,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        feedforward_dim=4 * dim,
        embedding_dim=128,
        num_segments=2,
        positions="learned",
        norm="post",
        activation="gelu_tanh",
        sharing="all",
        heads=("pooler",),
    )


@pytest.mark.parametrize(
    ("config", "encoder", "pretraining"),
    [
        (albert(768, 12, 12), 11_683_584, 11_813_810),
        (albert(1024, 24, 16), 17_683_968, 17_847_474),
        (albert(2048, 24, 16), 58_724_864, 59_021_490),
        (albert(4096, 12, 64), 222_595_584, 223_158_450),
    ],
)
def test_sizes_of_albert(config: TransformerConfig, encoder: int, pretraining: int) -> None:
    assert count(config) == encoder
    assert count(replace(config, heads=("pooler", "sentence", "masked_lm"))) == pretraining
    assert count(replace(config, num_layers=1)) == encoder
    dim, inner, layers = config.dim, config.feedforward_dim, config.num_layers
    block = 4 * (dim**2 + dim) + 2 * dim * inner + inner + dim + 4 * dim
    assert count(replace(config, sharing="none")) == encoder + (layers - 1) * block


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "with_pooler", "with_scores"),
    [(768, 12, 12, 124_645_632, 124_697_433), (1024, 24, 16, 355_359_744, 355_412_057)],
)
def test_sizes_of_roberta(dim: int, layers: int, heads: int, with_pooler: int, with_scores: int) -> None:
    config = TransformerConfig(
        vocab_size=50265,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        feedforward_dim=4 * dim,
        num_segments=1,
        positions="learned",
        first_position=2,
        norm="post",
        heads=("pooler",),
    )
    assert count(config) == with_pooler
    assert count(replace(config, heads=("masked_lm",))) == with_scores


@pytest.mark.parametrize(("vocab_size", "parameters"), [(21128, 1_393_941_504), (8021, 1_373_809_152)])
def test_sizes_of_gpt2_ml(vocab_size: int, parameters: int) -> None:
    config = TransformerConfig(
        vocab_size=vocab_size,
        dim=1536,
        num_layers=48,
        num_heads=24,
        feedforward_dim=6144,
        max_length=1024,
        positions="learned",
        norm="gpt2_ml",
        mask="causal",
        heads=("lm",),
    )
    assert count(config) == parameters
