"""Pictures that operators made become part of the processed data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from synth_agent.data import ROW_ID_FIELD, Sample, relative_samples
from synth_agent.errors import InvalidInput
from synth_agent.stages.made_pictures import SYNTHETIC, adopt_pictures

SEED = [Sample("a", ("pictures/a.png",), "first"), Sample("b", ("b.PNG",), "second")]


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    root = tmp_path / "seed"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.png").write_bytes(b"picture a")
    (root / "b.PNG").write_bytes(b"picture b")
    return root


def _row(row_id: int, *images: Path) -> dict[str, object]:
    sample = SEED[row_id]
    return {
        ROW_ID_FIELD: row_id,
        "id": sample.id,
        "text": sample.text,
        "images": [str(image) for image in images],
    }


def test_made_pictures_and_the_seeds_are_under_one_folder(tmp_path: Path, seed: Path) -> None:
    made = tmp_path / "artifacts" / "images"
    made.mkdir(parents=True)
    (made / "a__blurred.PNG").write_bytes(b"blurred")
    (made / "again.png").write_bytes(b"blurred")
    rows = [
        _row(0, seed / "pictures/a.png"),
        _row(0, made / "a__blurred.PNG"),
        _row(1, seed / "b.PNG"),
        _row(1, made / "again.png"),
    ]
    output = tmp_path / "out"
    adopted, root = adopt_pictures(rows, SEED, seed, output)
    samples = list(relative_samples(adopted, SEED, root))
    assert root == output / "images"
    assert [sample.images[0] for sample in samples[::2]] == ["pictures/a.png", "b.PNG"]
    [first], [second] = samples[1].images, samples[3].images
    assert first == second
    assert first.startswith(f"{SYNTHETIC}/")
    contents = [(root / sample.images[0]).read_bytes() for sample in samples]
    assert contents == [b"picture a", b"blurred", b"picture b", b"blurred"]
    moved = tmp_path / "finished"
    output.rename(moved)
    assert (moved / "images" / "pictures" / "a.png").read_bytes() == b"picture a"
    assert (moved / "images" / first).read_bytes() == b"blurred"


def test_without_made_pictures_nothing_is_written(tmp_path: Path, seed: Path) -> None:
    rows = [_row(0, seed / "pictures/a.png"), _row(1, seed / "b.PNG")]
    adopted, root = adopt_pictures(rows, SEED, seed, tmp_path / "out")
    assert (adopted, root) == (rows, seed)
    assert not (tmp_path / "out").exists()


def test_missing_picture_and_taken_name_are_named(tmp_path: Path, seed: Path) -> None:
    with pytest.raises(InvalidInput, match="gone.png"):
        adopt_pictures([_row(0, tmp_path / "gone.png")], SEED, seed, tmp_path / "out")
    (tmp_path / "made.png").write_bytes(b"made")
    taken = [Sample("a", (f"{SYNTHETIC}/a.png",), "first")]
    with pytest.raises(InvalidInput, match=SYNTHETIC):
        adopt_pictures([_row(0, tmp_path / "made.png")], taken, seed, tmp_path / "out")
