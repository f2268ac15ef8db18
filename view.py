"""A window in the browser: a scene, its camera path, its results; and drawing a camera path for it.

    python view.py town.glb                                    # a mesh, to draw a path for
    python view.py assets/mytown                               # a scene folder of preprocess.py
    python view.py assets/mytown --run assets/mytown/multiviews/RUN

needs viser: pip install -r requirements-view.txt. Paths are saved into OUTPUT/NAME in three formats; the window
itself writes nothing else. It ends with Ctrl-C.
"""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

from utils.cli import Arguments, InputError, Parser, non_negative_int, require_writable, run_script
from window.content import Content, open_content
from window.draft import PathDraft, open_draft

LAST_PORT = 65535


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("scene", type=Path, help="mesh file, or scene folder of preprocess.py")
    add("--run", type=Path, help="folder of anchors or of a video that was made on the scene folder")
    add("--scene_up", choices=["y", "z"], help="up axis of a mesh file (default: as in preprocess.py)")
    add("--keyframes", type=Path, help="saved keyframes.json, to go on with drawing")
    add("--output", type=Path, default=Path("paths"), help="folder to save paths into")
    add("--host", default="127.0.0.1", help="address to listen on; anyone who reaches it can use the window")
    add("--port", type=non_negative_int, default=8080, help="port to listen on; 0 takes a free one")
    return parser.parse_args(argv)


def begin_draft(keyframes: Path | None, content: Content) -> PathDraft:
    """The path to go on with, or an empty one at the size of the scene's edges."""
    up = content.geometry.up
    if not keyframes:
        return PathDraft(up, content.scene.edge_size if content.scene else (1080, 720))
    draft = open_draft(keyframes)
    if draft.up != up:
        raise InputError(f"{keyframes} has {draft.up} up, but the scene has {up}: are they of one world?")
    return draft


def main() -> None:
    args = parse_args()
    if importlib.util.find_spec("viser") is None:
        raise InputError("the window needs viser: pip install -r requirements-view.txt")
    if args.port > LAST_PORT:
        raise InputError(f"--port {args.port} is above {LAST_PORT}")
    content = open_content(args.scene, args.scene_up and f"+{args.scene_up}", args.run)
    draft = begin_draft(args.keyframes, content)
    require_writable(args.output)
    from window.app import Window  # viser is there

    window = Window(content, draft, args.output, args.host, args.port)
    print(window.url, flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        window.stop()


if __name__ == "__main__":
    run_script(main)
