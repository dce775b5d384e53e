"""Choose a recipe of the workspace instead of the planner's."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from synth_agent.ui.backend import RecipeChoice
from synth_agent.ui.text import clean


class ChooseRecipeScreen(ModalScreen[str | None]):
    """Answer with a recipe's name, or None when the user goes back."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back", id="choose.back")]

    def __init__(self, recipes: Sequence[RecipeChoice]) -> None:
        super().__init__()
        self._recipes = recipes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog choose-card"):
            yield Static(Content.styled("Recipes of this workspace", "bold"))
            yield OptionList(
                *(Option(_prompt(recipe), id=str(i)) for i, recipe in enumerate(self._recipes))
            )
            yield Static(Content.styled("enter proposes it, esc goes back", "$foreground-muted"))

    def on_mount(self) -> None:
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._recipes[event.option_index].name)


def _prompt(recipe: RecipeChoice) -> Content:
    return Content.assemble(
        (clean(recipe.name), "bold"),
        ("  " + clean(recipe.title), ""),
        ("\n  " + clean(recipe.reason), "$foreground-muted"),
    )
