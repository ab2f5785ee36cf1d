"""JSON from outside: what it would cost to parse, before it is parsed.

A parser makes an object of some hundred bytes for every two characters of `[],[],`: 60 MB become 1.6 GB and half a
minute in which Python does nothing else. Pictures in base64 are the opposite, few values and long texts. So what lies
outside of texts is bounded, and texts only by what the route allows. Both are told apart in C, some GB a second, and as
the pieces of a body come, so that what costs too much is refused from its beginning.
"""

import math
import re

from pydantic_core import from_json

from pipeline.images import EditError

MAX_VALUES = 20_000  # of arrays, objects, and their items
MAX_QUOTES = 40_000
MAX_OUTSIDE_BYTES = 2**20  # numbers, names and white space; the texts between quotation marks do not count
MAX_DEPTH = 64
MAX_DIGITS = 400  # of one number; Python refuses to read integers of more than 4300

_TOKENS = re.compile(rb"[\[\]{}]|[-+.0-9eE]{%d,}" % MAX_DIGITS)


class Bounds:
    """Counts a JSON text as its pieces come."""

    def __init__(self):
        self._values = self._quotes = self._outside_bytes = 0
        self._inside = self._escaped = False  # a text; behind an odd number of backslashes there

    def add(self, piece: bytes) -> bytes:
        """One more piece; returns what of it lies outside of texts. Raises EditError when all pieces are too much."""
        self._quotes += piece.count(b'"')
        if self._quotes > MAX_QUOTES:
            raise EditError(f"The JSON has {self._quotes:,} quotation marks. At most {MAX_QUOTES:,} are allowed.")
        parts = []
        for number, part in enumerate(piece.split(b'"')):
            if number:  # a quotation mark stands before this part
                self._inside ^= not self._escaped
                self._escaped = False
            if not self._inside:
                parts.append(part)
                continue
            slashes = len(part) - len(part.rstrip(b"\\")) if part.endswith(b"\\") else 0
            self._escaped = bool(slashes % 2) ^ (self._escaped and slashes == len(part))
        outside = b'"'.join(parts)
        self._outside_bytes += len(outside)
        if self._outside_bytes > MAX_OUTSIDE_BYTES:
            text = f"The JSON has {self._outside_bytes:,} bytes or more outside of texts."
            raise EditError(f"{text} At most {MAX_OUTSIDE_BYTES:,} are allowed.")
        self._values += sum(map(outside.count, (b",", b"[", b"{")))
        if self._values > MAX_VALUES:
            raise EditError(f"The JSON has {self._values:,} values or more. At most {MAX_VALUES:,} are allowed.")
        return outside


def check_json(text: bytes) -> None:
    """Raises EditError when parsing this UTF-8 text would cost more than any request of ours is worth."""
    if b"\0" in text:  # also how UTF-16 and UTF-32 begin, in which the bytes below mean something else
        raise EditError("This is not JSON: it has zero bytes. Allowed: UTF-8.")
    depth = 0
    for match in _TOKENS.finditer(Bounds().add(text)):
        if match[0] in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise EditError(f"The JSON is nested more than {MAX_DEPTH} deep.")
        elif match[0] in b"]}":
            depth -= 1
        else:
            raise EditError(f"A number in the JSON has more than {MAX_DIGITS} digits.")


def read_json(text: bytes | str) -> dict:
    """A JSON object; EditError on anything else, NaN, infinity and half a surrogate pair included."""
    text = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    check_json(text)
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise EditError(f"This is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise EditError(f"A JSON object was expected, not {type(value).__name__}.")
    if _is_infinite(value):  # 1e999 is written like any number
        raise EditError("A number in the JSON is too large. Allowed: up to 1.7e308.")
    return value


def _is_infinite(value) -> bool:
    """Whether one of the values is; there are at most MAX_VALUES."""
    if isinstance(value, (dict, list)):
        return any(map(_is_infinite, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and math.isinf(value)
