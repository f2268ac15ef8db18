"""The sample scene: geometry, maps, edges, the folder; and that the committed files are what the code makes."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from synthetic import sample
from synthetic.sample import Town, cast, correspondence_map, look_at, make_path, make_town, place, soft_edges
from utils.arcs import Arc, load_scene
from utils.cli import InputError, run_script
from utils.correspondence import VISIBLE, read_map, source_positions

SIZE = WIDTH, HEIGHT = 90, 60
COMMITTED = Path(__file__).parent.parent / "assets" / "sampleA"
ALLOWED = 1e-3  # share of pixels that may differ between processors, whose sines differ in the last bit


@pytest.fixture(scope="module")
def town() -> Town:
    return make_town(sample.SAMPLE_SEED)


@pytest.fixture(scope="module")
def cameras() -> list[sample.Camera]:
    return make_path(91)


def centres(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Pixel centres [H, W, 2], x then y."""
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)


def project(camera: sample.Camera, points: np.ndarray) -> np.ndarray:
    """World points [N, 3] to pixels [N, 2] with 4x4 world-to-camera and intrinsic matrices."""
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = camera.axes, camera.eye
    focal = sample.FOCAL * WIDTH
    intrinsic = np.array([[focal, 0, -WIDTH / 2], [0, -focal, -HEIGHT / 2], [0, 0, -1]])  # OpenGL axes: z < 0 ahead
    seen = (np.linalg.inv(c2w) @ np.c_[points, np.ones(len(points))].T)[:3]
    x, y, depth = intrinsic @ seen
    return np.stack([x / depth, y / depth], axis=1)


def is_blocked(town: Town, start: np.ndarray, end: np.ndarray) -> bool:
    """Whether one of many points between start and end, short of the end, is inside a solid. No ray is cast."""
    points = start + np.linspace(0, 1 - 2e-4, 4000)[:, None] * (end - start)
    return any((points @ solid.normals.T < solid.offsets - 1e-9).all(axis=1).any() for solid in town.solids)


def test_a_ray_hits_the_right_face_at_the_right_distance() -> None:
    box = Town.of([place("box", (2, 2, 3), (0, 0, 0), (0, 0, 0), at=(0, 5, 0))])
    t, face = cast(box, np.array([0, 0, 1.0]), np.array([[0, 2, 0], [0, 1, 1], [0, -1, 0.0]]).T)
    assert t.tolist() == [2, np.inf, np.inf]  # in lengths of the direction; above it; behind
    assert box.normals[face[0]].tolist() == [0, -1, 0] and face[1:].tolist() == [-1, -1]


def test_shapes_are_closed_and_stand_where_they_are_put() -> None:
    up, down = np.array([[0, 0, 1.0]]).T, np.array([[0, 0, -1.0]]).T
    for shape in ("box", "gable", "cone"):
        town = Town.of([place(shape, (4, 2, 3), (1, 0, 2), (0, 0, 0), at=(0, 0, 10), yaw=np.pi / 2)])
        assert cast(town, np.array([0, 1, 0.0]), up)[0] == pytest.approx(12)
        assert cast(town, np.array([0, 1, 20.0]), down)[0] == pytest.approx(20 - 15)
        assert np.isinf(cast(town, np.array([0, -1.1, 0.0]), up)[0])


def test_static_camera_gives_the_identity(town: Town, cameras: list) -> None:
    code = correspondence_map(town, cameras[0], cameras[0], *SIZE)
    position, valid = source_positions(code)
    assert valid.all()
    assert np.abs(position - centres()).max() <= WIDTH / 65536


def test_maps_agree_with_camera_matrices_and_point_sampling(town: Town, cameras: list) -> None:
    source, target = cameras[45], cameras[75]
    position, valid = (
        part.reshape(WIDTH * HEIGHT, -1).squeeze()
        for part in source_positions(correspondence_map(town, source, target, *SIZE))
    )
    rays = target.rays(*SIZE)
    t, face = cast(town, target.eye, rays)
    solid = face >= 0
    points = target.eye + (np.where(solid, t, 0) * rays).T
    expected = project(source, points)
    assert np.abs(position - expected)[valid & solid].max() < 0.01

    ahead = (points - source.eye) @ source.axes[:, 2] < 0
    inside = solid & ahead & (expected >= 0).all(axis=1) & (expected < SIZE).all(axis=1)
    assert not valid[solid & ~inside].any()
    rng = np.random.default_rng(0)
    for claimed in (True, False):
        chosen = rng.permutation(np.flatnonzero(inside & (valid == claimed)))[:60]
        assert len(chosen) == 60
        assert [not is_blocked(town, source.eye, points[i]) for i in chosen] == [claimed] * 60


def test_sky_follows_rotation_only(town: Town, cameras: list) -> None:
    source, target = cameras[10], cameras[14]
    position, valid = source_positions(correspondence_map(town, source, target, *SIZE))
    rays = target.rays(*SIZE)
    sky = valid.ravel() & (cast(town, target.eye, rays)[1] < 0)
    far = project(source, source.eye + 1e9 * rays.T[sky])
    assert sky.sum() > 500
    assert np.abs(position.reshape(-1, 2)[sky] - far).max() < 0.01
    hidden_sky = ~valid.ravel() & (cast(town, target.eye, rays)[1] < 0)
    inside = np.flatnonzero(hidden_sky)[source.project(rays[:, hidden_sky], *SIZE)[2]]
    assert len(inside) > 0 and (cast(town, source.eye, rays[:, inside])[1] >= 0).all()  # something stood before it


def test_there_and_back_returns(town: Town, cameras: list) -> None:
    a, b = cameras[0], cameras[6]
    there, valid = source_positions(correspondence_map(town, b, a, *SIZE))  # on a: where in b
    back, valid_back = source_positions(correspondence_map(town, a, b, *SIZE))  # on b: where in a
    x, y = there[valid].astype(int).T
    error = np.abs(back[y, x] - centres()[valid]).max(axis=1)[valid_back[y, x]]
    assert len(error) > 0.6 * WIDTH * HEIGHT
    assert np.mean(error < 1) > 0.95  # the rest: another surface begins within the pixel


def test_what_a_wall_hides_is_zero() -> None:
    ground, wall = place("box", (400, 400, 1), (0, 0, -1), (0, 0, 0)), place("box", (8, 0.5, 4), (0, 0, 0), (0, 0, 0))
    town = Town.of([ground, wall])
    before, above = look_at((0, -10, 2), (0, 0, 1)), look_at((0, -10, 30), (0, 0, 0))
    code = correspondence_map(town, before, above, *SIZE)
    rays = above.rays(*SIZE)
    t, _ = cast(town, above.eye, rays)
    x, y, z = above.eye[:, None] + t * rays
    behind_wall = (z < 1e-6) & (np.abs(x) < 3) & (y > 2) & (y < 6)  # on the ground
    in_front = (z < 1e-6) & (np.abs(x) < 1) & (y < -1) & (y > -5)
    assert behind_wall.sum() > 20 and in_front.sum() > 20
    assert not code.reshape(-1, 3)[behind_wall].any()
    assert (code.reshape(-1, 3)[in_front, 2] == VISIBLE).all()


def test_a_face_is_not_seen_from_behind() -> None:
    sheet = Town.of([place("box", (9, 0.002, 9), (0, 0, 0), (0, 0, 0))])  # too thin for the distance test alone
    front, back = look_at((0, -60, 4), (0, 0, 4)), look_at((0, 60, 4), (0, 0, 4))
    seen = cast(sheet, front.eye, front.rays(*SIZE))[1] >= 0
    assert seen.sum() > 50
    assert not correspondence_map(sheet, back, front, *SIZE).reshape(-1, 3)[seen].any()


def test_edges_are_white_lines_where_faces_meet() -> None:
    town = Town.of([place("box", (2, 2, 2), (0, 0, 0), (0, 0, 0))])
    edges = soft_edges(town, look_at((4, -4, 1), (0, 0, 1)), 360, 240)
    assert edges.shape == (240, 360, 3) and edges.dtype == np.uint8 and (np.ptp(edges, axis=2) == 0).all()
    row = edges[120, :, 0].astype(int)  # outline, crease in the middle, outline
    assert row[170:190].max() == sample.CREASE
    lines = np.flatnonzero(np.diff((row > 127).astype(int)) == 1)
    assert len(lines) == 3 and row.max() == sample.OUTLINE
    assert 3 <= (row > 127).sum() / 3 <= 8
    assert not edges[:40].any() and 0.01 < (edges > 127).mean() < 0.2


def test_command_writes_a_scene_and_replaces_it_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "EDGE_SIZE", (54, 36))
    monkeypatch.setattr(sample, "MAP_SIZE", (36, 24))
    monkeypatch.setattr(sample, "REFERENCE_SIZE", (36, 24))
    output, reference = tmp_path / "new" / "scene", tmp_path / "styles" / "style.png"
    argv = ["--output", str(output), "--reference", str(reference)]
    sample.main(argv)
    scene = load_scene(output)
    assert (len(scene.arcs), scene.edge_size, scene.map_size) == (2, (54, 36), (36, 24))
    assert cv2.imread(str(reference)).shape == (24, 36, 3)
    assert {path.name for path in tmp_path.rglob("*") if path.parent in (output.parent, reference.parent)} == {
        "scene",
        "style.png",
    }
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: sample.main(argv))
    assert stopped.value.code == 2 and "--overwrite" in capsys.readouterr().err

    results = output / "multiviews"
    results.mkdir()
    with pytest.raises(InputError, match="multiviews"):
        sample.main([*argv, "--overwrite"])
    results.rmdir()
    monkeypatch.setattr(sample, "write_scene", lambda folder, *sizes: (folder / "arc0").mkdir(parents=True))
    sample.main([*argv, "--overwrite"])
    assert [path.name for path in output.iterdir()] == ["arc0"]


def test_committed_sample_is_what_the_code_makes(town: Town, cameras: list) -> None:
    arc = Arc(1, COMMITTED / "arc1")
    target = int(arc.corres_paths[5].stem)
    source = int(arc.corres_paths[4].stem)
    stored = read_map(arc.corres_paths[5]).astype(int)
    made = correspondence_map(town, cameras[source - 1], cameras[target - 1], *sample.MAP_SIZE)
    assert np.mean((np.abs(stored - made) > 1).any(axis=2)) <= ALLOWED

    stored = cv2.imread(str(arc.edge_paths[20]))
    made = soft_edges(town, cameras[arc.first + 20 - 1], *sample.EDGE_SIZE)
    assert stored.shape == made.shape
    assert np.mean(stored != made) <= ALLOWED


def test_neighbouring_anchors_of_the_committed_sample_overlap() -> None:
    for index in range(sample.ARCS):
        visible = read_map(Arc(index, COMMITTED / f"arc{index}").corres_end_path)[..., 2] == VISIBLE
        assert 0.3 < visible.mean() < 0.6


def test_committed_reference_is_what_the_code_draws() -> None:
    width, height = sample.REFERENCE_SIZE
    stored = cv2.imread(str(COMMITTED.parent / "references" / "boxtown.png"))[..., ::-1]
    assert stored.shape == (height, width, 3)
    small = (width // 8, height // 8)
    made = sample.render(make_town(sample.REFERENCE_SEED, framed=True), look_at(*sample.REFERENCE_VIEW), *small)
    shrunk = cv2.resize(np.ascontiguousarray(stored), small, interpolation=cv2.INTER_AREA)
    assert np.abs(made.astype(int) - shrunk).mean() < 3
