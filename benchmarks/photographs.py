"""Large photographs: what a worker gains by decoding a JPEG no larger than its two cuts need.

    python benchmarks/photographs.py [--root FOLDER_OF_IMAGES] [--images 4] [--rounds 7]

Claim: two views of 224 px from photographs of 12 megapixels are cut at least twice as fast as from
the same files decoded whole (`data.reduce_jpegs`), and a view differs by less than one grey level
in the mean. At 1 megapixel both ways are the same code. A decoder reads every bit of the file
whatever size it computes: the gain is greatest where a file has few bits a pixel. Without `--root`,
synthetic JPEGs of 0.4 bytes a pixel, a noisy camera's, and smooth ones of 0.1 are written to a
temporary folder. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import RandomResizedCrop

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.feed import write_images
from benchmarks.harness import Row, arguments, interleave, progress, report, table
from moco.config import DataConfig
from moco.images.sources import open_source
from moco.images.streamed import Cuts

SIZES = {1: (1152, 864), 4: (2312, 1736), 12: (4032, 3024)}  # megapixels: width and height
PIL, WHOLE, REDUCED = "PIL: decode, two crops", "decoded whole", "decoded as the cuts need"
TARGETS = {12: 2.0}
SIZE, CROP_MIN = 224, 0.2


def smooth(folder: Path) -> None:
    """Take the grain out of photographs, so that their files become small."""
    for path in folder.iterdir():
        picture = Image.open(path).filter(ImageFilter.GaussianBlur(2))
        picture.save(path, quality=90, subsampling=2)


def measure(root: str, title: str, target: float | None, options: Any) -> dict[str, Any]:
    """Let the three ways take turns over one folder; say how far the views are apart."""
    kinds = {
        name: DataConfig(root=root, image_size=SIZE, crop_min=CROP_MIN, reduce_jpegs=reduces)
        for name, reduces in ((WHOLE, False), (REDUCED, True))
    }
    source = open_source(kinds[WHOLE], "train")
    cuts = {name: Cuts(source, config, 0) for name, config in kinds.items()}
    rows, crop = np.arange(min(len(source), options.images)), RandomResizedCrop(SIZE, (CROP_MIN, 1))

    def ours(name: str) -> Callable[[], Any]:
        epochs = itertools.count()
        return lambda: cuts[name].__getitems__((next(epochs), rows, SIZE))

    def pil() -> None:
        for row in rows:
            image = pil_loader(source.paths[row])
            crop(image), crop(image)

    seconds = interleave({PIL: pil, WHOLE: ours(WHOLE), REDUCED: ours(REDUCED)}, options.rounds)
    lines = [Row(PIL, seconds[PIL], len(rows)), Row(WHOLE, seconds[WHOLE], len(rows))]
    lines.append(Row(REDUCED, seconds[REDUCED], len(rows), {PIL: None, WHOLE: target}))
    found = {"rates": table(title, lines, "images/s")}
    epochs = range(options.rounds)
    pairs = [
        [cuts[n].__getitems__((e, rows, SIZE))[0].float() for n in (WHOLE, REDUCED)] for e in epochs
    ]
    apart = torch.stack([(a - b).abs() for a, b in pairs])
    found["grey_levels_apart"] = {"mean": apart.mean().item(), "most": apart.max().item()}
    print(f"  views differ by {apart.mean():.2f} grey levels, at most by {apart.max():.0f}")
    return found


def main(argv: list[str]) -> dict[str, Any]:
    """Measure on the user's images, or on synthetic ones of three sizes and two kinds."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--root", default="", help="folder of images; empty: synthetic ones")
    parser.add_argument("--images", type=int, default=4, help="of one turn")
    parser.add_argument("--megapixels", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.root:
        found = measure(options.root, "Two views of 224 px, one core", None, options)
        return report("photographs", {"own": found}, options)
    results = {}
    for megapixels in options.megapixels:
        with tempfile.TemporaryDirectory() as folder:
            progress(f"writing photographs of {megapixels} megapixels")
            write_images(Path(folder), options.images, SIZES[megapixels])
            for kind in ("noisy", "smooth"):
                if kind == "smooth":
                    smooth(Path(folder))
                name = f"{megapixels} megapixels, {kind}"
                results[name] = measure(folder, name, TARGETS.get(megapixels), options)
    return report("photographs", results, options)


if __name__ == "__main__":
    main(sys.argv[1:])
