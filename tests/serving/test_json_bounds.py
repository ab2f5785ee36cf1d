"""JSON from outside and from us: what a text may cost, known before it is parsed; what is none; what any value becomes."""

import json
import random

import numpy as np
import pytest
import torch

from pipeline.images import EditError
from serving.access import plain
from serving.json_bounds import MAX_OUTSIDE_BYTES, Bounds, check_json, read_json

MB = 2**20


@pytest.mark.parametrize("unit", [b" ", b":", b"\n", b"a", b"true ", b"9" * 39 + b" ", b'"" ', b"[],", b'"\\"" '])
def test_what_lies_outside_of_texts_is_refused_within_its_first_megabyte_however_long_the_body_is(unit):
    piece, bounds, came = unit * (64 * 1024 // len(unit)), Bounds(), 0
    with pytest.raises(EditError, match="At most"):
        while came < 60 * MB:
            came += len(piece)
            bounds.add(piece)
    assert came <= MAX_OUTSIDE_BYTES + 2 * len(piece)


def test_a_long_text_costs_nothing_whatever_is_in_it():
    text = json.dumps({"image": "A" * 8 * MB, "prompt": "[{,:\\n " * 10**6, "negative_prompt": '"' * 9999})
    assert read_json(text) == json.loads(text)


@pytest.mark.parametrize("seed", range(20))
def test_a_text_in_any_pieces_counts_as_it_does_whole(seed):
    chance = random.Random(seed)
    values = ["".join(chance.choices('\\"a[{, ', k=chance.randrange(12))) for _ in range(40)]
    text = json.dumps({f"k{number}": [value, number] for number, value in enumerate(values)}).encode()
    outside, pieces, start = Bounds().add(text), [], 0
    bounds = Bounds()
    while start < len(text):
        end = start + chance.randrange(1, 9)
        pieces.append(bounds.add(text[start:end]))
        start = end
    assert b"".join(pieces).replace(b'"', b"") == outside.replace(b'"', b"")
    assert outside.replace(b'"', b"") == _without_texts(text)


def _without_texts(text: bytes) -> bytes:
    """Character by character, as the grammar says it."""
    kept, inside, escaped = bytearray(), False, False
    for byte in text:
        if inside:
            inside, escaped = byte != 0x22 or escaped, byte == 0x5C and not escaped
        elif byte == 0x22:
            inside = True
        else:
            kept.append(byte)
    return bytes(kept)


def test_depth_and_long_numbers_are_refused_outside_of_texts_only():
    check_json(json.dumps({"text": "[" * 100 + "9" * 1000, "deep": [[[1]]] * 3}).encode())
    for text, says in ((b"[" * 65 + b"]" * 65, "64 deep"), (b'{"a": ' + b"9" * 401 + b"}", "400 digits")):
        with pytest.raises(EditError, match=says):
            check_json(text)
    check_json(b"[" * 64 + b"]" * 64)


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '"text"', '{"a": NaN}', '{"a": -Infinity}', "[" * 100_000,
                                  '{"a": "\\ud800"}', b"\xff\xfe{"])  # fmt: skip
def test_what_is_no_json_object_is_an_edit_error(text):
    with pytest.raises(EditError):
        read_json(text)


def test_plain_makes_json_of_anything():
    value = {1: np.float32(2.0), "nan": float("nan"), "tuple": (1, None, True), "dtype": torch.float32}
    assert json.dumps(plain(value)) == '{"1": 2.0, "nan": null, "tuple": [1, null, true], "dtype": "torch.float32"}'
