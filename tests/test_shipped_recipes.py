"""The recipes that are shipped: which there are, that they are complete, and what permission they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from synth_agent import recipe_order
from synth_agent.catalogue import load_catalogue
from synth_agent.errors import InvalidInput
from synth_agent.recipes import (
    dump_recipe,
    load_recipe,
    materialise,
    operators_with_places,
    validate_recipe,
)
from synth_agent.workspace import Settings, Workspace

ROOT = Path(__file__).parents[1]
REAL = ROOT / "recipes"
MINI = ROOT / "synth_agent" / "miniworld" / "recipes"
SETS = {"real": REAL, "mini": MINI}
NEEDS_PERMISSION = {
    "image-augmentation": "image_blur_mapper",
    "diffusion-regeneration": "image_diffusion_mapper",
    "text-rewriting": "endpoint_rewriting_mapper",
    "question-generation": "endpoint_question_mapper",
}
IN_BOTH = (
    *("baseline", "basic-synthesis", "recaption", "recaption-band", "matching-half-doubled"),
    *("strategy-quality", "strategy-balanced", "strategy-diversity", "clean-synthesise-clean"),
    *("by-permission/text-rewriting", "by-permission/question-generation"),
    "by-permission/image-augmentation",
)
PUBLISHED = {
    1: (120, 1.0392, 1.0733),
    2: (385, 1.0458, 1.0617),
    3: (222, 2.9151, 1.0606),
    4: (240, 0.9412, 1.0191),
    5: (277, 1.3530, 0.9967),
    6: (222, 2.6602, 1.0498),
    7: (222, 2.9804, 1.0995),
    8: (198, 2.0850, 1.0008),
    9: (60, 0.8562, 1.0542),
    10: (60, 0.8628, 1.0139),
    11: (240, 2.1830, 1.0404),
    12: (222, 1.3464, 1.0313),
    13: (48, 0.7909, 1.0533),
    14: (96, 0.8235, 1.0467),
    15: (192, 0.9739, 1.0445),
}
"""Rows of the published table: thousand samples, MMBench and TextVQA relative to the baseline."""
BESIDE = [
    pytest.param(path, id=f"{name}-{path.stem}")
    for name, folder in SETS.items()
    for path in sorted(folder.glob("*/*.yaml"))
]


def _workspace(root: Path, path: Path, *allowed: str) -> Workspace:
    (root / "synth.yaml").touch()
    for _, operator in operators_with_places(load_recipe(path)):
        for name, value in operator.parameters.items():
            if name.startswith("hf_"):
                (root / value).mkdir(parents=True, exist_ok=True)
    return Workspace(root, Settings(allow_operators=allowed))


@pytest.mark.parametrize("name", IN_BOTH)
def test_recipe_is_in_both_sets(name: str) -> None:
    for folder in SETS.values():
        assert (folder / f"{name}.yaml").is_file()


def test_every_row_of_the_published_table_has_its_recipe() -> None:
    found = {}
    for path in sorted(REAL.rglob("*.yaml")):
        published = load_recipe(path).published
        if published:
            assert published["row"] not in found, path
            figures = (published["rows_k"], published["mmbench"], published["textvqa"])
            found[int(published["row"])] = figures
    assert found == PUBLISHED


def test_sampled_recipes_never_draw_a_sample_twice() -> None:
    """Data-Juicer's selector fills up with repetitions when there are fewer samples than asked for."""
    for folder in SETS.values():
        for path in folder.rglob("*.yaml"):
            for where, operator in operators_with_places(load_recipe(path)):
                if operator.name == "random_selector":
                    assert operator.parameters["select_ratio"] <= 1, where


@pytest.mark.parametrize("path", BESIDE)
def test_recipe_beside_the_others_is_complete_and_says_what_it_needs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, catalogue = load_recipe(path), load_catalogue()
    assert dump_recipe(recipe) == path.read_text(encoding="utf-8")
    assert materialise(recipe, catalogue) == recipe
    for _, operator in operators_with_places(recipe):
        assert not any("http" in str(value) for value in operator.parameters.values())
    # Which packages are here says nothing about the recipe.
    monkeypatch.setattr(recipe_order, "missing_packages", lambda name, parameters: ())
    needed = NEEDS_PERMISSION[path.stem]
    assert f"{needed} under allow_operators" in recipe.reason
    with pytest.raises(InvalidInput, match=needed):
        validate_recipe(recipe, catalogue, _workspace(tmp_path, path))
    validate_recipe(recipe, catalogue, _workspace(tmp_path, path, needed))


def test_blurred_copies_lie_apart_from_the_seed(tmp_path: Path) -> None:
    from synth_agent.stages.datajuicer import guard

    guard()
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops import load_ops

    recipe = load_recipe(MINI / "by-permission" / "image-augmentation.yaml")
    steps = recipe.branch_recipe(2).mapping()["process"]
    saved = steps[-1]["image_blur_mapper"]
    saved["save_dir"] = str(tmp_path / saved["save_dir"])
    seed = tmp_path / "seed"
    seed.mkdir()
    records = []
    for number in range(8):
        picture = Image.new("RGB", (16, 16), (number * 20, 0, 0))
        picture.putpixel((8, 8), (255, 255, 255))
        picture.save(seed / f"{number}.png")
        records.append(
            {"images": [str(seed / f"{number}.png")], "text": f"<__dj__image>\n{number}"}
        )
    before = {path: path.read_bytes() for path in seed.iterdir()}
    dataset = NestedDataset.from_list(records)
    for operator in load_ops(steps):
        dataset = operator.run(dataset)
    assert len(dataset) == 2
    assert {path: path.read_bytes() for path in seed.iterdir()} == before
    for row in dataset:
        [made] = map(Path, row["images"])
        assert made.is_relative_to(tmp_path / "artifacts")
        number = row["text"][-1]
        with Image.open(made) as blurred, Image.open(seed / f"{number}.png") as original:
            assert blurred.size == original.size
            assert blurred.convert("RGB").getpixel((8, 8)) != original.getpixel((8, 8))
