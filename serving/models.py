"""What goes over HTTP, as pydantic models: they check a request's fields, and FastAPI makes the OpenAPI document of them.

The settings are not listed here: their models are made from `EditParams`, its limits, choices and meanings. How many
pictures came decides which modes there are, so POST /edit has three models, one for each number of pictures.
"""

import base64
import binascii
import dataclasses
import reprlib
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from engine.settings import CHOICES, LIMITS, MAX_PROMPT_CHARS, PICTURES, EditParams
from engine.statistics import EngineStats
from pipeline.images import EditError
from serving.access import FAILURES, KINDS
from serving.decoding import LIMITS as PICTURE_LIMITS

Format = Literal["png", "jpeg"]
FORMATS: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg"}
STOCK_CFG_SCALE = 4.0  # `true_cfg_scale` of diffusers' QwenImageEditPlusPipeline, which `use_cfg` turns on
REFERENCES = ("ref_image", "ref_image_2")  # the second and the third picture

# -------------------------------------------------------------------------------------------------- what is asked


def read_base64(value: Any) -> bytes:
    """The bytes of a base64 text, with or without the data:...;base64, in front that a browser puts there. EditError."""
    if not isinstance(value, str):
        raise EditError(f"It must be a picture in base64, not {type(value).__name__}.")
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditError(f"It is not base64: {error}.") from None


Picture = Annotated[bytes, BeforeValidator(read_base64)]
BASE64: dict[str, Any] = {"format": "byte", "contentEncoding": "base64"}  # what the document says of a Picture


def _whole(value: Any) -> Any:
    """2.0 as 2: JSON has one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _setting(field: dataclasses.Field) -> tuple[Any, FieldInfo]:
    """The type and the field of a model for one field of EditParams."""
    name, options = field.name, dict[str, Any](description=field.metadata["means"])
    if field.default is not dataclasses.MISSING:
        options["default"] = field.default
    if name in CHOICES:
        return Literal[CHOICES[name]], Field(**options)
    if name in LIMITS:
        low, high = LIMITS[name]
        bounds = Field(ge=low, le=high)
        number: Any = Annotated[float, bounds] if field.type is float else Annotated[int, bounds, BeforeValidator(_whole)]
        return (number | None if field.default is None else number), Field(**options)
    if field.type is bool:
        return bool, Field(**options)
    options["max_length"] = MAX_PROMPT_CHARS
    if field.default is dataclasses.MISSING:
        options |= {"min_length": 1, "pattern": r"[^\s\x1c-\x1f\x85]"}  # all that Python strips is white space here
    return str, Field(**options)


class EditBody(BaseModel):
    """What all bodies of POST /edit share. A value of another type than the field's is refused, never converted."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        str_strip_whitespace=True,
        json_schema_extra={"not": {"required": ["use_cfg", "cfg_scale"]}},
    )

    image: Picture = Field(
        description="A picture file (JPEG, PNG, WebP, GIF, BMP, TIFF, ...) in base64; data:...;base64, in front is fine. "
        + PICTURE_LIMITS.sentence(),
        json_schema_extra=BASE64,
    )
    format: Format = Field("png", description="Of the picture in a JSON answer; for bytes the Accept header says it.")
    use_cfg: bool = Field(
        False,
        description="Short for cfg_scale: true is 4, as in the stock pipeline; false is 1, off. Not with cfg_scale.",
    )

    @model_validator(mode="after")
    def _one_guidance(self) -> "EditBody":
        if {"use_cfg", "cfg_scale"} <= self.model_fields_set:
            raise EditError("Both use_cfg and cfg_scale came, and they set the same. Allowed: one of them.")
        return self

    @property
    def pictures(self) -> list[bytes]:
        """The picture files, one to three."""
        return [picture for name in ("image", *REFERENCES) if (picture := getattr(self, name)) is not None]

    def params(self) -> EditParams:
        """The settings. With two pictures, and no mode said, a blend ratio means "blend" and none means "references"."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(EditParams)}
        if "use_cfg" in self.model_fields_set:
            values["cfg_scale"] = STOCK_CFG_SCALE if self.use_cfg else 1.0
        if {"mode", "blend_ratio"} & self.model_fields_set == {"blend_ratio"} and len(self.pictures) == 2:
            values["mode"] = "blend"
        return EditParams(**values)


def _edit_model(name: str, count: int) -> type[EditBody]:
    """The body with `count` pictures."""
    fields: dict[str, Any] = {field.name: _setting(field) for field in dataclasses.fields(EditParams)}
    modes = tuple(mode for mode, (least, most) in PICTURES.items() if least <= count <= most)
    # With two pictures it depends on blend_ratio, so the document tells no default.
    unsaid: dict[str, Any] = {"default": modes[0]} if len(modes) == 1 else {"default_factory": lambda: "references"}
    about = EditParams.__dataclass_fields__["mode"].metadata["means"]
    fields["mode"] = (Literal[modes], Field(description=about, **unsaid))
    for number, (reference, ordinal) in enumerate(zip(REFERENCES, ("second", "third"), strict=True), 2):
        there = (Picture, Field(description=f"The {ordinal} picture, in base64.", json_schema_extra=BASE64))
        fields[reference] = there if number <= count else (None, Field(default=None, description=f"No {ordinal} picture."))
    return create_model(name, __base__=EditBody, __module__=__name__, **fields)


EDIT_BODIES = tuple(_edit_model(name, count) for count, name in enumerate(("EditOne", "EditTwo", "EditThree"), 1))


def check_edit(fields: dict[str, Any]) -> EditBody:
    """The body of POST /edit. Raises EditError in one sentence that says what came and what is allowed."""
    came = [name for name in REFERENCES if fields.get(name) is not None]
    if came == ["ref_image_2"]:
        raise EditError('"ref_image_2" came without "ref_image". Allowed: both, or the second picture in "ref_image".')
    model = EDIT_BODIES[len(came)]
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise EditError(sentence(error, model)) from None


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of the errors in our words: which field, what came, what is allowed."""
    first: Any = error.errors(include_url=False)[0]
    schemas = model.model_json_schema()["properties"]
    name, value = str(first["loc"][0]) if first["loc"] else "", first["input"]
    if first["type"] == "missing":
        return f'"{name}" is missing: {schemas[name]["description"].partition(".")[0]}.'
    if first["type"] == "extra_forbidden":
        return f"Unknown setting {reprlib.repr(name)}. Allowed: {', '.join(schemas)}."
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        return f'"{name}"{text.removeprefix("It")}' if name else text
    if name == "mode" and value in CHOICES["mode"]:
        count = EDIT_BODIES.index(model)
        if not count:
            return f'The mode "{value}" needs a second picture in "ref_image".'
        return f'{("Two", "Three")[count - 1]} pictures came in mode "{value}". Allowed: {allowed(schemas["mode"])}.'
    came = {
        "string_too_long": lambda: f"has {len(value.strip()):,} characters",
        "string_too_short": lambda: "is empty",
        "string_pattern_mismatch": lambda: "is empty",
    }.get(first["type"], lambda: f"is {reprlib.repr(value)}")
    return f"{name} {came()}. Allowed: {allowed(schemas[name])}."


def allowed(schema: dict[str, Any]) -> str:
    """What a field's JSON schema allows, for people."""
    if "anyOf" in schema:
        return " or ".join(allowed(each) for each in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(schema.get("enum") or [schema["const"]])
    if "minimum" in schema:
        kind = "a whole number" if schema["type"] == "integer" else "a number"
        return f"{kind} from {schema['minimum']} to {schema['maximum']}"
    if "maxLength" in schema:
        return f"text of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    return {"boolean": "true, false", "null": "null", "string": "base64"}[schema["type"]]


# -------------------------------------------------------------------------------------------------- what is answered

State = Literal["loading", "ready", "failed", "stopping"]
Phase = Literal["loading", "warming", "ready", "failed", "stopping"]
PHASES: tuple[str, ...] = get_args(Phase)


class RefusalBody(BaseModel):
    """Every answer but a good one."""

    error: str = Field(description="What came and what is allowed.")
    kind: str = Field(
        description="One word for programs.",
        json_schema_extra={
            "enum": [*sorted({*KINDS.values(), *FAILURES, "loading", "failed_to_load", "page_only", "stopping"})]
        },
    )
    detail: str = Field(description="The same text as error.")


class EditAnswer(BaseModel):
    """The picture, and how it came about."""

    image: str = Field(description="The picture file.", json_schema_extra={"contentEncoding": "base64"})
    format: Format
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    seed: int
    stages_ms: dict[str, float | None] = Field(description="Milliseconds of each stage.")
    age_ms: float = Field(description="From the engine's mailbox to done.")
    notes: list[str] = Field(description="What to know of this edit: that the picture was cut, for example.")
    elapsed: float = Field(description="Seconds, from the request's headers to the answer.")


class Ready(BaseModel):
    """Whether an edit would be taken now."""

    state: Phase
    text: str
    fraction: float = Field(description="How far the loading is: 0 to 1.")


class QueueLoad(BaseModel):
    """POST /edit requests."""

    running: int
    waiting: int
    places: int = Field(description="Most that are let in.")
    held_bytes: int = Field(description="What they hold in memory.")


class LiveLoad(BaseModel):
    """Live views."""

    sockets: int
    sessions: int
    waiting: int = Field(description="In line for a session.")


class DecoderLoad(BaseModel):
    """Pictures from outside that need a process of their own to be opened."""

    running: int
    waiting: int
    held_pixels: int = Field(description="Of opened pictures that are still in memory.")
    refused: int = Field(description="Found no place, or got no turn in time.")
    killed: int = Field(description="Processes that ended before their picture was open.")


class Health(BaseModel):
    """How the server fares."""

    state: State
    phase: Phase = Field(description='The state, but "warming" in the last part of "loading".')
    text: str
    fraction: float = Field(description="How far the loading is: 0 to 1.")
    choice: dict[str, Any] = Field(description="Which model, and why.")
    version: str = Field(description="Of this program; see CHANGELOG.md.")
    queue: QueueLoad
    live: LiveLoad
    decoder: DecoderLoad
    memory_bytes: dict[str, int] = Field(description="Of the process, and of the GPU.")
    description: dict[str, Any] = Field(default_factory=dict, description="What runs, when ready.")
    default_size: int | None = Field(default_factory=lambda: None, description="Side of a square of a result's area.")
    stats: EngineStats | None = Field(default_factory=lambda: None, description="What the engine did, when ready.")
