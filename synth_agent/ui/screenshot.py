"""Save a picture of one of the app's screens over a real workspace.

    python -m synth_agent.ui.screenshot WORKSPACE SCREEN OUT.svg --size 120x36

SCREEN is home, run, results, history, data, planner, proposal or rules. Nothing is written but the picture.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from synth_agent.errors import EXIT_OK, SynthAgentError
from synth_agent.ui.app import SynthAgentApp
from synth_agent.workspace import open_workspace

SCREENS = {
    "home": "1",
    "run": "2",
    "results": "3",
    "history": "4",
    "data": "5",
    "planner": "6",
    "proposal": "p",
    "rules": "r",
}
_SETTLE_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the asked screen without a terminal and write it as SVG."""
    parser = argparse.ArgumentParser(description="Save a picture of one of the app's screens.")
    parser.add_argument("workspace", type=Path)
    parser.add_argument("screen", choices=sorted(SCREENS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="120x36", help="columns x lines (default: 120x36)")
    parser.add_argument("--keys", default="", help="further keys to press, separated by commas")
    options = parser.parse_args(arguments)
    columns, _, lines = options.size.partition("x")
    keys = [SCREENS[options.screen], *filter(None, options.keys.split(","))]
    try:
        app = SynthAgentApp(open_workspace(options.workspace))
    except SynthAgentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    svg = asyncio.run(draw(app, keys, (int(columns), int(lines))))
    options.out.write_text(svg, encoding="utf-8")
    return EXIT_OK


async def draw(app: SynthAgentApp, keys: Sequence[str], size: tuple[int, int]) -> str:
    """Press keys in the app at a size, and return the screen as SVG."""
    async with app.run_test(size=size) as pilot:
        await pilot.pause(_SETTLE_SECONDS)
        for key in keys:
            await pilot.press(key)
            await pilot.pause(_SETTLE_SECONDS)
        return app.export_screenshot(title="synth-agent")


if __name__ == "__main__":
    sys.exit(main())
