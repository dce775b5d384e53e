"""Captions rewritten, and asked about, by a service that speaks the OpenAI protocol on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from synth_agent.miniworld import write_world

ROOT = Path(__file__).parents[1]
MINI_WORLD = ROOT / "synth_agent" / "miniworld"
TEXTS = (
    "<__dj__image>\na red ring and one blue square <|__dj__eoc|>",
    "<__dj__image>\nthe word stop on a sign <|__dj__eoc|>",
    "<__dj__image>\na red ring and one blue square <|__dj__eoc|>",
)
STAGE = """
from synth_agent.stages.datajuicer import guard
guard()
import synth_agent.stages.endpoint_operators
from synth_agent.stages.process import main
raise SystemExit(main())
"""
DRIVER = """
import json, os, sys
from synth_agent.stages.datajuicer import guard
guard()
from data_juicer.ops import load_ops
from synth_agent.stages.endpoint_operators import EndpointFailed
cases, texts = map(json.loads, sys.argv[1:])
for position, (name, parameters) in enumerate(cases, 1):
    if position == len(cases):
        del os.environ["SYNTH_ENDPOINT_URL"]
    [operator] = load_ops([{name: {"api_model": "small", "num_proc": 0, **parameters}}])
    samples = {"text": texts, "id": [f"s{number}" for number in range(len(texts))]}
    try:
        made = operator.process_batched(samples)
        print(json.dumps({"texts": made["text"], "ids": made["id"]}))
    except EndpointFailed as error:
        print(json.dumps({"error": str(error)}))
"""
Reply = Callable[[int, dict[str, Any]], tuple[int, str]]


class Service:
    """Replies to chat completions and remembers what it was asked."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        lock, service = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    service.asked.append(body)
                    service.keys.add(self.headers["Authorization"])
                    number = len(service.asked)
                status, text = (
                    (404, "") if self.path != "/v1/chat/completions" else reply(number, body)
                )
                answer: dict[str, Any] = {"error": {"message": text}}
                if status == 200:
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    answer = {"id": "1", "object": "chat.completion", "created": 0}
                    answer |= {"model": body["model"], "choices": [choice]}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                """Keep the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def start() -> Iterator[Callable[[Reply], Service]]:
    services: list[Service] = []

    def begin(reply: Reply) -> Service:
        services.append(Service(reply))
        return services[-1]

    yield begin
    for service in services:
        service.stop()


def _said(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def _run(
    root: Path, operator: str, url: str, /, **parameters: Any
) -> subprocess.CompletedProcess[str]:
    """Process three samples by one operator, with the process stage in a program of its own."""
    seed = root / "seed"
    seed.mkdir(exist_ok=True)
    records = []
    for number, text in enumerate(TEXTS):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(seed / f"{number}.png")
        records.append({"id": f"s{number}", "images": [f"{number}.png"], "text": text})
    (seed / "seed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "x"}]
    original = [
        {"id": f"s{number}", "image": f"{number}.png", "conversations": turns}
        for number in range(len(TEXTS))
    ]
    (root / "original.json").write_text(json.dumps(original))
    values = {"api_model": "small", "num_proc": 0, **parameters}
    recipe = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}
    (root / "mine.yaml").write_text(yaml.safe_dump({**recipe, "process": [{operator: values}]}))
    flags = ("--recipe=mine.yaml", "--seed=seed/seed.jsonl", "--images=seed", "--output=out")
    return _stage(root, url, [*flags, "--original=original.json"])


def _stage(root: Path, url: str, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STAGE, *flags],
        cwd=root,
        env=_environment(url),
        capture_output=True,
        text=True,
        timeout=600,
    )


def _drive(
    root: Path, url: str, cases: Sequence[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Run operators one after the other in one program; the last of them without an address."""
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases), json.dumps(TEXTS)],
        cwd=root,
        env=_environment(url),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _environment(url: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {"PYTHONPATH": str(ROOT), "SYNTH_ENDPOINT_URL": url, "SYNTH_ENDPOINT_KEY": "secret"}
    return {**kept, **own}


def _texts(root: Path) -> list[str]:
    lines = (root / "out" / "processed.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_process_stage_rewrites_captions_between_their_markers(
    tmp_path: Path, start: Callable[[Reply], Service]
) -> None:
    service = start(lambda number, body: (200, f' "<__dj__image> seen: {_said(body)}\n" '))
    ran = _run(tmp_path, "endpoint_rewriting_mapper", service.url, prompt="Reword.", seed=3)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert _texts(tmp_path) == [
        "<__dj__image>\nseen: a red ring and one blue square <|__dj__eoc|>",
        "<__dj__image>\nseen: the word stop on a sign <|__dj__eoc|>",
        "<__dj__image>\nseen: a red ring and one blue square <|__dj__eoc|>",
    ]
    llava = json.loads((tmp_path / "out" / "processed.json").read_text())
    assert [turn["value"] for turn in llava[1]["conversations"]] == [
        "<image>\nDescribe.",
        "seen: the word stop on a sign",
    ]
    # Equal captions are asked once.
    assert sorted(map(_said, service.asked)) == [
        "a red ring and one blue square",
        "the word stop on a sign",
    ]
    assert {body["messages"][0]["content"] for body in service.asked} == {"Reword."}
    assert {(body["model"], body["seed"]) for body in service.asked} == {("small", 3)}
    assert service.keys == {"Bearer secret"}


def test_operators_ask_again_remember_and_name_what_fails(
    tmp_path: Path, start: Callable[[Reply], Service]
) -> None:
    counts: Counter[str] = Counter()

    def reply(number: int, body: dict[str, Any]) -> tuple[int, str]:
        case = body["messages"][0]["content"]
        counts[case] += 1
        if case == "refused":
            return 400, "no such model"
        if case == "stubborn":
            return 200, "Sorry." if "stop" in _said(body) else "Question: a Answer: b"
        if counts[case] == 1:
            return 503, "busy"
        if counts[case] == 2:
            return 200, "I would rather not."
        return 200, "Question: What is there?\nAnswer: This."

    service = start(reply)
    once = {"keep_original_sample": True, "concurrency": 1}
    asking, rewriting = "endpoint_question_mapper", "endpoint_rewriting_mapper"
    cases = [
        (asking, {"prompt": "busy", **once}),
        (asking, {"prompt": "busy", **once}),
        (asking, {"prompt": "stubborn", "max_attempts": 2}),
        (rewriting, {"prompt": "refused"}),
        (rewriting, {"prompt": "no address"}),
    ]
    first, again, stubborn, refused, lost = _drive(tmp_path, service.url, cases)
    assert first["texts"][:3] == list(TEXTS)
    assert first["texts"][4] == (
        "<__dj__image>\nthe word stop on a sign Question: What is there? Answer: This. <|__dj__eoc|>"
    )
    assert first["ids"] == ["s0", "s1", "s2"] * 2
    assert again == first
    assert counts["busy"] == 4, "two captions, one overload, one unusable reply, and then the cache"
    assert [body["seed"] for body in service.asked[:3]] == [0, 0, 1]
    assert stubborn == {
        "error": "sample s1: 2 replies were not usable, the last one 'Sorry.'",
    }
    assert refused["error"].startswith("sample s")
    assert "no such model" in refused["error"]
    assert lost["error"].startswith("SYNTH_ENDPOINT_URL is not set")


@pytest.mark.parametrize("name", ["text-rewriting", "question-generation"])
def test_shipped_recipe_runs_on_the_mini_world(
    name: str, tmp_path: Path, start: Callable[[Reply], Service]
) -> None:
    def reply(number: int, body: dict[str, Any]) -> tuple[int, str]:
        if name == "text-rewriting":
            return 200, f"here {_said(body)}"
        return 200, "Question: What is in the picture?\nAnswer: Shapes."

    service = start(reply)
    write_world(
        tmp_path / "data",
        seed=5,
        num_seed_samples=20,
        num_instructions=3,
        num_textvqa=3,
        num_mmbench=6,
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "clip").symlink_to(MINI_WORLD / "assets" / "clip")
    flags = {
        "recipe": MINI_WORLD / "recipes" / "by-permission" / f"{name}.yaml",
        "seed": "data/seed/seed.jsonl",
        "images": "data/seed",
        "original": "data/seed/stage_1.json",
        "output": "out",
    }
    ran = _stage(tmp_path, service.url, [f"--{flag}={value}" for flag, value in flags.items()])
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    seen, asked = result["operators"][0]["after"], result["operators"][1]
    assert 0 < len({_said(body) for body in service.asked}) == len(service.asked) <= seen
    assert asked["after"] == seen * (2 if name == "question-generation" else 1)
    texts = _texts(tmp_path)
    assert texts
    for text in texts:
        assert text.startswith("<__dj__image>\n")
        assert text.endswith(" <|__dj__eoc|>")
    if name == "text-rewriting":
        assert all(text.startswith("<__dj__image>\nhere ") for text in texts)
    else:
        assert sum("? Answer: Shapes. <|" in text for text in texts) * 2 == len(texts)
