"""How people ask for the edits: short commands written by hand, expanded with objects and politeness.

A family has `commands`, imperatives that may hold {it} (or {p} and {q}, the first and the second picture), and `looks`,
which stand alone ("pencil sketch"). Both are kept as one string with "|" between entries: a table that a person
can read beats one entry a line. No sentence may fit two edits; the tests check that none belongs to two.
"""

import re
from dataclasses import dataclass

_OBJECTS = (
    "it",
    "this",
    "this picture",
    "the photo",
    "this image",
    "my photo",
    "the picture",
    "this photo",
    "the image",
)
_POLITE = ("{c}", "please {c}", "{C}.", "{c} please", "can you {c}?", "{C}", "could you {c}", "now {c}", "{c}!")
_POLITE += ("Please {c}.", "i want you to {c}", "{c}, please", "Can you {c}?", "just {c}")
_PAIRS = (
    ("picture 1", "picture 2"),
    ("the first picture", "the second picture"),
    ("image 1", "image 2"),
    ("the first photo", "the second photo"),
    ("photo 1", "photo 2"),
    ("the first image", "the second image"),
    ("Picture 1", "Picture 2"),
    ("the first one", "the second one"),
    ("the first", "the second"),
)


@dataclass(frozen=True)
class Wording:
    """`label` and `preset` are for the page; `commands` and `looks` become the phrasings."""

    label: str
    preset: str
    commands: str
    looks: str

    @property
    def pictures(self) -> int:
        """1 or 2: how many pictures its commands speak of."""
        return 2 if "{p}" in self.commands else 1


WORDINGS: dict[str, Wording] = {
    "black and white": Wording(
        "Black and white",
        "make it black and white",
        "make {it} black and white|turn {it} into a black and white photo|convert {it} to black and white|"
        "make {it} b&w|remove the colors from {it}|remove all colours from {it}|take the colour out of {it}|"
        "convert {it} to grayscale|make {it} greyscale|turn {it} into a monochrome picture|"
        "make {it} black & white|desaturate {it}|drain the color from {it}|show {it} in shades of gray|"
        "give {it} a classic black and white look|make everything grey|get rid of the colours",
        "black and white|b&w|grayscale|greyscale|monochrome|bw|no colour|no colors|in black and white|"
        "black & white|shades of grey|desaturated|noir black and white|black and white photograph",
    ),
    "sepia": Wording(
        "Sepia",
        "make it sepia",
        "make {it} sepia|turn {it} sepia|give {it} a sepia tone|add a sepia filter to {it}|convert {it} to sepia|"
        "tone {it} in sepia brown|make {it} look like a sepia photograph|make {it} brown like a photo from 1900|"
        "make {it} sepia toned|apply a sepia effect to {it}|turn {it} into an antique brown photograph|"
        "make {it} look like a victorian photograph|give {it} old brown tones|make {it} look like the wild west|"
        "put {it} in brown sepia tones",
        "sepia|sepia tone|sepia toned|sepia filter|sepia effect|sepia photo|old brown photograph|"
        "brown sepia tones|antique sepia|in sepia|daguerreotype in sepia|western sepia look",
    ),
    "negative": Wording(
        "Negative",
        "invert the colors",
        "invert {it}|invert the colors of {it}|invert the colours|make {it} a negative|turn {it} into a negative|"
        "make {it} look like a photo negative|reverse the colors of {it}|reverse all the colours|"
        "show {it} as a film negative|swap light and dark in {it}|give {it} inverted colors|"
        "make the colors opposite|turn every colour into its opposite|convert {it} to a negative|"
        "make dark bright and bright dark in {it}|make white black and black white",
        "negative|inverted colors|inverted colours|film negative|photo negative|colour negative|color inversion|"
        "opposite colors|invert|reversed colours|negative image|as a negative",
    ),
    "warm sunset": Wording(
        "Warm sunset",
        "make it a warm sunset",
        "make {it} a warm sunset|make {it} look like sunset|put {it} in the light of a warm sunset|"
        "turn {it} into a sunset scene|give {it} warm sunset light|light {it} with the setting sun|"
        "make {it} look like golden hour|change the time of day to sunset|"
        "make {it} look like dusk with an orange sky|bathe {it} in evening sun|add a warm sunset glow to {it}|"
        "make the light of {it} warm like at sunset|make {it} evening with a glowing sky|"
        "make {it} look like a summer evening at sundown|let the sun set in {it}",
        "warm sunset|sunset|golden hour|sunset light|at sunset|evening sun|sundown|warm evening light|sunset glow|"
        "as if the sun was setting|warm sunset light|summer sunset",
    ),
    "moonlit night": Wording(
        "Moonlit night",
        "turn it into a moonlit night",
        "make {it} a moonlit night|turn {it} into night|make {it} night|make {it} look like night with a moon|"
        "make {it} as if it was night, with moonlight|put {it} in the moonlight|turn day into night|"
        "change the time of day to night|light {it} by the full moon|add a moon and make {it} night|"
        "make {it} a dark blue night scene|show {it} at midnight under the moon|give {it} moonlight|"
        "make {it} look like it was taken at night|make {it} nighttime|put a full moon in {it}",
        "moonlit night|night|at night|moonlight|night time|night scene|midnight|day to night|under a full moon|"
        "as if it was night, with moonlight|moonlit|full moon night|nighttime with a moon",
    ),
    "pencil sketch": Wording(
        "Pencil sketch",
        "turn this into a pencil sketch",
        "make {it} a pencil sketch|turn {it} into a pencil sketch|turn {it} into a hand-drawn pencil drawing|"
        "sketch {it}|draw {it} with a pencil|make {it} look like a pencil drawing|"
        "convert {it} to a graphite sketch|redraw {it} as a sketch|make {it} look hand drawn in pencil|"
        "draw {it} with a pencil on white paper|turn {it} into a line drawing|give {it} a pencil drawing effect|"
        "make {it} a sketch|sketch {it} with a grey pencil|make me a pencil portrait|turn {it} into a drawing|"
        "make a pencil drawing from {it}",
        "pencil sketch|pencil drawing|sketch|hand-drawn sketch|graphite drawing|line drawing|pencil|"
        "as a pencil sketch|a drawing in pencil|sketch style|pencil art|hand drawn|drawn with a pencil",
    ),
    "cartoon": Wording(
        "Cartoon",
        "make it a cartoon with outlines",
        "make {it} a cartoon|turn {it} into a cartoon|cartoonify {it}|make {it} look like a cartoon|"
        "turn {it} into a cartoon with black outlines|make me look like a cartoon|make {it} a comic|"
        "turn {it} into a comic book picture|draw {it} as a cartoon|make {it} look like a comic strip|"
        "make {it} cartoon style with outlines|give {it} flat colors and dark outlines|toonify {it}|"
        "turn me into a cartoon character|convert {it} to cartoon|make {it} look like an animated film|"
        "cartoonize {it}",
        "cartoon|cartoon with outlines|cartoon style|comic style|comic book|cartoon effect|as a cartoon|"
        "anime style|toon look|like a comic|cartoon filter|cartoon drawing|flat colours with outlines",
    ),
    "oil painting": Wording(
        "Oil painting",
        "turn it into an oil painting",
        "make {it} an oil painting|turn {it} into an oil painting|paint {it} in oils|"
        "make {it} look like an oil painting|paint {it} with thick brush strokes|convert {it} to an oil painting|"
        "paint {it} in oil on canvas|make {it} look like an old master painting|give {it} an oil paint effect|"
        "turn {it} into a painting with thick paint|make {it} look painted in oil|paint {it} like a van gogh|"
        "redo {it} as an oil painting|make an oil portrait of {it}",
        "oil painting|oil on canvas|oil paint|as an oil painting|oil painting style|thick brush strokes|"
        "painted in oil|oil portrait|old master oil painting|oils|oil paint effect|impasto oil",
    ),
    "watercolour": Wording(
        "Watercolour",
        "paint it as a watercolor",
        "make {it} a watercolor|turn {it} into a watercolour|paint {it} in watercolor|paint {it} in watercolours|"
        "make {it} look like a watercolor painting|turn {it} into a watercolour painting|"
        "convert {it} to watercolor|paint {it} with watercolors on white paper|give {it} a watercolour effect|"
        "make {it} an aquarelle|paint {it} with wet washes of colour|make {it} look like an aquarelle painting|"
        "redo {it} as a watercolour|make {it} a soft watercolor with white edges",
        "watercolor|watercolour|watercolor painting|watercolour painting|aquarelle|in watercolors|"
        "watercolour style|watercolor effect|as a watercolour|water colour|watercolor on paper|watercolour wash|"
        "aquarelle on paper",
    ),
    "pixel art": Wording(
        "Pixel art",
        "make it pixel art",
        "make {it} pixel art|turn {it} into pixel art|pixelate {it}|make {it} look like an old video game|"
        "convert {it} to 8-bit|make {it} 8 bit|turn {it} into 8-bit graphics|make {it} pixelated|"
        "give {it} big pixels|make {it} look like a retro game|turn {it} into blocks|pixelize {it}|"
        "make {it} look like minecraft|show {it} in low resolution pixels|make {it} a mosaic of squares|"
        "give {it} a retro pixel look",
        "pixel art|8-bit|8 bit|pixelated|pixels|retro game graphics|pixel style|big pixels|pixel art style|"
        "pixelate|as pixel art|old video game|blocky pixels|16-bit sprite",
    ),
    "neon edges": Wording(
        "Neon edges",
        "make the edges glow in neon",
        "give {it} neon edges|make the edges of {it} glow in neon|turn {it} into neon lines|"
        "draw {it} with neon lights|make {it} glowing neon outlines on black|make {it} neon|outline {it} in neon|"
        "turn {it} into a neon sign|show only the edges of {it}, glowing|trace {it} with neon light|"
        "make {it} look like tron|convert {it} to neon edges|make {it} look like neon tubes in the dark|"
        "give {it} a neon outline effect|light up the contours of {it} in neon",
        "neon edges|neon|neon outlines|neon lines|glowing edges|neon sign|neon lights|neon contours|tron style|"
        "neon glow lines|as a neon sign|neon effect|glowing outlines on black",
    ),
    "thermal camera": Wording(
        "Thermal camera",
        "show it like a thermal camera",
        "make {it} look like a thermal camera|show {it} through a thermal camera|turn {it} into a heat map|"
        "make {it} thermal|convert {it} to thermal vision|give {it} heat vision|show the heat in {it}|"
        "make {it} look like infrared heat|show {it} in thermal colors|make {it} predator vision|"
        "turn {it} into a thermal image|apply thermal imaging to {it}|show {it} in infrared|"
        "make {it} look like a heat camera picture",
        "thermal camera|thermal|heat map|heat vision|thermal vision|infrared camera|thermal imaging|infrared|"
        "thermal image|heatmap|as seen by a thermal camera|thermal colours|predator vision",
    ),
    "vintage film": Wording(
        "Vintage film",
        "make it look like vintage film",
        "make {it} look like vintage film|give {it} a vintage film look|make {it} vintage|"
        "turn {it} into a faded film photo|make {it} look like an old polaroid|add a light leak and fade {it}|"
        "make {it} look like 1970s film|give {it} a retro film look|make {it} look like analog film|"
        "fade {it} like old film|make {it} look like a photo from the seventies|convert {it} to vintage|"
        "make {it} look like it was shot on kodak film|give {it} faded vintage colours|"
        "apply a vintage filter to {it}",
        "vintage film|vintage|retro film|polaroid|old film|70s photo|faded film|analog film|vintage filter|"
        "analogue photo|vintage look|lomo film with light leak|faded vintage photo",
    ),
    "emboss": Wording(
        "Emboss",
        "emboss it",
        "emboss {it}|make {it} embossed|turn {it} into a relief|make {it} look carved in stone|"
        "give {it} an emboss effect|make {it} look like a stone relief|turn {it} into a grey relief|"
        "make {it} look stamped in metal|apply an emboss filter to {it}|make {it} look like a coin|"
        "carve {it} into stone|press {it} into paper|engrave {it} in stone|show {it} as a bas-relief|"
        "make {it} look chiselled",
        "emboss|embossed|relief|stone relief|emboss effect|carved in stone|bas-relief|stamped in metal|"
        "emboss filter|raised relief|as a relief|chiselled stone|embossed look",
    ),
    "soft glow": Wording(
        "Soft glow",
        "add a soft glow",
        "give {it} a soft glow|add a soft glow to {it}|make {it} dreamy|make {it} glow softly|"
        "make {it} soft and dreamy|add a gentle bloom to {it}|give {it} a soft focus|make {it} look like a dream|"
        "soften {it} with a gentle glow|add a dreamy haze to {it}|give {it} a romantic soft light|"
        "apply a soft glow filter to {it}|make {it} hazy and soft|give {it} an angelic glow|"
        "make the light of {it} soft",
        "soft glow|dreamy|soft focus|dreamy glow|soft light|gentle glow|bloom|soft and dreamy|hazy glow|dreamlike|"
        "soft bloom|romantic soft focus|orton effect",
    ),
    "high contrast": Wording(
        "High contrast",
        "make it high contrast",
        "make {it} high contrast|increase the contrast of {it}|boost the contrast|add more contrast to {it}|"
        "give {it} more contrast|raise the contrast of {it}|make {it} punchy|make {it} bold with strong contrast|"
        "turn up the contrast of {it}|crank up the contrast|give {it} a strong contrast|make {it} more contrasty|"
        "make the darks darker and the lights lighter|make {it} pop with contrast|push the contrast of {it} hard|"
        "make {it} dramatic with high contrast",
        "high contrast|more contrast|strong contrast|contrast boost|punchy contrast|extreme contrast|contrast up|"
        "increase contrast|bold contrast|dramatic contrast|higher contrast|max contrast",
    ),
    "mirror": Wording(
        "Mirror",
        "mirror it",
        "mirror {it}|flip {it} horizontally|make a mirror image of {it}|swap left and right|"
        "turn {it} left to right|flip {it} left to right|mirror {it} horizontally|reflect {it} horizontally|"
        "show {it} as in a mirror|flip {it} sideways|swap the left and right sides of {it}|make {it} mirrored|"
        "turn {it} into its mirror image|make left right and right left in {it}",
        "mirror|mirror image|mirrored|horizontal flip|flip horizontally|flipped left to right|horizontal mirror|"
        "left right flip|as seen in a mirror|mirror view|flip horizontal|h-flip",
    ),
    "upside down": Wording(
        "Upside down",
        "turn it upside down",
        "turn {it} upside down|flip {it} upside down|make {it} upside down|flip {it} vertically|"
        "put {it} on its head|swap top and bottom|flip {it} top to bottom|turn {it} on its head|"
        "make the top the bottom|show {it} upside down|stand {it} on its head|mirror {it} vertically|"
        "flip {it} over so that the top is at the bottom|turn {it} the wrong way up",
        "upside down|upside-down|vertical flip|flip vertically|flipped upside down|top to bottom flip|on its head|"
        "head over heels|wrong way up|bottom up|flip vertical|topsy-turvy",
    ),
    "keep unchanged": Wording(
        "Keep unchanged",
        "keep it unchanged",
        "keep {it} unchanged|leave {it} as it is|do nothing|don't change anything|change nothing in {it}|"
        "do not edit {it}|keep {it} the same|leave {it} alone|show {it} without any edit|return {it} unchanged|"
        "keep {it} as is|don't touch {it}|do not change {it}|give me the original of {it}|make no changes to {it}|"
        "leave {it} untouched|keep the original",
        "unchanged|no change|original|as it is|nothing|no edit|same picture|keep as is|no changes|the original|"
        "no effect|untouched|the same|normal",
    ),
    "tint": Wording(
        "Tint",
        "tint it red",
        "tint {it} {c}|make {it} {c}|make everything {c}|give {it} a {c} tint|turn {it} {c}|color {it} {c}|"
        "colour {it} {c}|add a {c} tint to {it}|tint {it} with {c}|make {it} all {c}|wash {it} in {c}|"
        "apply a {c} filter to {it}|put a {c} color filter on {it}|light {it} with {c} light|"
        "make the whole thing {c}|give {it} a {c} colour cast|shade {it} in {c}|make {it} look {c}|"
        "view {it} through {c} glass|dye {it} {c}",
        "{c} tint|{c}|{c} filter|tinted {c}|{c} colour tint|{c} light|all {c}|{c} tone|{c} color filter|in {c}|"
        "{c} everywhere|{c} wash|everything in {c}",
    ),
    "duotone": Wording(
        "Duotone",
        "make it a navy and gold duotone",
        "make {it} a {a} and {b} duotone|turn {it} into a duotone of {a} and {b}|make {it} duotone, {a} and {b}|"
        "use only {a} and {b} in {it}|show {it} in {a} and {b}|color {it} in {a} and {b}|colour {it} {a} and {b}|"
        "make the shadows {a} and the highlights {b}|make the dark parts {a} and the light parts {b}|"
        "give {it} {a} shadows and {b} highlights|make {it} {a} and {b}|convert {it} to two colours, {a} and {b}|"
        "print {it} in two colors: {a} and {b}|apply a {a} and {b} duotone to {it}|"
        "make {it} a {b} and {a} duotone|give {it} {b} lights and {a} shadows|map dark to {a} and bright to {b}|"
        "make {it} a {a}/{b} duotone",
        "duotone {a} and {b}|{a} and {b} duotone|{a} {b} duotone|{a} and {b}|duotone in {b} and {a}|"
        "{b} and {a} duotone|two tones, {a} and {b}|{a} shadows, {b} highlights|only {a} and {b}|"
        "{a} to {b} gradient map|{a}/{b} duotone|duotone with {b} highlights and {a} shadows",
    ),
    "side by side": Wording(
        "Side by side",
        "place the two pictures side by side",
        "place the two pictures side by side|put {p} and {q} side by side|put both pictures side by side|"
        "show {p} on the left and {q} on the right|put {p} next to {q}|show both images next to each other|"
        "make the left half {p} and the right half {q}|split the view between {p} and {q}|"
        "put {p} left and {q} right|make a split screen of {p} and {q}|join {p} and {q} left and right|"
        "set {q} beside {p}|make a diptych of {p} and {q}|compare {p} and {q} side by side",
        "side by side|both pictures side by side|split screen|next to each other|half and half, left and right|"
        "diptych|left picture 1, right picture 2|the two photos side by side|two pictures next to each other",
    ),
    "blend": Wording(
        "Blend",
        "blend both pictures",
        "blend both pictures|blend {p} and {q}|blend {p} with {q}|mix both images|mix {p} with {q}|"
        "make a double exposure of {p} and {q}|overlay {q} on {p} half transparent|fade {p} into {q} half way|"
        "average {p} and {q}|make {q} shine through {p}|show {p} and {q} at the same time, half transparent|"
        "dissolve {p} into {q}|lay {p} over {q} at 50% opacity|merge the two pictures into one double exposure|"
        "superimpose {q} on {p}|blend the two pictures together",
        "blend|blend both|double exposure|mix the two pictures|blend the two photos|50/50 blend|"
        "half transparent overlay|both pictures blended|superimposed|crossfade half way|blended together",
    ),
    "colour transfer": Wording(
        "Colours of picture 2",
        "give picture 1 the colours of picture 2",
        "give {p} the colours of {q}|give {p} the colors of {q}|use the color palette of {q} for {p}|"
        "transfer the colours of {q} to {p}|make the colors of {p} match {q}|color {p} like {q}|"
        "recolour {p} with the palette of {q}|match the colors of {p} to {q}|"
        "take the colours from {q} and put them on {p}|color grade {p} like {q}|paint {p} in the colours of {q}|"
        "apply the color mood of {q} to {p}|copy the colors of {q} onto {p}|make {p} have the same colours as {q}",
        "colour transfer|color transfer|picture 1 in the colours of picture 2|match colors|color match|"
        "the colours of picture 2|same colors as picture 2|color palette of the second picture|colour match",
    ),
    "corner": Wording(
        "Picture in picture",
        "put picture 2 in the corner of picture 1",
        "put {q} in the corner of {p}|place {q} in the bottom right corner of {p}|"
        "put a small {q} into the corner of {p}|make {q} a small inset in {p}|show {q} small in the corner of {p}|"
        "insert {q} in the lower right corner of {p}|add {q} as a thumbnail on {p}|"
        "do picture in picture with {p} and {q}|put {q} as a little framed picture in {p}|"
        "shrink {q} and put it in the corner of {p}|stick {q} in the corner of {p} like a stamp|"
        "set {q} as a small window in {p}|put the second picture in the corner|"
        "overlay a tiny {q} at the bottom right of {p}",
        "picture in picture|picture-in-picture|pip|picture 2 in the corner|second picture in the corner|"
        "small inset|thumbnail in the corner|inset of picture 2 in picture 1|corner inset|"
        "photo 2 in the bottom right corner",
    ),
}


def preset_prompts() -> list[tuple[str, str]]:
    """(label, prompt) for the page: one a family, the two-picture families last."""
    return [(wording.label, wording.preset) for wording in WORDINGS.values()]


def _polite(command: str, index: int) -> str:
    return _POLITE[index % len(_POLITE)].format(c=command, C=command[0].upper() + command[1:])


def expand(wording: Wording, **words: str) -> tuple[str, ...]:
    """Each command plain, then with other objects and politeness in rotation; each look in three ways of typing it."""
    sentences: list[str] = [] if words else [wording.preset]
    for i, command in enumerate(wording.commands.split("|")):
        repeats = 6 if any(slot in command for slot in ("{it}", "{p}", "{q}")) else 3
        for j in range(repeats):
            turn = j + i if j else 0
            it = _OBJECTS[turn % len(_OBJECTS)]
            first, second = _PAIRS[turn % len(_PAIRS)]
            sentences.append(_polite(command.format(it=it, p=first, q=second, **words), i + 5 * j if j else 0))
    for look in wording.looks.split("|"):
        look = look.format(**words)
        sentences += [look, look[0].upper() + look[1:] + ".", look + " please"]
    return tuple(dict.fromkeys(sentence.replace(" a orange", " an orange") for sentence in sentences))


def words_of(phrasing: str) -> str:
    """The phrasing without case, final punctuation and doubled spaces: equal words are the same phrasing."""
    return re.sub(r"\s+", " ", phrasing.casefold()).strip(" .!?,")
