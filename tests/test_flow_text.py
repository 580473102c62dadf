"""The captions of the flow transformer: a tokenizer that forgets nothing, and an encoder whose padding does not show."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from medgen.acceleration import recompute_activations
from medgen.models.base import count_parameters
from medgen.models.flow.network import NextDiT
from medgen.models.flow.network_shape import NetworkShape, TextShape
from medgen.models.flow.text_encoder import TextEncoder, as_batch
from medgen.models.flow.tokenizer import BEGIN, FIRST_BYTE, FIRST_MERGE, PADDING, PIECE, Tokenizer

CAPTIONS = [
    "Left eye, mild non-proliferative retinopathy, few microaneurysms.",
    "Right eye, no retinopathy.",
    "Left eye, proliferative retinopathy, vitreous haemorrhage of 3.5 mm.",
    "Right eye, severe non-proliferative retinopathy: many haemorrhages, hard exudates.",
    "right fundus; quality good",
]
TOKENIZER = Tokenizer.built(CAPTIONS, 300)

# --- the tokenizer ----------------------------------------------------------------------------------------------------


def plainly_built(captions: list[str], most: int) -> list[tuple[int, int]]:
    """Byte-pair encoding as it is defined: all pairs are counted again for each merge."""
    pieces = [[FIRST_BYTE + byte for byte in piece.encode()] for caption in captions for piece in PIECE.findall(caption)]
    merges: list[tuple[int, int]] = []
    while len(merges) < most:
        counts = Counter(pair for piece in pieces for pair in itertools.pairwise(piece))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for piece in pieces:
            for place in range(len(piece)):
                if tuple(piece[place : place + 2]) == best:
                    piece[place : place + 2] = [FIRST_MERGE + len(merges)]
        merges.append(best)
    return merges


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="aab c.é", max_size=24), max_size=6), st.integers(0, 40))
def test_it_is_built_as_defined(captions: list[str], most: int) -> None:
    """Also of words like aaaa, where a pair overlaps itself, and where pairs are equally frequent."""
    assert list(Tokenizer.built(captions, FIRST_MERGE + most).merges) == plainly_built(captions, most)


def test_real_captions_become_few_tokens() -> None:
    assert list(TOKENIZER.merges) == plainly_built(CAPTIONS, 300 - FIRST_MERGE)
    assert TOKENIZER.size == 300
    everything = Tokenizer.built(CAPTIONS, 4096)
    assert everything.size < 4096, "no more pairs that occur twice"
    assert [everything.decode([token]) for token in everything.encode("Right eye, no retinopathy.", 99)] == ["", "Right", " eye", ",", " no", " retinopathy", "."]


def test_the_order_of_captions_has_no_effect() -> None:
    for seed in range(3):
        shuffled = random.Random(seed).sample(CAPTIONS, len(CAPTIONS))
        assert Tokenizer.built(shuffled, 300).to_json() == TOKENIZER.to_json()


@settings(max_examples=200, deadline=None)
@example("\ud800 \ud83d\ude00 \x00")
@given(st.text(alphabet=st.characters(), max_size=60) | st.text(alphabet="Left ye,retinopathy.\n\t 　", max_size=40))
def test_any_text_comes_back(text: str) -> None:
    """Of every script, control characters and lone surrogates too."""
    tokens = TOKENIZER.encode(text, 4 * len(text) + 1)
    assert tokens[0] == BEGIN and all(FIRST_BYTE <= token < TOKENIZER.size for token in tokens[1:])
    assert TOKENIZER.decode(tokens) == TOKENIZER.decode([*tokens, PADDING, PADDING]) == text
    assert TOKENIZER.length(text) == len(tokens)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="retinopathy ,.\U0001f441眼", max_size=30))
def test_what_was_encoded_before_has_no_effect(text: str) -> None:
    fresh = Tokenizer(TOKENIZER.merges, TOKENIZER.words)
    TOKENIZER.encode(text, 1000)
    assert TOKENIZER.encode(text, 1000) == fresh.encode(text, 1000)


def test_upper_and_lower_case_differ() -> None:
    assert TOKENIZER.encode("Right", 9) != TOKENIZER.encode("right", 9)
    assert TOKENIZER.unknown_words("Right eye, right Eye") == ("Eye",)


def test_words_that_training_never_said_are_told_once_in_their_order() -> None:
    assert TOKENIZER.unknown_words(CAPTIONS[0]) == TOKENIZER.unknown_words("") == TOKENIZER.unknown_words(" ;:!\U0001f441") == ()
    assert TOKENIZER.unknown_words("mild glaucoma, no oedema; glaucoma of 4.5 mm") == ("glaucoma", "oedema", "4")
    assert TOKENIZER.unknown_words("retino pathy") == ("retino", "pathy"), "parts of words are no words"


def test_an_empty_caption_is_the_begin_token() -> None:
    assert TOKENIZER.encode("", 1) == [BEGIN] and TOKENIZER.length("") == 1 and TOKENIZER.decode([BEGIN]) == ""
    assert Tokenizer.built([], FIRST_MERGE).encode("é", 3) == [BEGIN, FIRST_BYTE + 0xC3, FIRST_BYTE + 0xA9]


def test_captions_that_are_too_long_are_refused() -> None:
    caption = CAPTIONS[0]
    length = TOKENIZER.length(caption)
    assert len(TOKENIZER.encode(caption, length)) == length
    with pytest.raises(ValueError, match=rf"caption 'Left eye, mild .*' has {length} tokens, more than the {length - 1} that are read; shorten it"):
        TOKENIZER.encode(caption, length - 1)
    with pytest.raises(ValueError, match=r"caption 'x{77}\.\.\.' has 501 tokens"):
        TOKENIZER.encode("x" * 500, 256)


def test_it_is_the_same_after_a_file() -> None:
    again = Tokenizer.from_json(json.loads(json.dumps(TOKENIZER.to_json())))
    assert again.sha256 == TOKENIZER.sha256 and again.words == TOKENIZER.words
    assert all(again.encode(caption, 256) == TOKENIZER.encode(caption, 256) for caption in [*CAPTIONS, "眼底 never said"])


def test_it_is_known_by_its_hash() -> None:
    """Of merges and of words: the numbers of a caption and what is told as unknown depend on them."""
    first, second, *rest = TOKENIZER.merges
    assert max(*first, *second) < FIRST_MERGE, "either may be the first"
    others = [Tokenizer.built(CAPTIONS, 299), Tokenizer.built([*CAPTIONS, "oedema"], 300), Tokenizer([second, first, *rest], TOKENIZER.words)]
    assert len({tokenizer.sha256 for tokenizer in (TOKENIZER, *others)}) == 4


@pytest.mark.parametrize(("changed", "told"), [
    ({"format": 2}, "not a tokenizer of format 1: format, merges, words given"),
    ({"more": 1}, "format, merges, words, more given; format, merges and words are needed"),
    ({"merges": [[40, FIRST_MERGE]]}, r"merges: \[40, 258\] given for token 258; a pair of tokens from 2 to 257 is needed"),
    ({"merges": [[1, 40]]}, r"merges: \[1, 40\] given"),
    ({"merges": [[40, 41], [40]]}, r"merges: \[40\] given for token 259"),
    ({"merges": [[40.0, 41]]}, r"merges: \[40\.0, 41\] given"),
    ({"words": ["eye", 3]}, "words: something given that is no text"),
])  # fmt: skip
def test_what_is_no_tokenizer_is_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Tokenizer.from_json({**TOKENIZER.to_json(), **changed})


def test_numbers_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary: 257 given; it must be 258 or more"):
        Tokenizer.built(CAPTIONS, 257)
    for token in (-1, 300):
        with pytest.raises(ValueError, match=f"token {token} given; there are 300, from 0"):
            TOKENIZER.decode([BEGIN, token])


# --- the encoder ------------------------------------------------------------------------------------------------------

TINY = TextShape(vocabulary=300, width=32, depth=2, heads=4, max_tokens=128)
NOBODY = torch.zeros(2, dtype=torch.bool)


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TINY).eval()


# without positions and null: counted for a transformer of the usual layers
@pytest.mark.parametrize(("shape", "counted"), [(TextShape(), 8_671_488), (TextShape(2048, 256, 4, 4), 3_683_840), (TextShape(depth=6), 12_220_416)])
def test_it_has_the_usual_number_of_parameters(shape: TextShape, counted: int) -> None:
    with torch.device("meta"):
        assert count_parameters(TextEncoder(shape)) == counted + (shape.max_tokens + 1) * shape.width


def test_a_caption_is_encoded_as_if_it_were_alone() -> None:
    network, captions = encoder(), CAPTIONS[:2]
    ids, valid = as_batch(TOKENIZER, captions, TINY.max_tokens)
    lengths = [TOKENIZER.length(caption) for caption in captions]
    assert ids.shape == valid.shape == (2, max(lengths)) and valid.sum(dim=1).tolist() == lengths
    with torch.no_grad():
        features, counts = network(ids, valid, NOBODY)
        assert torch.equal(counts, valid) and features.shape == (2, max(lengths), 32)
        for number, caption in enumerate(captions):
            alone, _ = network(*as_batch(TOKENIZER, [caption], TINY.max_tokens), NOBODY[:1])
            assert torch.allclose(features[number, : lengths[number]], alone[0], atol=1e-5)
        other_padding, _ = network(torch.where(valid, ids, 77), valid, NOBODY)
        assert torch.equal(other_padding[valid], features[valid])


def test_every_token_sees_every_other_and_its_place() -> None:
    network, (ids, valid) = encoder(), as_batch(TOKENIZER, ["no eye no"], TINY.max_tokens)
    with torch.no_grad():
        plain = network(ids, valid, NOBODY[:1])[0][0]
        assert not torch.allclose(plain[1], plain[-1], atol=1e-3), "the same word elsewhere is another"
        for changed in (1, ids.shape[1] - 1):
            others = ids.clone()
            others[0, changed] = FIRST_BYTE
            moved = (network(others, valid, NOBODY[:1])[0][0] - plain).abs().amax(dim=1)
            assert float(moved.min()) > 1e-5, "both those before it and those after it"


def test_dropped_captions_and_empty_ones() -> None:
    """Dropped ones are all alike, one token that learns, and nothing of the caption shows; an empty one is not dropped."""
    network = encoder()
    ids, valid = as_batch(TOKENIZER, [CAPTIONS[0], ""], TINY.max_tokens)
    dropped = torch.tensor([True, False])
    features, counts = network(ids, valid, dropped)
    assert counts.sum(dim=1).tolist() == [1, 1] and torch.equal(features[0, 0], network.null)
    assert torch.equal(features[1], network(ids, valid, NOBODY)[0][1]) and not torch.equal(features[1, 0], network.null)
    features[0].sum().backward()
    assert network.null.grad is not None and network.null.grad.any()
    grads = [parameter.grad for name, parameter in network.named_parameters() if name != "null"]
    assert all(grad is not None and not grad.any() for grad in grads), "of the whole encoder there is a gradient, of 0, as DDP needs it"


def test_a_caption_without_a_valid_token_is_a_dropped_one() -> None:
    network = encoder()
    ids, valid = as_batch(TOKENIZER, CAPTIONS[:2], TINY.max_tokens)
    nothing = valid & torch.tensor([[True], [False]])
    features, counts = network(ids, nothing, NOBODY)
    assert torch.equal(features[1], network(ids, valid, ~NOBODY)[0][1]) and counts.sum(dim=1).tolist() == [int(valid[0].sum()), 1]
    features.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_encoder_and_network_learn_together() -> None:
    """Two captions for one noise: the velocities of two images are told apart by the text alone."""
    torch.manual_seed(0)
    network = NextDiT(NetworkShape(1, 1, TINY.width, 32, 2, 4, 2, multiple_of=32))
    text = TextEncoder(TINY)
    ids, valid = as_batch(TOKENIZER, ["Right eye", "Left eye"], TINY.max_tokens)
    images = torch.randn(1, 1, 8, 8).expand(2, 1, 8, 8)
    target = torch.tensor([1.0, -0.5])[:, None, None, None].expand(2, 1, 8, 8)
    parameters = [*network.parameters(), *text.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)

    def error() -> Tensor:
        loss: Tensor = (network(images, torch.zeros(2), *text(ids, valid, NOBODY)) - target).square().mean()
        return loss

    assert error().item() == pytest.approx((1 + 0.25) / 2)
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.02
    assert text.tokens.weight.grad is not None and text.tokens.weight.grad[ids[0, 1]].any()


def test_blocks_computed_twice_give_the_same_gradients() -> None:
    ids, valid = as_batch(TOKENIZER, CAPTIONS[:2], TINY.max_tokens)
    gradients: list[list[Tensor | None]] = []
    for twice in (False, True):
        network = encoder()
        if twice:
            recompute_activations(network.blocks)
        network(ids, valid, torch.tensor([True, False]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


@pytest.mark.parametrize(("changed", "told"), [
    *[({name: 0}, f"{name}: 0 given; it must be 1 or more") for name in ("vocabulary", "width", "depth", "heads", "max_tokens")],
    ({"heads": 5}, "heads: 5 do not divide the width of 32"),
])  # fmt: skip
def test_encoders_that_do_not_fit_together_are_refused(changed: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(TINY, **changed)


def test_captions_longer_than_the_encoder_are_refused() -> None:
    long = torch.full((2, 129), FIRST_BYTE)
    with pytest.raises(ValueError, match="max_tokens: captions of 129 tokens given, the encoder was made for 128"):
        encoder()(long, torch.ones_like(long, dtype=torch.bool), NOBODY)
    with pytest.raises(ValueError, match="more than the 20 that are read"):
        as_batch(TOKENIZER, CAPTIONS, 20)
