"""The process stage, with the real Data-Juicer in processes of their own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from synth_agent.catalogue import load_catalogue
from synth_agent.changes import read_changes
from synth_agent.data import read_llava
from synth_agent.errors import InvalidInput
from synth_agent.recipes import Operator, Recipe, dump_recipe, materialise
from synth_agent.workspace import Settings, Workspace, stage_environment

ROOT = Path(__file__).parents[1]
MINI_CLIP = ROOT / "synth_agent" / "miniworld" / "assets" / "clip"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
QUESTION = {"from": "human", "value": "<image>\nWhat is shown?"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with 30 samples: the last five repeat texts, one has its picture twice, one has none."""
    images = tmp_path / "data" / "seed" / "images"
    images.mkdir(parents=True)
    records, original = [], []
    for index in range(30):
        colour = COLOURS[index % len(COLOURS)]
        picture = Image.new("RGB", (48 + index, 64), "white")
        ImageDraw.Draw(picture).rectangle((8, 8, 8 + index, 40), fill=colour)
        picture.save(images / f"{index}.jpg")
        paths = [f"images/{index}.jpg"]
        text = f"<__dj__image>\na {colour} box, number {index % 25} <|__dj__eoc|>"
        if index == 3:
            text, paths = "no picture here <|__dj__eoc|>", []
        if index == 4:
            text, paths = (
                f"{text}<__dj__image> a second one <|__dj__eoc|>",
                paths * 2,
            )
        name = f"sample-{index}"
        records.append({"id": name, "images": paths, "text": text})
        answer = {"from": "gpt", "value": "seed answer"}
        original.append({"id": name, "image": paths[:1], "conversations": [QUESTION, answer]})
        if paths:
            original[-1]["image"] = paths[0]
        else:
            del original[-1]["image"]
    seed = tmp_path / "data" / "seed"
    (seed / "seed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    (seed / "stage_1.json").write_text(json.dumps(original), "utf-8")
    (tmp_path / "synth.yaml").touch()
    return Workspace(tmp_path, Settings())


@pytest.fixture
def clip(workspace: Workspace) -> str:
    """The mini world's CLIP, or a tiny one with random weights."""
    target = workspace.root / "models" / "clip"
    target.parent.mkdir()
    if MINI_CLIP.is_dir():
        target.symlink_to(MINI_CLIP)
    else:
        _save_random_clip(target)
    return "models/clip"


def _save_random_clip(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<eos>", "<unk>", *COLOURS, "a", "box", "number", "second", "one"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "eos_token_id": 1, "pad_token_id": 0},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=4.6052,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size=side, crop_size=side)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)


def _write_recipe(workspace: Workspace, *operators: tuple[str, Mapping[str, Any]]) -> Path:
    options = {
        "dataset_path": "data/seed/seed.jsonl",
        "export_path": "artifacts/plain/out.jsonl",
        "np": 1,
        "auto_op_parallelism": False,
        "skip_op_error": False,
    }
    steps = tuple(Operator(name, parameters) for name, parameters in operators)
    recipe = materialise(Recipe("mine", "Mine", "", steps, options), load_catalogue())
    path = workspace.root / "mine.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


def _run(workspace: Workspace, recipe: Path, *more: str) -> tuple[int, Path, list[dict[str, Any]]]:
    """Run the stage; return exit code, output folder and progress records."""
    output, progress = workspace.root / "artifacts" / "out", workspace.root / "progress.jsonl"
    arguments = ("--recipe", recipe.name, "--seed", "data/seed/seed.jsonl")
    arguments += ("--images", "data/seed", "--original", "data/seed/stage_1.json")
    arguments += ("--output", str(output), "--progress", str(progress), *more)
    environment = stage_environment(workspace) | {"PYTHONPATH": str(ROOT)}
    code = subprocess.run(
        [sys.executable, "-m", "synth_agent.stages.process", *arguments],
        cwd=workspace.root,
        env=environment,
        check=False,
        capture_output=True,
    ).returncode
    return code, output, [json.loads(line) for line in progress.read_text().splitlines()]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_result_equals_data_juicers_own(workspace: Workspace, clip: str) -> None:
    recipe = _write_recipe(
        workspace,
        ("whitespace_normalization_mapper", {}),
        ("image_shape_filter", {"min_width": 52, "any_or_all": "all"}),
        ("image_text_similarity_filter", {"hf_clip": clip, "min_score": _median(workspace, clip)}),
        ("document_deduplicator", {}),
    )
    code, output, progress = _run(workspace, recipe)
    assert code == 0
    plain = subprocess.run(
        [str(Path(sys.executable).parent / "dj-process"), "--config", recipe.name],
        cwd=workspace.root,
        env=stage_environment(workspace),
        check=False,
        capture_output=True,
    )
    assert plain.returncode == 0
    prefix = f"{workspace.root.resolve()}/data/seed/"
    expected = [
        {**row, "images": [path.removeprefix(prefix) for path in row["images"]]}
        for row in _read_lines(workspace.root / "artifacts" / "plain" / "out.jsonl")
    ]
    processed = _read_lines(output / "processed.jsonl")
    assert 0 < len(processed) < 25
    assert processed == expected
    _check_accounts(output, len(processed))
    _check_progress(progress)


def _median(workspace: Workspace, clip: str) -> float:
    """Return a threshold between scores, so that the filter has something to keep and to drop."""
    code = (
        "import json, sys; from synth_agent.stages.datajuicer import guard; guard();"
        "from data_juicer.ops import load_ops;"
        "from synth_agent.stages.operators import stand_in;"
        f"op = load_ops([{{'image_text_similarity_filter': {{'hf_clip': {clip!r}}}}}])[0];"
        "rows = [json.loads(line) for line in open('data/seed/seed.jsonl')];"
        "batch = lambda: {'text': [r['text'] for r in rows], '__dj__stats__': [{} for r in rows],"
        " 'images': [['data/seed/' + i for i in r['images']] for r in rows]};"
        "fast = stand_in(op).compute_stats_batched(batch())['__dj__stats__'];"
        "stock = op.compute_stats_batched(batch())['__dj__stats__'];"
        "key = 'image_text_similarity';"
        "print(json.dumps([[list(s[key]) for s in fast], [list(s[key]) for s in stock]]),"
        " file=sys.__stdout__)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workspace.root,
        env=stage_environment(workspace) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    fast, stock = json.loads(made.stdout.splitlines()[-1])
    assert [len(scores) for scores in fast] == [1, 1, 1, 0, 2] + [1] * 25
    for mine, theirs in zip(fast, stock, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    ordered = sorted({round(score, 6) for scores in stock for score in scores})
    gaps = [(b - a, (a + b) / 2) for a, b in zip(ordered[8:-8], ordered[9:-7], strict=True)]
    return max(gaps)[1]


def _check_accounts(output: Path, kept: int) -> None:
    result = json.loads((output / "result.json").read_text())
    counts = result["operators"]
    assert [count["name"] for count in counts] == [
        "whitespace_normalization_mapper",
        "image_shape_filter",
        "image_text_similarity_filter",
        "document_deduplicator",
    ]
    assert counts[0]["before"] == counts[0]["after"] == result["seed_samples"] == 30
    assert [c["before"] for c in counts[1:]] == [c["after"] for c in counts[:-1]]
    assert counts[-1]["after"] == result["kept"] == kept
    assert result["dropped"] == 30 - kept
    rows = json.loads((output / "rows.json").read_text())
    gone = [row for dropped in rows["dropped"].values() for row in dropped]
    assert sorted(rows["kept"] + gone) == list(range(30))
    told = read_changes(output)
    assert [one.operator for one in told] == list(rows["dropped"])
    # A sample's id is its row here, and the first operator only changes texts.
    assert not told[0].changes or all(change.after for change in told[0].changes)
    for one in told[1:]:
        lost = rows["dropped"][one.operator]
        assert len(one.changes) == min(3, len(lost))
        assert {int(change.id.removeprefix("sample-")) for change in one.changes} <= set(lost)
        assert all(change.after is None and change.before for change in one.changes)
    trained = json.loads((output / "processed.json").read_text())
    assert len(trained) == kept
    assert all(record["conversations"][0] == QUESTION for record in trained)
    assert not [p.name for p in output.iterdir() if p.name.startswith(".")]


def _check_progress(progress: Sequence[Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(record["label"] for record in progress))
    assert labels[:2] == ["checking pictures", "starting Data-Juicer"]
    assert labels[2] == "1/4 whitespace_normalization_mapper"
    assert labels[-1] == "4/4 document_deduplicator"
    assert all(0 <= record["step"] <= record["total"] for record in progress)


def test_baseline_keeps_everything_and_the_cap_samples(workspace: Workspace) -> None:
    recipe = _write_recipe(workspace)
    code, output, _ = _run(workspace, recipe, "--cap", "7", "--cap-seed", "5")
    assert code == 0
    seed = _read_lines(workspace.root / "data" / "seed" / "seed.jsonl")
    drawn = random.Random(5).sample(range(30), 7)
    assert _read_lines(output / "processed.jsonl") == [seed[position] for position in drawn]
    result = json.loads((output / "result.json").read_text())
    assert (result["kept"], result["before_cap"], result["dropped"]) == (7, 30, 0)


def test_broken_and_missing_pictures_stop_the_stage(workspace: Workspace) -> None:
    images = workspace.root / "data" / "seed" / "images"
    whole = (images / "20.jpg").read_bytes()
    (images / "20.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "7.jpg").unlink()
    code, output, progress = _run(workspace, _write_recipe(workspace))
    assert code == 2
    message = progress[-1]["error"]["message"]
    assert "2 records" in message
    assert "id sample-7 (images/7.jpg: missing)" in message
    assert "id sample-20 (images/20.jpg: unreadable" in message
    assert not (output / "result.json").exists()


def test_empty_result_and_missing_model_fail_with_the_operators_name(workspace: Workspace) -> None:
    recipe = _write_recipe(workspace, ("words_num_filter", {"min_num": 500}))
    code, output, progress = _run(workspace, recipe)
    assert code == 1
    assert "words_num_filter dropped the last one" in progress[-1]["error"]["message"]
    recipe = _write_recipe(workspace, ("image_text_similarity_filter", {"hf_clip": "models/none"}))
    code, output, progress = _run(workspace, recipe)
    assert code == 2
    assert "models/none is not a folder" in progress[-1]["error"]["message"]
    assert not (output / "result.json").exists()


IN_DATA_JUICER = """
import json, sys
from synth_agent.stages.datajuicer import guard
guard()
from data_juicer.core.data import NestedDataset
from data_juicer.ops.base_op import Filter, Mapper
from data_juicer.utils.lazy_loader import LazyLoader
from synth_agent.data import Sample
from synth_agent.errors import SynthAgentError
from synth_agent.stages.running import run_operator

class Breaks(Mapper):
    _name, _batched_op = "breaks_mapper", True
    def process_batched(self, samples):
        if "bad" in samples["text"]:
            raise ValueError("cannot do this")
        return samples

class Loses(Mapper):
    _name, _batched_op = "loses_mapper", True
    def process_batched(self, samples):
        return {key: values[1:] for key, values in samples.items()}

class Nameless(Filter):
    _name, _batched_op = "nameless_filter", True
    def compute_stats_batched(self, samples):
        for stats in samples["__dj__stats__"]:
            stats["score"] = float("nan")
        return samples
    def process_batched(self, samples):
        return [False for stats in samples["__dj__stats__"]]

texts = ["fine", "fine too", "bad", "fine again"]
seed = [Sample(f"s{i}", (), text) for i, text in enumerate(texts)]
messages = []
for cls in (Breaks, Loses, Nameless):
    rows = {"text": texts, "row_id": list(range(4))}
    try:
        operator = cls(num_proc=0, auto_op_parallelism=False)
        run_operator(operator, NestedDataset.from_dict(rows), seed, lambda done, total: None)
    except SynthAgentError as error:
        messages.append(str(error))
try:
    LazyLoader._install_package("wheel")
except ImportError as error:
    messages.append(str(error))
print(json.dumps(messages), file=sys.__stdout__)
"""


def test_failures_inside_operators_name_the_sample(workspace: Workspace) -> None:
    made = subprocess.run(
        [sys.executable, "-c", IN_DATA_JUICER],
        cwd=workspace.root,
        env=stage_environment(workspace) | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    broke, lost, nameless, refused = json.loads(made.stdout.splitlines()[-1])
    assert "breaks_mapper on 1 sample (id s2): ValueError: cannot do this" in broke
    assert "loses_mapper" in lost and "1 sample (id s0)" in lost
    assert "nameless_filter, sample id s0: score = NaN" in nameless
    assert "'wheel', which is not installed" in refused


@pytest.mark.parametrize("change", [lambda text: "process: [", lambda text: text + "debug: true\n"])
def test_bad_recipe_is_refused_before_anything_runs(
    workspace: Workspace, change: Callable[[str], str]
) -> None:
    recipe = _write_recipe(workspace)
    recipe.write_text(change(recipe.read_text()), encoding="utf-8")
    code, output, progress = _run(workspace, recipe)
    assert code == InvalidInput.exit_code
    assert "mine.yaml" in progress[-1]["error"]["message"]
    assert not output.exists()


def _say(workspace: Workspace, marker: str) -> list[dict[str, Any]]:
    """Write the seed set with another image marker and return it as it was."""
    path = workspace.root / "data" / "seed" / "seed.jsonl"
    before = path.read_text("utf-8")
    path.write_text(before.replace("<__dj__image>", marker), "utf-8")
    return [json.loads(line) for line in before.splitlines()]


@pytest.mark.parametrize("large", ["1000", "10"])
def test_another_image_marker_than_the_recipes_is_refused(workspace: Workspace, large: str) -> None:
    _say(workspace, "<image>")
    code, output, progress = _run(workspace, _write_recipe(workspace), "--large", large)
    assert code == 2
    assert "line 1, field text: <image> in place of <__dj__image>" in str(progress[-1]["error"])
    assert not (output / "result.json").exists()


@pytest.mark.parametrize("large", ["1000", "10"])
def test_a_recipes_own_image_marker_does_not_reach_training(
    workspace: Workspace, large: str
) -> None:
    seed = _say(workspace, "<image>")
    recipe = _write_recipe(workspace)
    recipe.write_text(f"image_special_token: <image>\n{recipe.read_text('utf-8')}", "utf-8")
    code, output, _ = _run(workspace, recipe, "--large", large)
    assert code == 0
    assert _read_lines(output / "processed.jsonl") == seed
    answers = [r["conversations"][1]["value"] for r in read_llava(output / "processed.json")]
    assert not [answer for answer in answers if "<image>" in answer]
