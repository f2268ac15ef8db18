"""The page of a video: index.html beside it, which opens by a double click and needs no network.

`collect` puts what the page shows into the subfolder `page`, so that the video's folder can be moved as a whole;
`write_page` makes index.html of it, and again when evaluate.py has measured the video.
"""

import html
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import InputError
from utils.edges import resize_edges
from utils.files import atomic_path, read_json, write_json
from utils.images import read_image, write_image, write_video
from utils.layout import (
    ARC_FRAMES,
    ARC_STEPS,
    MANIFEST,
    SCENE_MANIFEST,
    VIDEO_FILE,
    Scene,
    frame_path,
    mask_path,
    warped_path,
)

INDEX, FOLDER, CONTENTS, METRICS = "index.html", "page", "page.json", "metrics.json"
LAYER_FPS = 12  # of the layers beside the video, whatever its own rate is
THUMBNAIL = (480, 480)  # pixels, at most, of pictures on the time line
LONGEST_VALUE = 160  # characters of a setting that are shown


def page_folder(video: Path) -> Path:
    return video / FOLDER


def collect(
    video: Path,
    anchors: Sequence[Path],
    scene: Scene,
    size: tuple[int, int],
    fps: int,
    carried: Iterable[np.ndarray] | None = None,
) -> None:
    """Copy into VIDEO/page what the page shows beside the frames.

    video: folder with all frames and the mp4. anchors: their pictures. size: of the frames, width, height in pixels.
    carried: the anchors carried to each of the 45 N + 1 frames, uint8 [H, W, 3] each; None keeps those that are there.
    """
    run, folder = anchors[0].parent, page_folder(video)
    edges = [path for arc in scene.arcs for path in arc.edge_paths[bool(arc.index) :]]
    write_video(folder / "edges.mp4", (resize_edges(read_image(path), *size) for path in edges), LAYER_FPS)
    if carried is not None:
        write_video(folder / "carried.mp4", carried, LAYER_FPS)
    ks = range(len(anchors))
    strips = {
        "anchors": [_thumbnail(path, folder / f"anchor_{k:02d}.jpg") for k, path in enumerate(anchors)],
        "edges": [_thumbnail(path, folder / f"edges_{k:02d}.jpg") for k, path in enumerate(scene.anchor_edge_paths)],
        "warped anchors": [_thumbnail(warped_path(run, k), folder / f"warped_{k:02d}.jpg") for k in ks],
        "masks: white is free": [_thumbnail(mask_path(run, k), folder / f"mask_{k:02d}.jpg") for k in ks],
    }
    manifests = dict(find_manifests(run, scene.folder))
    references = [_thumbnail(path, folder / f"reference_{i:02d}.jpg") for i, path in enumerate(find_references(run))]
    contents = {
        "title": " · ".join(path.absolute().name for path in (scene.folder, run, video)),
        "fps": fps,
        "size": size,
        "frames": [frame_path(Path(), i).name for i in shown_frames(len(scene.arcs))],
        "steps": ARC_STEPS,
        "references": references,
        "strips": {name: names for name, names in strips.items() if any(names)},
        "runs": {stage: about(manifest) for stage, manifest in manifests.items()},
    }
    write_json(folder / CONTENTS, contents)


def shown_frames(num_arcs: int) -> list[int]:
    """Numbers of the frames that the mp4 shows: those that two arcs share once."""
    return [arc * ARC_FRAMES + k for arc in range(num_arcs) for k in range(bool(arc), ARC_FRAMES)]


def _thumbnail(path: Path, target: Path) -> str | None:
    """A copy of a picture, small enough for a page; its name. None where there is no picture."""
    if not path.is_file():
        target.unlink(missing_ok=True)
        return None
    picture = Image.fromarray(read_image(path))
    picture.thumbnail(THUMBNAIL)
    write_image(target, np.asarray(picture))
    return target.name


def find_manifests(run: Path, scene: Path) -> Iterator[tuple[str, dict]]:
    """(stage, manifest) of what a run of anchors was made from, and of itself, in order; those that are there."""
    lora = _lora_folder(run)
    files = [("preprocessing", scene / SCENE_MANIFEST), ("alignment", lora and lora / MANIFEST)]
    for stage, path in (*files, ("anchors", run / MANIFEST)):
        if path and (manifest := _read_manifest(path)):
            yield stage, manifest


def _read_manifest(path: Path) -> dict:
    """A manifest of an earlier stage. A page does without one that is missing or damaged; empty then."""
    try:
        return read_json(path) if path.is_file() else {}
    except InputError as error:
        print(f"note: the page lacks the settings of a stage: {error}", file=sys.stderr)
        return {}


def _lora_folder(run: Path) -> Path | None:
    noted = _read_manifest(run / MANIFEST).get("lora_folder")
    return Path(noted) if noted else None


def find_references(run: Path) -> list[Path]:
    """The reference pictures that a run of anchors was aligned to; none if their copies are not on this machine."""
    lora = _lora_folder(run)
    found = sorted((lora / "references").glob("*.png")) if lora else []
    return [path for path in found if not path.name.endswith(".edges.png")]


def about(manifest: Mapping) -> dict:
    """What a page says of a run: command, settings, and what else its manifest tells, as short texts."""
    told = {name: manifest[name] for name in ("prompt", "redone", "pictures", "warnings") if manifest.get(name)}
    settings = manifest.get("arguments", {}) | manifest.get("flags", {}) | told
    return {
        "command": manifest.get("command"),
        "settings": {name: _short(value) for name, value in sorted(settings.items()) if value is not None},
        "versions": {name: _short(value) for name, value in manifest.get("versions", {}).items()},
    }


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def has_page(video: Path) -> bool:
    return (page_folder(video) / CONTENTS).is_file()


def add_to_page(video: Path, *, results: Mapping | None = None, truth: np.ndarray | None = None) -> None:
    """Show results of evaluate.py on the page of a video, or the true frames, uint8 [45 N + 1, H, W, 3]."""
    if results is not None:
        write_json(video / METRICS, results)
    if truth is not None:
        write_video(page_folder(video) / "truth.mp4", truth, LAYER_FPS)
    write_page(video)


# --- the page itself ---


def write_page(video: Path) -> Path:
    """Write VIDEO/index.html from what `collect` and evaluate.py left there; returns its path.

    Raises InputError for a folder without a collected page.
    """
    folder = page_folder(video)
    contents = read_json(folder / CONTENTS)
    metrics = read_json(video / METRICS) if (video / METRICS).is_file() else None
    layers = [{"name": "generated", "src": VIDEO_FILE, "fps": contents["fps"], "frames": contents["frames"]}]
    for name in ("edges", "carried", "truth"):
        if (folder / f"{name}.mp4").is_file():
            layers.append({"name": name, "src": f"{FOLDER}/{name}.mp4", "fps": LAYER_FPS})
    runs = contents["runs"] | {"video": about(read_json(video / MANIFEST))}
    data = {"layers": layers, "count": len(contents["frames"]), "steps": contents["steps"], "size": contents["size"]}
    body = "\n".join(
        [
            f"<h1>{html.escape(contents['title'])}</h1>",
            asset("player.html"),
            _strips(contents["strips"], contents["references"]),
            "" if metrics is None else _metrics(metrics),
            _commands(runs),
            *(_settings(stage, run) for stage, run in runs.items()),
        ]
    )
    write_text(video / INDEX, document(contents["title"], body, data, ("player.js", "page.js")))
    return video / INDEX


def document(title: str, body: str, data: object, scripts: Sequence[str]) -> str:
    """One HTML file that needs no other for style and scripts. data: JSON values for the scripts."""
    safe = json.dumps(data).replace("<", "\\u003c")  # no text of ours ends the script element
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{asset('page.css')}</style></head>",
            f"<body>\n{body}",
            f'<script type="application/json" id="data">{safe}</script>',
            *(f"<script>\n{asset(name)}</script>" for name in scripts),
            "</body></html>\n",
        ]
    )


def asset(name: str) -> str:
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, atomically; half a character, as in names of files, becomes a question mark."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def _strips(strips: Mapping[str, Sequence[str | None]], references: Sequence[str]) -> str:
    """Pictures at their moments on the time line, a row for each kind."""
    rows = []
    for name, names in strips.items():
        cells = [
            "<td></td>" if picture is None else f'<td><img data-anchor="{k}" src="{FOLDER}/{picture}" alt=""></td>'
            for k, picture in enumerate(names)
        ]
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    columns = max(map(len, strips.values()))
    frames = "".join(f"<td>frame {ARC_STEPS * k + 1}</td>" for k in range(columns))
    shown = "".join(f'<img src="{FOLDER}/{name}" alt="reference">' for name in references)
    reference = f'<h2>Reference</h2><div class="references">{shown}</div>' if shown else ""
    table = f'<table><tr id="moments"><th></th>{frames}</tr>{"".join(rows)}</table>'
    return f'<h2>Anchors</h2><div class="strips">{table}</div>{reference}'


def _metrics(metrics: Mapping) -> str:
    values = metrics.get("metrics")
    if not isinstance(values, dict):
        raise InputError("metrics.json holds no metrics: run evaluate.py again")
    missing = metrics.get("missing", {})
    shown = {name: missing.get(name, "n/a") if v is None else f"{v:.4g}" for name, v in values.items()}
    return f"<h2>Metrics</h2>{_table(shown)}"


def _commands(runs: Mapping[str, Mapping]) -> str:
    lines = [html.escape(run["command"]) for run in runs.values() if run["command"]]
    return f"<h2>Commands</h2><pre>{chr(10).join(lines)}</pre>" if lines else ""


def _settings(stage: str, run: Mapping) -> str:
    tables = _table(run["settings"]) + (f"<h3>versions</h3>{_table(run['versions'])}" if run["versions"] else "")
    return f"<details><summary>Settings: {html.escape(stage)}</summary>{tables}</details>"


def _table(values: Mapping[str, str]) -> str:
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in values.items())
    return f'<table class="values">{"".join(cells)}</table>'
