"""`python -m tests.cases`: a line for each scene and camera file of a folder."""

import pytest

from tests import cases
from tests.scene.geometry_common import cube_glb
from tests.scene.preprocess_common import write_path
from tests.support.helpers import exit_code


def test_a_line_for_every_file(tmp_path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    cube_glb(tmp_path / "cube.glb", [{"mesh": 0, "translation": [1, 2, 3]}])
    write_path(tmp_path / "cameras.json")
    (tmp_path / "bad.obj").write_text("v 0 0 0\nf 0 1 2\n")
    (tmp_path / "README.md").write_text("not a scene")
    monkeypatch.setattr("sys.argv", ["cases", str(tmp_path)])
    assert exit_code(cases.main) == 0
    bad, cameras, cube = capsys.readouterr().out.splitlines()
    assert bad.startswith("bad.obj: refused: ") and "OBJ counts from 1" in bad
    assert cameras.startswith(
        "cameras.json: read: 46 cameras, 108x72, focal length 90x90, from -1 -8 2 to 1 -8 2, +z up"
    )
    assert cube.startswith("cube.glb: read: 12 triangles, area 6, bounds 1 2 3 to 2 3 4, +y up; note: ")
    monkeypatch.setattr("sys.argv", ["cases", str(tmp_path / "nowhere")])
    assert exit_code(cases.main) == 2
