"""Weights in and out: the files, what is refused and how it is said, and modules that change their size."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.transformer import EncoderDecoder, Transformer, TransformerConfig, from_pretrained, to_pretrained
from kexue.nn.transformer.weights import (
    LAYOUTS,
    extend_positions,
    layout_of,
    resize_vocabulary,
    subset_vocabulary,
    widen_keys,
)

BERT = TransformerConfig(
    vocab_size=30,
    dim=8,
    num_layers=3,
    num_heads=2,
    feedforward_dim=12,
    max_length=10,
    num_segments=2,
    positions="learned",
    norm="post",
    norm_eps=1e-12,
    initialisation="normal",
    heads=("pooler", "sentence", "masked_lm"),
)
ROBERTA = replace(BERT, first_position=2, heads=("masked_lm",))
ALBERT = replace(BERT, embedding_dim=4, sharing="all", num_layers=4, num_groups=2, activation="gelu_tanh")
ROFORMER = replace(BERT, positions="rope", heads=("masked_lm",))
GPT2 = replace(BERT, norm="pre", embedding_norm=False, mask="causal", num_segments=0, heads=("lm",))
GPT2_ML = replace(GPT2, norm="gpt2_ml", embedding_norm=True)
CONFIGS = {
    "bert": BERT,
    "roberta": ROBERTA,
    "albert": ALBERT,
    "roformer": ROFORMER,
    "gpt2": GPT2,
    "gpt2_ml": GPT2_ML,
}
IDS = torch.arange(1, 9).view(2, 4)


def random(config: TransformerConfig) -> Transformer:
    """A module whose weights are all far from 0 and 1."""
    torch.manual_seed(0)
    module = Transformer(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def save(config: TransformerConfig, folder: Path) -> tuple[Transformer, dict[str, Tensor]]:
    """Write a random module; return it with the tensors of its file."""
    module = random(config)
    to_pretrained(module, folder)
    return module, load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(state), folder / "model.safetensors")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same(module: Transformer, other: Transformer) -> None:
    ours, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Files


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    module, _ = save(CONFIGS[kind], tmp_path)
    assert layout_of(CONFIGS[kind]).name == kind
    before = torch.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn to be overwritten
    assert not loaded.training
    assert not list(loaded.buffers())  # they would be left without values
    assert set(loaded.config.heads) == set(module.config.heads)
    assert replace(loaded.config, heads=module.config.heads) == module.config
    assert_same(loaded, module)
    assert torch.equal(loaded.eval()(IDS), module(IDS))


def torch_file(state: dict[str, Tensor], folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def old_torch_file(state: dict[str, Tensor], folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def torch_shards(state: dict[str, Tensor], folder: Path) -> None:
    shards(state, folder, "pytorch_model", "bin", torch.save)


def safe_shards(state: dict[str, Tensor], folder: Path) -> None:
    shards(state, folder, "model", "safetensors", save_file)


def shards(state: dict[str, Tensor], folder: Path, stem: str, ending: str, write: Callable[..., Any]) -> None:
    names, files = sorted(state), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        part = {name: state[name].clone() for name in names[number::3]}
        write(part, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def old_names(state: dict[str, Tensor], folder: Path) -> None:
    pairs = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in pairs.items():
            name = re.sub(re.escape(new) + "$", old, name)
        renamed[name] = tensor
    assert len([name for name in renamed if name.endswith(("gamma", "beta"))]) > 10
    torch_file(renamed, folder)


def with_copies(state: dict[str, Tensor], folder: Path) -> None:
    """As older versions of transformers wrote them: tied weights twice, and buffers."""
    extra = {
        "bert.embeddings.position_ids": torch.arange(10)[None],
        "cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": state["cls.predictions.bias"].clone(),
    }
    save_file({**state, **extra}, folder / "model.safetensors")


def other_twin(state: dict[str, Tensor], folder: Path) -> None:
    """Of two tied names a writer may keep either."""
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    state["cls.predictions.decoder.weight"] = state.pop("bert.embeddings.word_embeddings.weight")
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "write", [torch_file, old_torch_file, torch_shards, safe_shards, old_names, with_copies, other_twin]
)
def test_every_kind_of_file(write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path) -> None:
    module, state = save(BERT, tmp_path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    (tmp_path / "model.safetensors").unlink()
    write(state, tmp_path)
    assert_same(from_pretrained(tmp_path), module)


@pytest.mark.parametrize("kind", ["bert", "albert", "roformer", "gpt2"])
def test_names_of_a_bare_model(kind: str, tmp_path: Path) -> None:
    module, _ = save(CONFIGS[kind], tmp_path)
    rewrite(tmp_path, lambda state: {n.removeprefix(LAYOUTS[kind].prefix): t for n, t in state.items()})
    assert_same(from_pretrained(tmp_path), module)


def test_code_is_not_run(tmp_path: Path) -> None:
    save(BERT, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code, so it was not loaded; save its tensors as "):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights; one of model.safetensors, "),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "damaged"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "no file of weights or is damaged|is damaged, or holds objects",
        ),
    ],
)
def test_files_that_are_not_there(prepare: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save(BERT, tmp_path)
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        from_pretrained(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    _, state = save(BERT, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    safe_shards(state, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"lists files that are not there: model-00002-of-00003\.safetensors"):
        from_pretrained(tmp_path)


def test_a_training_checkpoint_is_no_file_of_weights(tmp_path: Path) -> None:
    _, state = save(BERT, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"epoch": 1, "model": state}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="other things than tensors, such as 'epoch'"):
        from_pretrained(tmp_path)


# Names on the hub


def test_a_name_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    module, state = save(BERT, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        if len(asked) == 2:
            torch.save(state, tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(from_pretrained("some/model", revision="v1"), module)
    assert asked == [
        ("some/model", "v1", ["config.json", "model*.safetensors", "model.safetensors.index.json"]),
        ("some/model", "v1", ["config.json", "pytorch_model*.bin*"]),
    ]


@pytest.mark.parametrize("name", ["no/such-model", "./no/such/folder", "no such name"])
def test_neither_a_folder_nor_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no such folder, and the hub gave nothing of that name") as caught:
        from_pretrained(name, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


# What is refused


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder} does not hold the weights of this ")


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    save(BERT, tmp_path)

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["bert.encoder.layer.1.attention.self.querry.weight"] = state.pop(
            "bert.encoder.layer.1.attention.self.query.weight"
        )
        del state["bert.pooler.dense.bias"]
        state["classifier.weight"], state["qa_outputs.bias"] = torch.ones(2, 8), torch.ones(2)
        state["bert.embeddings.position_embeddings.weight"] = torch.ones(12, 8)
        state["cls.predictions.decoder.bias"] = torch.ones(30)
        return state

    rewrite(tmp_path, change)
    assert refusal(tmp_path) == (
        "'bert' Transformer; missing: encoder.layer.1.attention.self.query.weight (8, 8) "
        "(there: bert.encoder.layer.1.attention.self.querry.weight), pooler.dense.bias (8,); "
        "without a place: bert.encoder.layer.1.attention.self.querry.weight (8, 8), classifier.weight (2, 8), "
        "qa_outputs.bias (2,); "
        "of another shape: bert.embeddings.position_embeddings.weight (12, 8) there, (10, 8) here; "
        "wrong: cls.predictions.decoder.bias differs from cls.predictions.bias, to which it is tied; "
        "to leave out what is of another task, add ignore=('classifier.*', 'qa_outputs.*',)"
    )


def test_two_hundred_names_are_read_in_one_glance(tmp_path: Path) -> None:
    save(replace(BERT, num_layers=13), tmp_path)
    rewrite(tmp_path, lambda state: {n.replace("encoder.layer", "encoder.layers"): t for n, t in state.items()})
    text = refusal(tmp_path)
    assert "encoder.layer.0-12.attention.self.query.weight (8, 8) (there: bert.encoder.layers.0-12.attention" in text
    assert len(re.findall(r"encoder\.layer\.0-12\.", text)) == 16  # 208 weights
    assert "ignore" not in text
    assert len(text) < 4000


def test_gaps_in_the_numbers_are_shown(tmp_path: Path) -> None:
    save(ALBERT, tmp_path)
    save(replace(BERT, num_layers=5), tmp_path)
    lost = (0, 2, 3)
    rewrite(
        tmp_path,
        lambda state: {
            n: t for n, t in state.items() if n not in [f"bert.encoder.layer.{i}.output.dense.bias" for i in lost]
        },
    )
    assert "missing: encoder.layer.0,2,3.output.dense.bias (8,)" in refusal(tmp_path)


def test_other_tasks_are_left_out_deliberately(tmp_path: Path) -> None:
    module, _ = save(replace(BERT, heads=("pooler",)), tmp_path)
    rewrite(tmp_path, lambda state: {**state, "classifier.weight": torch.ones(2, 8), "classifier.bias": torch.ones(2)})
    assert "ignore=('classifier.*',)" in refusal(tmp_path)
    assert_same(from_pretrained(tmp_path, ignore=("classifier.*",)), module)
    module, _ = save(ROFORMER, tmp_path)
    rewrite(tmp_path, lambda state: {**state, "roformer.pooler.dense.weight": torch.ones(8, 8)})
    assert "ignore=('roformer.pooler.*',)" in refusal(tmp_path)
    assert_same(from_pretrained(tmp_path, ignore=("roformer.pooler.*",)), module)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bert", {"model_type": "t5"}, "model_type='t5' cannot be loaded, only bert, roberta, albert"),
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' cannot be loaded, only gelu, gelu_new"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' .* 'absolute'"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False cannot be loaded, only True"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("bert", {"hidden_size": 12}, r"word_embeddings.weight \(30, 8\) there, \(30, 12\) here"),
        ("bert", {"num_attention_heads": 3}, "num_heads must divide dim"),
        ("bert", {"num_hidden_layers": 4}, r"missing: encoder.layer.3.attention.self.query.weight \(8, 8\)"),
        ("bert", {"num_hidden_layers": 2}, "without a place: bert.encoder.layer.2.attention"),
        ("roberta", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' cannot be loaded, only 'gelu'"),
        ("roformer", {"rotary_value": True}, "rotary_value=True cannot be loaded, only False"),
        ("roformer", {"max_position_embeddings": 12}, r"embed_positions.weight \(10, 4\) there, \(12, 4\) here"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"embd_pdrop": 0.2}, "embd_pdrop=0.2 and resid_pdrop=0.1 are one rate here; give it as dropout="),
        ("albert", {"num_hidden_groups": 3}, "num_groups must divide num_layers"),
        ("albert", {"inner_group_num": 2}, r"missing: encoder.albert_layer_groups.0-1.albert_layers.1.attention"),
    ],
)
def test_config_fields_that_cannot_be(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(CONFIGS[kind], tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(InputError, match=message):
        from_pretrained(tmp_path)


def test_fields_that_are_left_out_have_their_default(tmp_path: Path) -> None:
    save(replace(BERT, num_layers=1), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: values[name] for name in (*needed, "intermediate_size", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = from_pretrained(tmp_path).config
    assert (config.norm_eps, config.activation, config.num_segments, config.mask) == (1e-12, "gelu", 2, "full")
    del sizes["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(InputError, match="hidden_size=None, where 'bert' needs a whole number"):
        from_pretrained(tmp_path)


def test_rotations_that_are_not_ours(tmp_path: Path) -> None:
    save(ROFORMER, tmp_path)
    name = "roformer.encoder.embed_positions.weight"
    rewrite(tmp_path, lambda state: {**state, name: state[name].roll(1, 0)})
    assert f"wrong: {name} differs from what the config gives" in refusal(tmp_path)
    rewrite(tmp_path, lambda state: {n: t for n, t in state.items() if n != name})
    assert from_pretrained(tmp_path).config.positions == "rope"


def test_a_mapping_between_equal_widths_must_be_the_identity(tmp_path: Path) -> None:
    module, state = save(replace(ALBERT, embedding_dim=8), tmp_path)
    name = "albert.encoder.embedding_hidden_mapping_in.weight"
    assert torch.equal(state[name], torch.eye(8))
    assert_same(from_pretrained(tmp_path), module)
    rewrite(tmp_path, lambda state: {**state, name: 2 * state[name]})
    assert f"wrong: {name} differs" in refusal(tmp_path)


def test_the_same_weight_twice(tmp_path: Path) -> None:
    save(BERT, tmp_path)
    rewrite(tmp_path, lambda state: {**state, "embeddings.LayerNorm.gamma": torch.ones(8)})
    assert re.search(r"without a place: (bert\.)?embeddings\.LayerNorm\.(gamma|weight) \(8,\)", refusal(tmp_path))


# Options


def test_heads_are_chosen(tmp_path: Path) -> None:
    module, _ = save(BERT, tmp_path)
    bare = from_pretrained(tmp_path, heads=())
    assert bare.config.heads == ()
    assert not [name for name, _ in bare.named_parameters() if name.startswith(("pooler", "sentence", "masked"))]
    assert torch.equal(bare.eval()(IDS), module(IDS))
    assert from_pretrained(tmp_path, heads=("masked_lm",)).pooler is None
    with pytest.raises(InputError, match=r"heads=\('lm',\)\): weights of 'bert' have no 'lm'; use 'all' or "):
        from_pretrained(tmp_path, heads=("lm",))
    with pytest.raises(InputError, match="'sentence' stands on 'pooler'"):
        from_pretrained(tmp_path, heads=("sentence",))
    save(replace(BERT, heads=("pooler",)), tmp_path)
    with pytest.raises(InputError, match=r"missing: .*cls.predictions.transform.dense.weight \(8, 8\)"):
        from_pretrained(tmp_path, heads=("masked_lm",))


def test_options_of_the_config(tmp_path: Path) -> None:
    save(BERT, tmp_path)
    module = from_pretrained(tmp_path, dropout=0.3, attention_dropout=0.0, mask="prefix", dtype=torch.bfloat16)
    config = module.config
    assert (config.dropout, config.attention_dropout, config.mask) == (0.3, 0.0, "prefix")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match=r"from_pretrained\(num_layers=...\): follows from the weights"):
        from_pretrained(tmp_path, num_layers=2)
    to_pretrained(random(BERT).half(), tmp_path)
    assert {parameter.dtype for parameter in from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_a_part_of_the_vocabulary(tmp_path: Path) -> None:
    module, _ = save(BERT, tmp_path)
    kept = [7, 0, 3, 29]
    small = from_pretrained(tmp_path, vocabulary=kept).eval()
    assert small.config.vocab_size == 4
    ids = torch.tensor([[0, 2, 3]])
    hidden = small(ids)
    assert torch.equal(hidden, module(torch.tensor(kept)[ids]))
    torch.testing.assert_close(small.logits(hidden), module.logits(hidden)[..., kept])
    for wrong in ([], [30], [-1]):
        with pytest.raises(InputError, match="each from 0 to 29"):
            from_pretrained(tmp_path, vocabulary=wrong)


# ALBERT without sharing


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_unshared_gradients_add_up(groups: int, inner: int, tmp_path: Path) -> None:
    save(replace(ALBERT, num_groups=groups, group_size=inner, attention_dropout=0.0, dropout=0.0), tmp_path)
    shared = from_pretrained(tmp_path, dtype=torch.float64)
    apart = from_pretrained(tmp_path, unshare=True, dtype=torch.float64)
    assert apart.config.sharing == "none"
    assert len(apart.blocks()) == len(shared.layers.order) == 4 * inner
    for module in (shared, apart):
        module.logits(module(IDS)).square().sum().backward()
    assert torch.equal(shared(IDS), apart(IDS))
    for number, block in enumerate(shared.blocks()):
        copies = [apart.blocks()[layer] for layer, used in enumerate(shared.layers.order) if used == number]
        assert len(copies) == 4 // groups
        for name, parameter in block.named_parameters():
            total = torch.stack([copy.get_parameter(name).grad for copy in copies]).sum(0)
            torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-10 * float(total.abs().max()))
    assert len({parameter.data_ptr() for parameter in apart.parameters()}) == len(list(apart.parameters()))


def test_unsharing_needs_sharing_and_every_group(tmp_path: Path) -> None:
    save(BERT, tmp_path / "bert")
    with pytest.raises(InputError, match="layers of 'bert' share nothing"):
        from_pretrained(tmp_path / "bert", unshare=True)
    save(ALBERT, tmp_path)
    rewrite(tmp_path, lambda state: {n: t for n, t in state.items() if "layer_groups.1.albert_layers.0.ffn." not in n})
    assert "missing: encoder.albert_layer_groups.1.albert_layers.0.ffn.weight (12, 8)" in refusal(
        tmp_path, unshare=True
    )


def test_unshared_layers_are_saved_as_groups(tmp_path: Path) -> None:
    save(ALBERT, tmp_path)
    apart = from_pretrained(tmp_path, unshare=True).eval()
    to_pretrained(apart, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["num_hidden_layers"], values["num_hidden_groups"], values["inner_group_num"]) == (4, 4, 1)
    assert torch.equal(from_pretrained(tmp_path).eval()(IDS), apart(IDS))
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AlbertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(apart.logits(apart(IDS)), theirs.eval()(IDS).prediction_logits, rtol=1e-4, atol=1e-4)


# Layouts


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            BERT,
            {"attention_scale": "log_n"},
            "the nearest, 'bert', does not have attention_scale='log_n' (there 'sqrt')",
        ),
        (BERT, {"mask": "prefix"}, "'bert', does not have mask='prefix' (there 'full' or 'causal')"),
        (BERT, {"num_segments": 0}, "num_segments=0 (there 1 or more)"),
        (BERT, {"num_kv_heads": 1}, "num_kv_heads=1 (there num_heads=2)"),
        (BERT, {"key_size": 6}, "key_size=6 (there head_size=4)"),
        (ROBERTA, {"activation": "gelu_tanh"}, "'roberta', does not have activation='gelu_tanh' (there 'gelu')"),
        (ROFORMER, {"rope_base": 500.0}, "'roformer', does not have rope_base=500.0 (there 10000.0)"),
        (GPT2, {"gated": True}, "'gpt2', does not have gated=True (there False)"),
        (GPT2_ML, {"heads": ("lm", "pooler")}, "'gpt2_ml', does not have heads=('pooler',) (there lm)"),
    ],
)
def test_what_no_layout_holds(config: TransformerConfig, changes: dict, message: str, tmp_path: Path) -> None:
    module = Transformer(replace(config, **changes))
    with pytest.raises(InputError, match=re.escape(message)):
        to_pretrained(module, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prefix_mask_is_left_out_deliberately(tmp_path: Path) -> None:
    module = random(replace(BERT, mask="prefix"))
    to_pretrained(module, tmp_path, mask="full")
    assert_same(from_pretrained(tmp_path, mask="prefix"), module)


@pytest.mark.parametrize(
    ("kind", "heads", "mask", "expected"),
    [
        ("bert", (), "full", "BertModel"),
        ("bert", ("pooler",), "full", "BertModel"),
        ("bert", ("masked_lm",), "full", "BertForMaskedLM"),
        ("bert", ("masked_lm",), "causal", "BertLMHeadModel"),
        ("bert", ("pooler", "sentence"), "full", "BertForNextSentencePrediction"),
        ("bert", ("pooler", "masked_lm"), "full", "BertForPreTraining"),
        ("roberta", (), "full", "RobertaModel"),
        ("roberta", ("pooler", "masked_lm"), "full", "RobertaForMaskedLM"),
        ("albert", ("masked_lm",), "full", "AlbertForMaskedLM"),
        ("albert", ("pooler", "sentence"), "full", "AlbertForPreTraining"),
        ("roformer", (), "full", "RoFormerModel"),
        ("roformer", ("masked_lm",), "causal", "RoFormerForCausalLM"),
        ("gpt2", (), "causal", "GPT2Model"),
        ("gpt2_ml", ("lm",), "causal", None),
    ],
)
def test_the_class_that_fits_the_heads(kind: str, heads: tuple, mask: Any, expected: str | None) -> None:
    assert LAYOUTS[kind].class_for(replace(CONFIGS[kind], heads=heads, mask=mask)) == expected


# Other sizes


@pytest.mark.parametrize("config", [BERT, GPT2, ALBERT], ids=["bert", "gpt2", "albert"])
def test_more_and_fewer_tokens(config: TransformerConfig, tmp_path: Path) -> None:
    module, before = random(config), random(config)
    resize_vocabulary(module, 300)
    hidden = module(IDS)
    assert torch.equal(hidden, before(IDS))
    scores = module.logits(hidden)
    assert scores.shape[-1] == module.config.vocab_size == module.embedding.config.vocab_size == 300
    torch.testing.assert_close(scores[..., :30], before.logits(hidden))
    new = module.embedding.tokens.weight[30:]
    assert new.std().item() == pytest.approx(config.init_std, rel=0.1)
    if module.masked_token_head is not None:
        assert not module.masked_token_head.bias[30:].any()
    to_pretrained(module, tmp_path)
    assert_same(from_pretrained(tmp_path), module)
    resize_vocabulary(module, 30)
    assert_same(module, before)
    assert module.config == before.config


def test_some_tokens() -> None:
    module, before = random(BERT), random(BERT)
    subset_vocabulary(module, [5, 1, 2])
    ids = torch.tensor([[0, 1, 2, 2]])
    hidden = module(ids)
    assert torch.equal(hidden, before(torch.tensor([5, 1, 2])[ids]))
    torch.testing.assert_close(module.logits(hidden), before.logits(hidden)[..., [5, 1, 2]])
    with pytest.raises(InputError, match="each from 0 to 2"):
        subset_vocabulary(module, [3])


def test_the_vocabulary_of_two_stacks() -> None:
    config = TransformerConfig(vocab_size=9, dim=8, num_heads=2, num_layers=1, num_decoder_layers=1, heads=("lm",))
    module = EncoderDecoder(config)
    resize_vocabulary(module, 12)
    assert module.logits(module(IDS, IDS)).shape == (2, 4, 12)


@pytest.mark.parametrize("config", [BERT, ROBERTA, GPT2], ids=["bert", "roberta", "gpt2"])
def test_longer_inputs(config: TransformerConfig, tmp_path: Path) -> None:
    module, before = random(config), random(config)
    long = torch.ones(1, 14, dtype=torch.long)
    with pytest.raises(InputError, match="longer than TransformerConfig"):
        module(long)
    extend_positions(module, 14)
    assert torch.equal(module(IDS), before(IDS))
    assert torch.isfinite(module(long)).all()
    to_pretrained(module, tmp_path)
    assert from_pretrained(tmp_path).config == module.config
    with pytest.raises(InputError, match="use 14 or more"):
        extend_positions(module, 10)
    with pytest.raises(InputError, match="positions='rope' have no table"):
        extend_positions(random(ROFORMER), 20)
    with pytest.raises(InputError, match="attention='random' have this size, too"):
        extend_positions(Transformer(replace(BERT, attention="random")), 20)


WIDE = replace(BERT, heads=())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "sinusoidal"},
        {"positions": "none"},
        {"positions": "relative", "mask": "causal"},
        {"num_kv_heads": 1},
        {"talking_heads": "both", "num_key_heads": 3, "num_value_heads": 4},
        {"attention_scale": "log_n"},
        {"attention": "mixture", "mixture": ("softmax", "random")},
        {"sharing": "all"},
        {"sharing": "attention"},
        {"attention_bias": False},
    ],
    ids=str,
)
def test_wider_keys_change_nothing(changes: dict[str, Any]) -> None:
    module, before = (random(replace(WIDE, **changes)).double() for _ in range(2))
    widen_keys(module, 7)
    assert module.config.key_size == 7
    for ours, theirs in zip(module.hidden_states(IDS), before.hidden_states(IDS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    fresh = Transformer(module.config)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in module.parameters()]
    module(IDS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_wider_keys_of_two_stacks() -> None:
    config = TransformerConfig(
        vocab_size=30, dim=8, num_heads=2, num_layers=1, num_decoder_layers=2, positions="learned", dropout=0.0
    )
    torch.manual_seed(0)
    module = EncoderDecoder(config).double()
    expected = module(IDS, IDS)
    widen_keys(module, 8)
    torch.testing.assert_close(module(IDS, IDS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rope"}, "positions='rope' turn other features by other angles"),
        ({"attention": "elu"}, "attention='elu' has no inner products"),
        ({"attention": "random"}, "attention='random' has no inner products"),
        ({"key_size": 9}, "use 9 or more"),
    ],
)
def test_keys_that_cannot_be_wider(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        widen_keys(Transformer(replace(WIDE, **changes)), 8)
