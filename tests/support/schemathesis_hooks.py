"""What schemathesis cannot know: base64 here is the base64 of a picture. Read by `test_http_broken.py`."""

import base64
import io

import schemathesis
from hypothesis import strategies as st
from PIL import Image


def picture(width: int, height: int, mode: str, kind: str) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


# Square: of another shape the result could be too long for a width that is allowed by itself, which no schema can say.
PICTURES = [picture(16, 16, "RGB", "PNG"), picture(40, 40, "L", "JPEG"), picture(9, 9, "RGBA", "WEBP")]
PICTURES.append("data:image/png;base64," + PICTURES[0])

schemathesis.openapi.format("byte", st.sampled_from(PICTURES))


@schemathesis.hook
def filter_case(context, case) -> bool:
    """Leaves out a result of more than 200 to 1, which the server refuses and the document says in words only."""
    body = case.body if isinstance(case.body, dict) else {}
    sides = [body.get(name) for name in ("width", "height")]
    if not all(type(side) in (int, float) and 1 <= side <= 2048 for side in sides):
        return True
    return max(sides) <= 200 * min(sides)
