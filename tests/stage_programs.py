"""A worker whose four stages are one small real program; started by the worker tests."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

from synth_agent.runs import digest
from synth_agent.stage_plan import KIND_OF_STAGE, Context, Stage, StageBuilder


def builder(name: str) -> StageBuilder:
    def build(context: Context) -> Stage:
        mode = (context.workspace.root / "artifacts" / f"mode-{name}").resolve()
        key = digest([name, context.plan.proposal.recipe])
        output = context.workspace.artifacts / KIND_OF_STAGE[name] / key[:16]
        partial = output.with_name(output.name + ".partial")
        command = (sys.executable, __file__, "--stage", name, str(partial), str(mode))
        command += (str(context.progress(name)),)
        required = ("out.txt",)
        if name == "evaluate":
            required = ("textvqa/score.json", "textvqa/predictions.jsonl")
        return Stage(name, key, (command,), output, required)

    return build


def run_stage(name: str, output: Path, mode: Path, progress: Path) -> int:
    how = mode.read_text() if mode.exists() else ""
    progress.open("a").write(json.dumps({"step": 1, "total": 2, "unit": "steps"}) + "\n")
    if how == "fail":
        print("the disk of dreams is full")
        return 1
    if how == "full":
        with Path("/dev/full").open("w") as full:
            full.write("x")
    if how.startswith("change "):
        Path(how.removeprefix("change ")).write_text("changed while the stage ran")
    if how == "hang":
        time.sleep(60)
    if name == "evaluate":
        folder = output / "textvqa"
        folder.mkdir()
        text = "".join(json.dumps({"key": str(i), "score": i % 2}) + "\n" for i in range(8))
        (folder / "predictions.jsonl").write_text(text)
        score = {"benchmark": "textvqa", "split": "val", "metric": "vqa", "score_percent": 50.0}
        score |= {"chance_percent": 0.0, "metrics": {}, "scorer": {"name": "s", "version": "1"}}
        score["categories"] = {"all": {"score_percent": 50.0, "num_questions": 8}}
        score["predictions_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "score.json").write_text(json.dumps(score))
    (output / "out.txt").write_text(name)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--stage":
        sys.exit(run_stage(sys.argv[2], *map(Path, sys.argv[3:6])))
    from synth_agent.worker import main

    sys.exit(main(builders={name: builder(name) for name in KIND_OF_STAGE}))
