"""The app and the worker stay light: what they import is checked in a process of its own."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "data_juicer", "datasets", "peft", "openai", "ray", "pandas")
LIGHT_MODULES = (
    "synth_agent.cli",
    "synth_agent.demo",
    "synth_agent.headless",
    "synth_agent.journal",
    "synth_agent.miniworld",
    "synth_agent.pipeline",
    "synth_agent.planner",
    "synth_agent.recipes",
    "synth_agent.ui.app",
    "synth_agent.worker",
)


def loaded(code: str) -> set[str]:
    """Return the top-level packages that are loaded after running `code`."""
    show = "import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(output.stdout.split())


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_no_heavy_library_is_imported(module: str) -> None:
    assert not loaded(f"import {module}") & set(HEAVY)


def test_the_version_needs_nothing_but_the_standard_library() -> None:
    packages = loaded("from synth_agent.cli import main; main(['--version'])")
    assert not packages & {*HEAVY, "textual", "pydantic", "yaml", "git", "numpy"}


def test_the_worker_does_not_draw() -> None:
    assert "textual" not in loaded("import synth_agent.worker")
