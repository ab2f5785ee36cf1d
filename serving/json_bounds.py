"""JSON from outside: what it would cost to parse, before it is parsed.

A parser makes an object of some hundred bytes for every two characters of `[],[],`: 60 MB become 1.6 GB and half a
minute in which Python does nothing else. Pictures in base64 are the opposite, few values and long texts. So the values
are bounded and the bytes only by what the route allows. Counting bytes is done in C, some GB a second; only a text that
passes is looked at token by token, for its depth and its numbers.
"""

import math
import re

from pydantic_core import from_json

from pipeline.images import EditError

MAX_VALUES = 20_000  # of arrays, objects, and their items
MAX_QUOTES = 40_000
MAX_DEPTH = 64
MAX_DIGITS = 400  # of one number; Python refuses to read integers of more than 4300

# A text, a bracket, or a long number. The quantifiers are possessive: a text that never ends is not tried again.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]|[-+.0-9eE]{%d,}' % MAX_DIGITS, re.DOTALL)


def check_values(count: int) -> None:
    """Raises EditError when that many values, or more, are too many."""
    if count > MAX_VALUES:
        raise EditError(f"The JSON has {count:,} values or more. At most {MAX_VALUES:,} are allowed.")


def count_values(text: bytes) -> int:
    """A bound on the values of a JSON text, or of a piece of one: commas and brackets, those inside texts too."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def check_json(text: bytes) -> None:
    """Raises EditError when parsing this UTF-8 text would cost more than any request of ours is worth."""
    if b"\0" in text:  # also how UTF-16 and UTF-32 begin, in which the bytes below mean something else
        raise EditError("This is not JSON: it has zero bytes. Allowed: UTF-8.")
    check_values(count_values(text))
    quotes = text.count(b'"')
    if quotes > MAX_QUOTES:
        raise EditError(f"The JSON has {quotes:,} quotation marks. At most {MAX_QUOTES:,} are allowed.")
    depth = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise EditError(f"The JSON is nested more than {MAX_DEPTH} deep.")
        elif first in b"]}":
            depth -= 1
        elif first != 0x22:
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
