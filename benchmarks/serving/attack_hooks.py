"""What schemathesis cannot know of `/edit`: base64 here is a picture's, and a good request must not cost minutes.

Read by the schemathesis that `benchmarks.serving attacks` starts. A 2048x2048 edit in eight steps is a good request, and on a
processor it takes minutes in which no other edit is due. What is attacked is the server, so such requests become small.
"""

import base64
import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image

SIDE, STEPS = 64, 2


def _picture(width: int, height: int, mode: str, kind: str) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


PICTURES = [_picture(16, 16, "RGB", "PNG"), _picture(40, 24, "L", "JPEG"), _picture(9, 30, "RGBA", "WEBP")]


def cheaper(body: dict) -> dict:
    """The request with small values where it has large ones that are allowed; what is not allowed stays as it is."""
    small = dict(body)
    for name in ("width", "height"):
        if body.get(name) is None or (type(body[name]) is int and SIDE < body[name] <= 2048):
            small[name] = SIDE
    if type(body.get("steps")) is int and STEPS < body["steps"] <= 8:
        small["steps"] = STEPS
    if body.get("reference_area") == "stock":  # scales every picture to a megapixel
        small["reference_area"] = "output"
    return small


schemathesis.openapi.format("byte", st.sampled_from([*PICTURES, "data:image/png;base64," + PICTURES[0]]))


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict):
        case.body = cheaper(case.body)
