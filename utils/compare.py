"""Videos of one path side by side, frame by frame, on one page.

    python -m utils.compare RUN_A RUN_B … --output page.html
    python -m utils.compare RUN_A RUN_B … --output page.html --blind --question 'Which one holds still better?'

RUN is a video's folder of ggi.py, or a folder of anchors with one video in it. The page holds the videos, so that it
can be moved and sent. With --blind it shows two at a time, in random order and without a name, and asks; the votes
download as JSON, and page.key.json, for your eyes only, says which video is which.
"""

import argparse
import base64
import hashlib
import html
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg

from utils.cli import InputError, Parser, prompt_text, require_writable, run_script
from utils.files import files_sha256, read_json, write_json
from utils.layout import MANIFEST, VIDEO_FILE
from utils.videos.page import CONTENTS, INDEX, about, asset, document, page_folder, write_text

QUESTION = "Which video do you prefer?"


@dataclass(frozen=True)
class Shown:
    """A finished video. settings: {stage and flag: value} of all that is known of its making."""

    folder: Path
    name: str
    mp4: bytes
    count: int
    fps: float
    settings: dict[str, str]

    @property
    def id(self) -> str:
        """A name that says nothing."""
        return hashlib.sha256(self.mp4).hexdigest()[:8]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m utils.compare")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished videos of one path")
    add("--output", type=Path, required=True, metavar="HTML", help="the page to write")
    add("--blind", action="store_true", help="a page that asks which of two is preferred, without names")
    add("--question", type=prompt_text, default=QUESTION, help="what a blind page asks")
    return parser.parse_args(argv)


def find_video(run: Path) -> Path:
    """The folder of the finished video that a run is or holds. Raises InputError unless there is exactly one."""
    if not run.is_dir():
        raise InputError(f"run folder {run} does not exist")
    found = [run] if (run / VIDEO_FILE).is_file() else sorted(path.parent for path in run.glob(f"*/{VIDEO_FILE}"))
    if not found:
        raise InputError(f"{run} holds no video: run ggi.py --target {run} first")
    if len(found) > 1:
        raise InputError(f"{run} holds {len(found)} videos: name one of {', '.join(str(path) for path in found)}")
    return found[0]


def read_video(run: Path) -> Shown:
    folder = find_video(run)
    manifest = read_json(folder / MANIFEST)
    fps = manifest.get("fps")
    if not manifest.get("finished") or not isinstance(fps, int | float) or fps <= 0:
        raise InputError(f"{folder} is not finished: run ggi.py again")
    try:
        count = imageio_ffmpeg.count_frames_and_secs(str(folder / VIDEO_FILE))[0]
    except RuntimeError as error:
        raise InputError(f"{folder / VIDEO_FILE} does not decode: remove it and run ggi.py again") from error
    contents = page_folder(folder) / CONTENTS
    runs = (read_json(contents)["runs"] if contents.is_file() else {}) | {"video": about(manifest)}
    settings = {f"{stage}: {name}": text for stage, run in runs.items() for name, text in run["settings"].items()}
    for part, files in manifest.get("weights", {}).items():
        settings[f"weights: {part}"] = hashlib.sha256(str(files).encode()).hexdigest()[:12]
    name = f"{folder.absolute().parent.name} / {folder.name}"
    return Shown(folder, name, (folder / VIDEO_FILE).read_bytes(), count, fps, settings)


def require_comparable(videos: Sequence[Shown]) -> None:
    """Raise InputError unless the videos differ and have the same moments."""
    if len(videos) < 2:
        raise InputError("one video alone cannot be compared: give two runs or more")
    for a, b in itertools.combinations(videos, 2):
        if a.count != b.count:
            raise InputError(f"{b.folder} has {b.count} frames, {a.folder} {a.count}: compare videos of one path")
        if a.mp4 == b.mp4:
            raise InputError(f"{a.folder} and {b.folder} hold the same video: give it once")


def find_differences(videos: Sequence[Shown]) -> dict[str, list[str]]:
    """{setting: its value in each video} of those that are not the same in all; empty where there is none."""
    names = sorted({name for video in videos for name in video.settings})
    values = {name: [video.settings.get(name, "") for video in videos] for name in names}
    return {name: found for name, found in values.items() if len({*found}) > 1}


def side_by_side(videos: Sequence[Shown]) -> str:
    differences = find_differences(videos)
    if parts := [name for name in differences if name.startswith("weights: ")]:
        print(f"note: the videos were made with different {', '.join(parts)}", file=sys.stderr)
    head = "".join(f"<th>{html.escape(video.name)}</th>" for video in videos)
    rows = [
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(value)}</td>' for value in values)}</tr>"
        for name, values in differences.items()
    ]
    table = f'<table class="values"><tr><th></th>{head}</tr>{"".join(rows)}</table>' if rows else "<p>none</p>"
    return f"<h1>Comparison</h1>{asset('compare.html')}<h2>Different settings</h2>{table}"


def blind(question: str) -> str:
    return f"<h1>{html.escape(question)}</h1>{asset('blind.html')}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    require_writable(args.output.parent)
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder: name the page, such as page.html")
    videos = [read_video(run) for run in args.runs]
    if args.output.resolve() in [(video.folder / INDEX).resolve() for video in videos]:
        raise InputError(f"--output {args.output} is the page of one of the videos: name another file")
    require_comparable(videos)
    shown = [{"id": v.id, "fps": v.fps, "mp4": base64.b64encode(v.mp4).decode()} for v in videos]
    if args.blind:
        title, body, script = "Comparison", blind(args.question), "blind.js"
        shown.sort(key=lambda video: video["id"])  # not in the order of the command
    else:
        title, body, script = "Comparison", side_by_side(videos), "compare.js"
        shown = [entry | {"name": video.name} for entry, video in zip(shown, videos, strict=True)]
    data = {"count": videos[0].count, "videos": shown, "question": args.question}
    write_text(args.output, document(title, body, data, ("player.js", script)))
    print(args.output)
    if args.blind:
        key = args.output.with_suffix(".key.json")
        write_json(key, {"page_sha256": files_sha256([args.output]), "videos": {v.id: str(v.folder) for v in videos}})
        print(key)


if __name__ == "__main__":
    run_script(main)
