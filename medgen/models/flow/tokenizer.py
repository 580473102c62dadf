"""Captions as numbers and back: a byte-pair encoding that is built from the training captions alone. No torch here.

Used by text_encoder.py. Whatever is written can be encoded; what training captions never said is told by `unknown_words`."""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from medgen import files

PADDING, BEGIN = 0, 1
FIRST_BYTE = 2  # token of byte 0
FIRST_MERGE = FIRST_BYTE + 256
LEAST_COUNT = 2  # a pair that occurs once would be learned from one caption
FORMAT = 1  # of the JSON value

PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")  # a word or punctuation with the space before it, or spaces: everything is in one
WORD = re.compile(r"\w+")
LONE_SURROGATES = "surrogatepass"  # JSON may hold them, though they are no characters

Pair = tuple[int, int]


class Tokenizer:
    """Begins with single bytes (Sennrich et al. 2016, arXiv:1508.07909, over bytes), so that no text is unknown; upper and lower case differ.

    merges: pairs of tokens that are one token, `FIRST_MERGE` + its place; the first ones are merged first. words: all words of the
    training captions. Both can be read in what `to_json` gives: captions should hold no names."""

    def __init__(self, merges: Sequence[Pair], words: Iterable[str]):
        self.merges, self.words = tuple(merges), frozenset(words)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = [b"", b"", *(bytes([number]) for number in range(256))]  # of each token; the special ones have none
        for left, right in self.merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._known: dict[str, tuple[int, ...]] = {}  # tokens of a piece, where its words are of training captions: it does not grow with what else is asked

    @classmethod
    def built(cls, captions: Iterable[str], vocabulary: int) -> Tokenizer:
        """With at most `vocabulary` tokens, fewer if no pair is left that occurs twice within a word. The order of captions has no effect.

        The most frequent pair becomes a token, again and again; of equally frequent ones the one with the lower tokens."""
        if vocabulary < FIRST_MERGE:
            raise ValueError(f"vocabulary: {vocabulary} given; it must be {FIRST_MERGE} or more, the special tokens and every byte")
        counts = Counter(itertools.chain.from_iterable(map(PIECE.findall, captions)))
        words = {word for piece in counts for word in WORD.findall(piece)}
        return cls(_merged_pairs(counts, vocabulary - FIRST_MERGE), words)

    @property
    def size(self) -> int:
        """How many tokens there are; ids lie below it."""
        return FIRST_MERGE + len(self.merges)

    @property
    def sha256(self) -> str:
        """What tells it from every other tokenizer."""
        return files.sha256_json(self.to_json())

    def encode(self, caption: str, limit: int) -> list[int]:
        """Tokens, the begin token first; an empty caption is that alone. Raises ValueError if there are more than `limit`."""
        tokens = [BEGIN, *itertools.chain.from_iterable(map(self._tokens_of, PIECE.findall(caption)))]
        if len(tokens) > limit:
            shown = caption if len(caption) <= 80 else caption[:77] + "..."
            raise ValueError(f"caption {shown!r} has {len(tokens)} tokens, more than the {limit} that are read; shorten it, or train with more max_tokens")
        return tokens

    def length(self, caption: str) -> int:
        """How many tokens it has, the begin token counts."""
        return 1 + sum(len(self._tokens_of(piece)) for piece in PIECE.findall(caption))

    def decode(self, tokens: Iterable[int]) -> str:
        """The caption whose tokens these are; padding may follow. Raises ValueError on a token that there is not."""
        tokens = list(tokens)
        for token in tokens:
            if not 0 <= token < self.size:
                raise ValueError(f"token {token} given; there are {self.size}, from 0")
        return b"".join(self._bytes[token] for token in tokens).decode("utf-8", LONE_SURROGATES)

    def unknown_words(self, caption: str) -> tuple[str, ...]:
        """Its words that no training caption had, each once, as they come. A word in another case is another word."""
        return tuple(dict.fromkeys(word for word in WORD.findall(caption) if word not in self.words))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "merges": [list(pair) for pair in self.merges], "words": sorted(self.words)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tokenizer:
        """What `to_json` gave. Raises ValueError if it is something else."""
        if value.keys() != {"format", "merges", "words"} or value["format"] != FORMAT:
            raise ValueError(f"not a tokenizer of format {FORMAT}: {', '.join(map(str, value))[:200] or 'nothing'} given; format, merges and words are needed")
        for number, pair in enumerate(value["merges"], start=FIRST_MERGE):
            if len(pair) != 2 or not all(type(token) is int and FIRST_BYTE <= token < number for token in pair):
                raise ValueError(f"merges: {pair} given for token {number}; a pair of tokens from {FIRST_BYTE} to {number - 1} is needed")
        if not all(type(word) is str for word in value["words"]):
            raise ValueError("words: something given that is no text; the words of training captions are needed")
        return cls([(left, right) for left, right in value["merges"]], value["words"])

    def _tokens_of(self, piece: str) -> tuple[int, ...]:
        known = self._known.get(piece)
        if known is not None:
            return known
        tokens = _as_bytes(piece)
        while len(tokens) > 1:
            rank, pair = min((self._ranks.get(pair, len(self.merges)), pair) for pair in itertools.pairwise(tokens))
            if rank == len(self.merges):
                break
            tokens = _merge(tokens, pair, FIRST_MERGE + rank)
        if self.words.issuperset(WORD.findall(piece)):
            self._known[piece] = tuple(tokens)
        return tuple(tokens)


def _merged_pairs(counts: Counter[str], most: int) -> list[Pair]:
    """At most `most` pairs, in the order in which they are merged. counts: how often each piece occurs."""
    pieces = [_as_bytes(piece) for piece in counts]
    times = list(counts.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # pieces that have had the pair
    for number, piece in enumerate(pieces):
        for pair in itertools.pairwise(piece):
            pairs[pair] += times[number]
            places[pair].add(number)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(merges) < most:
        negative, best = heapq.heappop(queue)
        if -negative != pairs[best]:
            continue  # of an earlier count; the one of now is in the queue too
        if -negative < LEAST_COUNT:
            break
        changes: Counter[Pair] = Counter()
        for number in places.pop(best):
            before, after = pieces[number], _merge(pieces[number], best, FIRST_MERGE + len(merges))
            for pair in itertools.pairwise(before):
                changes[pair] -= times[number]
            for pair in itertools.pairwise(after):
                changes[pair] += times[number]
                places[pair].add(number)
            pieces[number] = after
        merges.append(best)
        for pair, change in changes.items():
            pairs[pair] += change
            if change and pairs[pair] > 0:
                heapq.heappush(queue, (-pairs[pair], pair))
    return merges


def _merge(tokens: list[int], pair: Pair, merged: int) -> list[int]:
    """With every such pair, from the left, as one token."""
    out: list[int] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] = merged
        else:
            out.append(token)
    return out


def _as_bytes(piece: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in piece.encode("utf-8", LONE_SURROGATES)]
