"""The pictures that the pocket model learns from: collected once into a folder, then cropped on the GPU.

    python -m pocket_model.photos OUT [--debs FOLDER]

`collect` takes Debian's wallpaper packages (`apt-get download`, or *.deb files already at hand) and the photographs inside
scikit-image's and scikit-learn's wheels, checks the licence that each package states for each file, drops further
resolutions of one picture, scales the short side to 768 and writes JPEGs with `sources.json`: file, origin, author,
licence, split. Nothing of this is shipped with the project.

The held-out photographs are named here, by hand: people, animals, buildings, flowers, food and landscape, of which no
other view is among the training pictures.

`random_crops` and `procedural` feed the training: whole batches, on the device, no loop over samples.
"""

import argparse
import fnmatch
import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PACKAGES = (
    "gnome-backgrounds",
    "lomiri-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
HELD_OUT = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "china.jpg",
    "EveningGlow",
    "Garden.jpg",
    "FallenLeaf",
    "Bridge_by_Sander_Klootwijk.jpg",
)
# Blank, nearly blank, a second copy or with writing on them: nothing to learn from.
UNUSABLE = ("*Stripes*", "*Waves.png", "*Spring.png", "*Silk.png", "*Arc-Colors*", "*-Dark-no-logo*", "*Traditional*")
UNUSABLE += ("*Elephants_*", "*Grey/*", "*symbolic*", "*focal-ubuntukylin*")
IN_WHEELS = {
    # file: (wheel, author, licence as its README states it)
    "astronaut.png": ("skimage", "NASA", "public domain"),
    "chelsea.png": ("skimage", "Stefan van der Walt", "CC0"),
    "coffee.png": ("skimage", "Rachel Michetti", "CC0"),
    "rocket.jpg": ("skimage", "SpaceX", "CC0"),
    "hubble_deep_field.jpg": ("skimage", "NASA", "public domain"),
    "brick.png": ("skimage", "CC0Textures", "CC0"),
    "grass.png": ("skimage", "CC0Textures", "CC0"),
    "gravel.png": ("skimage", "CC0Textures", "CC0"),
    "china.jpg": ("sklearn", "danielbuechele", "CC-BY-2.0"),
    "flower.jpg": ("sklearn", "vultilion", "CC-BY-2.0"),
}
FREE = ("CC0", "CC-BY", "CC BY", "GPL", "LGPL", "public domain", "Expat", "MIT")
SHORT_SIDE = 768


# ------------------------------------------------------------------------------------------------------------ collect


def stated_licence(package: Path, picture: Path) -> tuple[str, str]:
    """(author, licence) that the package's copyright file (DEP-5) or the wallpaper's own metadata states."""
    metadata = next((p / "metadata.json" for p in picture.parents if (p / "metadata.json").exists()), None)
    if metadata:
        plugin = json.loads(metadata.read_text())["KPlugin"]
        return ", ".join(a["Name"] for a in plugin.get("Authors", [])), plugin.get("License", "unknown")
    found = ("unknown", "unknown")
    for stanza in re.split(r"\n\s*\n", next(package.rglob("copyright")).read_text(errors="replace")):
        fields = dict(re.findall(r"^(\S+):[ \t]*((?:.*)(?:\n[ \t]+.*)*)", stanza, re.M))
        patterns = [Path(p).name for p in fields.get("Files", "").split() if not p.startswith("debian/")]
        if any(fnmatch.fnmatch(picture.name, pattern) for pattern in patterns):
            author = re.sub(r"\s+", " ", fields.get("Copyright", "unknown")).strip()
            found = author, fields.get("License", "unknown").splitlines()[0].strip()
    return found


def fingerprint(image: Image.Image) -> np.ndarray:
    """A 16x16 grey thumbnail of zero mean: two resolutions or crops of one picture differ little."""
    small = np.asarray(image.convert("L").resize((16, 16), Image.BOX), dtype=np.float32)
    return small - small.mean()


def scaled(image: Image.Image) -> Image.Image:
    factor = SHORT_SIDE / min(image.size)
    if factor >= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.LANCZOS)


def candidates(debs: Path, unpacked: Path):
    """(path, origin, author, licence) of every usable picture of the packages and wheels, largest first in a package."""
    for deb in sorted(debs.glob("*.deb")):
        package = unpacked / deb.name.split("_")[0]
        if package.name not in PACKAGES:
            continue
        package.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(deb), str(package)], check=True)
        files = [f for f in package.rglob("*") if f.suffix.lower() in (".jpg", ".png", ".webp") and not f.is_symlink()]
        for path in sorted(files, key=lambda f: (-f.stat().st_size, f.name)):
            usable = path.stat().st_size > 60_000 and "screenshot" not in path.name
            if usable and not any(fnmatch.fnmatch(str(path), pattern) for pattern in UNUSABLE):
                yield path, package.name, *stated_licence(package, path)
    for name, (wheel, author, licence) in IN_WHEELS.items():
        spec = importlib.util.find_spec(wheel)
        if spec is None:
            raise SystemExit(f"{wheel} is not installed: pip install scikit-image scikit-learn")
        path = next(Path(spec.origin).parent.rglob(name))
        yield path, {"skimage": "scikit-image", "sklearn": "scikit-learn"}[wheel], author, licence


def collect(out: Path, debs: Path | None) -> list[dict]:
    """Fills `out` and returns the entries of its `sources.json`."""
    Image.MAX_IMAGE_PIXELS = None
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict] = []
    prints: list[tuple[np.ndarray, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        if debs is None:
            debs = Path(temporary) / "debs"
            debs.mkdir()
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=True)
        for path, origin, author, licence in candidates(debs, Path(temporary) / "unpacked"):
            if not any(mark in licence for mark in FREE):
                print(f"skipped, licence {licence!r}: {path.name}")
                continue
            image = scaled(Image.open(path).convert("RGB"))
            mark = fingerprint(image)
            if any(np.abs(mark - other).mean() < 6 for other, _ in prints):
                continue
            held = next((name for name in HELD_OUT if name in (path.name, *path.parts)), None)
            prints.append((mark, path.name))
            file = f"{len(entries):03d}.jpg"
            image.save(out / file, quality=90)
            entry = {"file": file, "origin": origin, "name": _name(path), "author": author, "licence": licence}
            entries.append(entry | {"split": "held-out" if held else "train"})
    (out / "sources.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    return entries


def _name(path: Path) -> str:
    """KDE names the folder, not the file."""
    return path.parents[2].name if path.parents[1].name == "contents" else path.name


# --------------------------------------------------------------------------------------------------------- to the GPU


def load_photos(folder: str | Path, split: str, device) -> list[Tensor]:
    """The pictures of one split ("train" or "held-out"): uint8 (3, H, W) each, on the device, by file name."""
    entries = json.loads((Path(folder) / "sources.json").read_text())
    photos = []
    for entry in sorted(entries, key=lambda e: e["file"]):
        if entry["split"] == split:
            pixels = np.asarray(Image.open(Path(folder) / entry["file"]).convert("RGB"))
            photos.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().to(device))
    return photos


_atlases: dict = {}


def _atlas(photos: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """All photos in one padded tensor at full, half and quarter scale (float16), sizes (N, 2) as (height, width), and how
    often to draw each (N,): in proportion to its fine detail, or the gradients of wallpapers would outweigh photographs."""
    key = tuple(p.data_ptr() for p in photos)
    if key not in _atlases:
        _atlases.clear()
        sizes = torch.tensor([p.shape[1:] for p in photos], device=photos[0].device)
        tall, wide = (-(-int(v) // 4) * 4 for v in sizes.max(0).values)
        full = torch.zeros(len(photos), 3, tall, wide, dtype=torch.float16, device=photos[0].device)
        for i, photo in enumerate(photos):
            full[i, :, : photo.shape[1], : photo.shape[2]] = photo.half() / 255
        half, quarter = (F.avg_pool2d(full.float(), n).half() for n in (2, 4))
        detail = torch.stack([p.float().diff(dim=2).abs().mean() + p.float().diff(dim=1).abs().mean() for p in photos])
        _atlases[key] = [full, half, quarter], sizes, (detail / detail.median()).clamp(0.3, 3.0)
    return _atlases[key]


def random_crops(
    photos: list[Tensor], batch: int, height: int, width: int, generator: torch.Generator, smallest: float = 1 / 3
) -> Tensor:
    """(B, 3, H, W) in [0, 1]: random photo, place, zoom, flip and colours.

    A crop spans the whole short side of its photo, or down to `smallest` of it: at 1 it is as dense as a photo in use.
    """
    levels, sizes, weights = _atlas(photos)
    device = sizes.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    pick = torch.multinomial(weights, batch, replacement=True, generator=generator)
    size = sizes[pick].float()  # (B, 2)
    fits = torch.minimum(size[:, 0] / height, size[:, 1] / width)  # source pixels for one output pixel, at most
    scale = fits * torch.exp(uniform(float(np.log(smallest)), 0.0))
    extent = torch.stack([scale * height, scale * width], 1)
    start = (size - extent) * uniform(0, 1, 2)
    rows = start[:, :1] + (torch.arange(height, device=device) + 0.5) * scale[:, None]
    columns = start[:, 1:] + (torch.arange(width, device=device) + 0.5) * scale[:, None]
    flip = uniform(0, 1, 1) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    full = levels[0].shape[-2:]
    grid = torch.stack(
        [
            (columns / full[1] * 2 - 1)[:, None].expand(-1, height, -1),
            (rows / full[0] * 2 - 1)[:, :, None].expand(-1, -1, width),
        ],
        -1,
    )
    # Sharpness levels stand in for antialiasing: each is sampled at steps of 0.75 to 1.5 of its own pixels.
    out = torch.empty(batch, 3, height, width, device=device)
    octave = (scale / 1.5).log2().ceil().clamp(0, len(levels) - 1)
    for n, level in enumerate(levels):
        index = (octave == n).nonzero()[:, 0]
        if len(index):
            out[index] = F.grid_sample(level[pick[index]].float(), grid[index], mode="bilinear", align_corners=False)
    return _jitter(out, uniform)


def _jitter(x: Tensor, uniform) -> Tensor:
    """The differences between cameras: exposure, contrast, saturation and white balance, all mild."""
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.6, 1.35, 1, 1, 1)
    x = x * uniform(0.92, 1.08, 3, 1, 1)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (x - middle) * uniform(0.75, 1.2, 1, 1, 1)
    return (x + uniform(-0.12, 0.12, 1, 1, 1)).clamp(0, 1)


def procedural(batch: int, height: int, width: int, generator: torch.Generator, device) -> Tensor:
    """(B, 3, H, W) in [0, 1]: a noise landscape with discs, boxes and stripes of random colours drawn over it."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    x = torch.zeros(batch, 3, height, width, device=device)
    total = 0.0
    for octave, weight in ((2, 1.0), (5, 0.6), (13, 0.3), (37, 0.12)):
        noise = F.interpolate(uniform(3, octave, octave), (height, width), mode="bicubic", align_corners=True)
        x, total = x + weight * noise, total + weight
    x = (x / total - 0.5) * (1 + uniform(1, 1, 1)) + 0.5
    rows = (torch.arange(height, device=device).view(1, -1, 1) + 0.5) / min(height, width)
    columns = (torch.arange(width, device=device).view(1, 1, -1) + 0.5) / min(height, width)
    for kind in ("stripes", "box", "disc", "box", "disc", "disc"):
        cy, cx = uniform(1, 1) * rows.max(), uniform(1, 1) * columns.max()
        ry, rx = 0.04 + 0.3 * uniform(1, 1), 0.04 + 0.3 * uniform(1, 1)
        v, u = (rows - cy) / ry, (columns - cx) / rx
        if kind == "disc":
            inside = v.square() + u.square() < 1
        elif kind == "box":
            inside = (v.abs() < 1) & (u.abs() < 1)
        else:
            inside = ((v * (uniform(1, 1) - 0.5) + u * (uniform(1, 1) - 0.5)) * 6).sin() > 0.5
        shown = (inside & (uniform(1, 1) < 0.5)).unsqueeze(1)
        shade = uniform(3, 1, 1) + 0.15 * (columns - 0.5).unsqueeze(1)
        x = torch.where(shown, shade, x)
    return x.clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--debs", type=Path, help="folder with the packages, if they are at hand already")
    args = parser.parse_args()
    entries = collect(args.out, args.debs)
    for split in ("train", "held-out"):
        print(f"{sum(e['split'] == split for e in entries)} {split}")


if __name__ == "__main__":
    main()
