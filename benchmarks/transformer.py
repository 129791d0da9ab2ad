"""The Transformer beside those of `transformers`: time of a training step, bytes kept for the backward pass, tokens/s.

Training: BERT with the same weights, the same padded batch, dropout 0.1, SDPA on both sides; one step is forward,
backward and AdamW. Saved bytes are those of all tensors that autograd keeps, each storage once, without parameters.
Generation: GPT-2 with the same weights, greedy, a prompt of 32 tokens, with a cache on both sides.
Products: few rows with the matrices of a block and the table of tokens, as generation has them, by torch's `linear` and
by ours; in between, 48 MB are written, so that no matrix waits in a cache.

    python benchmarks/transformer.py --part training|generation|products [--json FILE] [--repeats 7] [--shapes small]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import add_device, device, in_turn, median_and_spread, now, report, use_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from kexue.nn.decoding import greedy
from kexue.nn.transformer import CachedDecoder, Transformer, from_pretrained
from kexue.nn.transformer.products import linear

SHAPES = {"small": (384, 6, 6), "bert_base": (768, 12, 12)}
TRAINING = {"small": (16, 128), "bert_base": (4, 128)}
GENERATION = {"small": ((1, 100), (16, 50)), "bert_base": ((1, 50), (16, 20))}
VOCABULARY, PROMPT = 21128, 32


def ported(peer: Any) -> Transformer:
    """Our module with the weights of a model of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return from_pretrained(folder).to(peer.device)


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """What a forward pass keeps for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, tuple[int, Tensor]] = {}  # the tensors stay alive, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in storages.values())


def training(shape: str, repeats: int) -> list[dict[str, Any]]:
    dim, layers, heads = SHAPES[shape]
    batch, length = TRAINING[shape]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        attn_implementation="sdpa",
    )
    peer = BertModel(config, add_pooling_layer=False).train().to(device())  # pyright: ignore[reportArgumentType]
    ours = ported(peer).train()
    with device():
        ids = torch.randint(VOCABULARY, (batch, length))
        mask = torch.arange(length) < torch.linspace(length // 4, length, batch).long()[:, None]
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "transformers": (peer, lambda: peer(ids, attention_mask=mask.long()).last_hidden_state),
        "kexue": (ours, lambda: ours(ids, mask)),
    }

    def stepper(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)

        def run() -> float:
            start = now()
            forward()[mask].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return now() - start

        return run

    kept = {name: saved_bytes(forward, module) for name, (module, forward) in forwards.items()}
    runs = {name: stepper(*both) for name, both in forwards.items()}
    in_turn(runs, 2)
    seconds = in_turn(runs, repeats)
    base = median_and_spread(seconds["transformers"])[0]
    rows = []
    for name, values in seconds.items():
        middle, spread = median_and_spread(values)
        rows.append(
            {
                "shape": f"{shape}, {batch} x {length}",
                "model": name,
                "ms a step": 1000 * middle,
                "+-": 1000 * spread,
                "speed x": base / middle,
                "saved MB": kept[name] / 1e6,
                "saved x": kept[name] / kept["transformers"],
            }
        )
    return rows


def generation(shape: str, repeats: int) -> list[dict[str, Any]]:
    dim, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=dim, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=None
    )
    peer = GPT2LMHeadModel(config).eval().to(device())  # pyright: ignore[reportArgumentType]
    ours = ported(peer).eval()
    rows = []
    for batch, tokens in GENERATION[shape]:
        prompt = torch.randint(VOCABULARY, (batch, PROMPT), device=device())

        def theirs(prompt: Tensor = prompt, tokens: int = tokens) -> Tensor:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            return peer.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, PROMPT:]

        def with_cache(prompt: Tensor = prompt, tokens: int = tokens) -> Tensor:
            return torch.stack(greedy(CachedDecoder(ours), prompt, max_length=tokens))

        ways = {"transformers": theirs, "kexue": with_cache}
        assert torch.equal(theirs(), with_cache())

        def timed(way: Callable[[], Tensor], count: int = batch * tokens) -> Callable[[], float]:
            def run() -> float:
                start = now()
                way()
                return count / (now() - start)

            return run

        speeds = in_turn({name: timed(way) for name, way in ways.items()}, repeats)
        base = median_and_spread(speeds["transformers"])[0]
        for name, values in speeds.items():
            middle, spread = median_and_spread(values)
            rows.append(
                {"shape": shape, "batch": batch, "model": name, "tokens/s": middle, "+-": spread, "x": middle / base}
            )
    return rows


@torch.no_grad()
def products(shape: str, repeats: int) -> list[dict[str, Any]]:
    dim = SHAPES[shape][0]
    other = torch.zeros(12_000_000)
    rows = []
    for inputs, outputs in ((dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim), (dim, VOCABULARY)):
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
        for count in (1, 2, 4):
            hidden = torch.randn(count, inputs)

            def timed(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[[], float]:
                def run() -> float:
                    other.add_(1)
                    start = now()
                    function(*arguments)
                    return now() - start

                return run

            ways = {"torch": F.linear, "kexue": linear}
            arguments = (hidden, weight, bias)
            seconds = in_turn({name: timed(way, arguments) for name, way in ways.items()}, 3 * repeats)
            middle = {name: median_and_spread(values)[0] for name, values in seconds.items()}
            rows.append(
                {
                    "matrix": f"{outputs} x {inputs}",
                    "rows": count,
                    **{f"{name}, us": 1e6 * value for name, value in middle.items()},
                    "speed x": middle["torch"] / middle["kexue"],
                }
            )
    return rows


PARTS = {"training": training, "generation": generation, "products": products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--rows", type=int, help="sentences of a training step, in place of the shape's")
    add_device(parser)
    arguments = parser.parse_args()
    use_device(arguments.device)
    if arguments.rows:
        TRAINING.update({shape: (arguments.rows, length) for shape, (_, length) in TRAINING.items()})
    rows = [row for shape in arguments.shapes for row in PARTS[arguments.part](shape, arguments.repeats)]
    report(f"Transformer: {arguments.part}, beside transformers", rows, arguments.json)


if __name__ == "__main__":
    main()
