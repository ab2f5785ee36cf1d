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
